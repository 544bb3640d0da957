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
from mindspeed_lora.weights.hf_files import INDEX_NAME, SAFETENSORS_DTYPES
from mindspeed_lora.weights.torch_stream import Data, write_at, write_data

MAX_SHARD_BYTES = 5_000_000_000
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class HFTensorSpec:
    """One tensor to be written; ``group`` joins tensors that one read gives together (the parts of a fused row)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    group: int

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return prod(self.shape) * self.dtype.itemsize


def write_hf_tensors(
    folder: Path, specs: Sequence[HFTensorSpec], read: Callable[[int], Sequence[Data]], max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Path]:
    """Write ``model.safetensors``, or several files and their index; ``read(group)`` returns a group's tensors in the specs' order.

    Raises:
        CheckpointError: a tensor is of another shape or dtype than its spec.
    """
    shards = _split(specs, max_shard_bytes)
    names = (
        ["model.safetensors"] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for name, shard in zip(names, shards, strict=True):
        with atomic_file(folder / name) as temporary:
            _write_file(temporary, shard, read)
    if len(shards) > 1:
        weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
        total = sum(spec.num_bytes for spec in specs)
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return [folder / name for name in names]


def _split(specs: Sequence[HFTensorSpec], max_shard_bytes: int) -> list[list[HFTensorSpec]]:
    """Cut between groups, so that no group is read twice."""
    groups: dict[int, list[HFTensorSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.group, []).append(spec)
    shards: list[list[HFTensorSpec]] = [[]]
    size = 0
    for group in groups.values():
        num_bytes = sum(spec.num_bytes for spec in group)
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].extend(group)
        size += num_bytes
    return shards


def _write_file(path: Path, specs: Sequence[HFTensorSpec], read: Callable[[int], Sequence[Data]]) -> None:
    """8-byte length, JSON header padded to 8 bytes, data; wider dtypes lie first, so that every tensor is aligned."""
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
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        write_at(descriptor, 0, memoryview(struct.pack("<Q", len(text)) + text))
        os.truncate(descriptor, data_start + position)
        for group in dict.fromkeys(spec.group for spec in specs):
            wanted = [spec for spec in specs if spec.group == group]
            for spec, tensor in zip(wanted, read(group), strict=True):
                write_data(descriptor, data_start + starts[spec.name], tensor, spec.shape, spec.dtype, spec.name, checksum=False)
    finally:
        os.close(descriptor)
