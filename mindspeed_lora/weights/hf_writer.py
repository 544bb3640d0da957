"""Writing a Hugging Face folder's safetensors one tensor at a time."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from mindspeed_lora.files import atomic_file, write_json
from mindspeed_lora.weights.block_writer import BlockWriter, write_at
from mindspeed_lora.weights.hf_files import INDEX_NAME, SAFETENSORS_DTYPES
from mindspeed_lora.weights.torch_stream import Data, write_data

MAX_SHARD_BYTES = 5_000_000_000
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class HFTensorSpec:
    """One tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return prod(self.shape) * self.dtype.itemsize


def write_hf_tensors(
    folder: Path, specs: Sequence[HFTensorSpec], read: Callable[[HFTensorSpec], Data], max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[Path, int]:
    """Write ``model.safetensors``, or several files and their index; ``read(spec)`` returns a tensor, in the order of ``specs``.

    Returns the CRC32 of each file.

    Raises:
        CheckpointError: a tensor is of another shape or dtype than its spec.
    """
    shards = _split(specs, max_shard_bytes)
    names = (
        ["model.safetensors"] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    checksums = {}
    for name, shard in zip(names, shards, strict=True):
        with atomic_file(folder / name) as temporary:
            checksums[folder / name] = _write_file(temporary, shard, read)
    if len(shards) > 1:
        weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
        total = sum(spec.num_bytes for spec in specs)
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return checksums


def _split(specs: Sequence[HFTensorSpec], max_shard_bytes: int) -> list[list[HFTensorSpec]]:
    shards: list[list[HFTensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.num_bytes
    return shards


def _write_file(path: Path, specs: Sequence[HFTensorSpec], read: Callable[[HFTensorSpec], Data]) -> int:
    """8-byte length, JSON header padded to 8 bytes, data; wider dtypes lie first, so that every tensor is aligned. Returns the CRC32."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, position = {}, 0
    for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):
        starts[spec.name] = position
        header[spec.name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.num_bytes],
        }
        position += spec.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data_start = 8 + len(text)
    with BlockWriter(path) as out:
        write_at(out.descriptor, 0, memoryview(struct.pack("<Q", len(text)) + text))
        os.truncate(out.descriptor, data_start + position)
        for spec in specs:
            write_data(out, data_start + starts[spec.name], read(spec), spec.shape, spec.dtype, spec.name)
        out.settle()
        return out.checksum(0, data_start + position)
