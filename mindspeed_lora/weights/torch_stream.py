"""Writing a ``.pt`` whose tensors never are in memory together.

``torch.save`` under ``skip_data()`` lays the file out without its tensors' bytes; each tensor is then written into
its place, and the CRC32 that the zip format keeps of it, in the record's descriptor and in the central directory, is put right.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.weights.block_writer import Block, BlockWriter, write_at

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # zip: signature, versions and flags, crc, sizes, name and extra lengths
_CENTRAL_HEADER_BYTES = 46
_HAS_DESCRIPTOR = 0x08


Data = Iterable[Block]
"""A tensor as its blocks along dimension 0, one after another."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is written later."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Record:
    """One stored tensor inside the zip file; offsets are in bytes from the file's start."""

    data: int
    size: int
    local_crc: int | None  # in the local header, where no descriptor follows the data
    descriptor_crc: int | None
    central_crc: int


def save_streamed(path: Path, build: Callable[[Callable[[TensorSpec], torch.Tensor]], dict[str, Any]], read: Callable[[int], Data]) -> int:
    """Write a ``.pt`` file tensor by tensor and return the file's CRC32.

    ``build(placeholder)`` returns the dictionary to save, having called ``placeholder(spec)`` once per tensor, in the order in which
    they are met; ``read(i)`` returns the i-th tensor when its turn comes.

    Raises:
        CheckpointError: the tensor read is of another shape or dtype than its spec.
    """
    specs: list[TensorSpec] = []

    def placeholder(spec: TensorSpec) -> torch.Tensor:
        specs.append(spec)
        return torch.empty(spec.shape, dtype=spec.dtype)  # pages are never touched

    content = build(placeholder)
    with torch.serialization.skip_data():
        save_torch_file(content, path)
    del content
    with BlockWriter(path) as out:
        records = _records(out.descriptor, path, len(specs))
        for index, (spec, record) in enumerate(zip(specs, records, strict=True)):
            write_data(out, record.data, read(index), spec.shape, spec.dtype, f"{path}: tensor {index}")
        out.settle()
        for record in records:
            crc = struct.pack("<L", out.checksum(record.data, record.data + record.size))
            for offset in (record.local_crc, record.descriptor_crc, record.central_crc):
                if offset is not None:
                    write_at(out.descriptor, offset, memoryview(crc))
        return out.checksum(0, path.stat().st_size)


def save_torch_file(content: Mapping[str, Any], path: Path) -> None:
    """``torch.save``; a file that cannot be written is an OSError here too, of which torch makes a RuntimeError."""
    try:
        torch.save(content, path)
    except RuntimeError as error:
        raise OSError(f"torch.save cannot write {path.parent.name}/{path.name}: {str(error).splitlines()[0]}") from error


def write_data(out: BlockWriter, offset: int, data: Data, shape: tuple[int, ...], dtype: torch.dtype, where: str) -> None:
    """Have a tensor of ``shape`` and ``dtype`` written at ``offset``, block by block.

    Raises:
        CheckpointError: what comes is of another shape or dtype; the message begins with ``where``.
    """
    rows, found = 0, shape
    for block in data:
        rows += block.shape[0] if block.shape else 1
        found = (rows, *block.shape[1:]) if block.shape else ()
        if found[1:] != shape[1:] or block.dtype != dtype:
            raise CheckpointError(f"{where} is {block.dtype} {list(found)}, laid out as {dtype} {list(shape)}")
        out.write(offset, block)
        offset += block.num_bytes
    if found != shape or not rows:
        raise CheckpointError(f"{where} is {dtype} {list(found)}, laid out as {dtype} {list(shape)}")


def _records(descriptor: int, path: Path, count: int) -> list[_Record]:
    """The records ``*/data/0``, ``*/data/1``, ... which torch numbers in the order of pickling."""
    with zipfile.ZipFile(path) as archive:
        infos = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        central = _central_crc_offsets(descriptor, archive.start_dir, len(archive.infolist()))
        records = []
        for index in range(count):
            info = infos[f"data/{index}"]  # KeyError: torch stores tensors under other names than in 2.6 .. 2.13
            header = _LOCAL_HEADER.unpack(os.pread(descriptor, _LOCAL_HEADER.size, info.header_offset))
            data = info.header_offset + _LOCAL_HEADER.size + header[-2] + header[-1]
            described = bool(info.flag_bits & _HAS_DESCRIPTOR)
            records.append(
                _Record(
                    data=data,
                    size=info.file_size,
                    local_crc=None if described else info.header_offset + 14,
                    descriptor_crc=data + info.file_size + 4 if described else None,
                    central_crc=central[info.filename],
                )
            )
    return records


def _central_crc_offsets(descriptor: int, start: int, count: int) -> Mapping[str, int]:
    offsets, position = {}, start
    for _ in range(count):
        entry = os.pread(descriptor, _CENTRAL_HEADER_BYTES, position)
        name_length, extra_length, comment_length = struct.unpack_from("<3H", entry, 28)
        name = os.pread(descriptor, name_length, position + _CENTRAL_HEADER_BYTES).decode("utf-8")
        offsets[name] = position + 16
        position += _CENTRAL_HEADER_BYTES + name_length + extra_length + comment_length
    return offsets
