"""Writing a Hugging Face folder from any source, one row at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from mindspeed_lora.conversion.merge import WeightStream
from mindspeed_lora.weights.hf_writer import MAX_SHARD_BYTES, HFTensorSpec, write_hf_tensors
from mindspeed_lora.weights.table import WeightTable
from mindspeed_lora.weights.torch_stream import Data


def write_hugging_face(folder: Path, stream: WeightStream, table: WeightTable, max_shard_bytes: int = MAX_SHARD_BYTES) -> list[Path]:
    """Write the safetensors of ``folder`` (an index too where there are several) and return their paths."""
    entries = list(table.entries())
    specs = [
        HFTensorSpec(name, shape, dtype, group)
        for group, (row, layer) in enumerate(entries)
        for name, shape, dtype in zip(row.hf_names(layer), row.part_shapes, stream.part_dtypes(row, layer), strict=True)
    ]
    with tqdm(total=len(entries), desc="writing safetensors", unit="tensor") as progress:

        def read(group: int) -> Sequence[Data]:
            row, layer = entries[group]
            progress.update(1)
            return [stream.vocabulary_blocks(row, 0, row.part_shapes[0][0])] if row.padded else stream.parts(row, layer)

        return write_hf_tensors(folder, specs, read, max_shard_bytes)
