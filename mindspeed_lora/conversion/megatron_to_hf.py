"""Writing a Hugging Face folder from any source, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from mindspeed_lora.conversion.stream import WeightStream
from mindspeed_lora.weights.block_writer import Block
from mindspeed_lora.weights.hf_writer import MAX_SHARD_BYTES, HFTensorSpec, write_hf_tensors
from mindspeed_lora.weights.table import WeightTable


def write_hugging_face(folder: Path, stream: WeightStream, table: WeightTable, max_shard_bytes: int = MAX_SHARD_BYTES) -> dict[Path, int]:
    """Write the safetensors of ``folder`` (an index too where there are several) and return the CRC32 of each."""
    specs, places = [], {}
    for row, layer in table.entries():
        named = zip(row.hf_names(layer), row.part_shapes, stream.part_dtypes(row, layer), strict=True)
        for part, (name, shape, dtype) in enumerate(named):
            specs.append(HFTensorSpec(name, shape, dtype))
            places[name] = row, layer, part
    with tqdm(total=len(specs), desc=f"{stream.verb} safetensors", unit="tensor") as progress:

        def read(spec: HFTensorSpec) -> Iterator[Block]:
            row, layer, part = places[spec.name]
            progress.update(1)
            return stream.blocks(row, layer, [(part, 0, spec.shape[0])])

        return write_hf_tensors(folder, specs, read, max_shard_bytes)
