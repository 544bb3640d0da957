"""Files that are either whole or absent: a temporary name, fsync, then rename."""

from __future__ import annotations

import json
import os
import shutil
import uuid
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 1 << 22
_CRC32_POLYNOMIAL = 0xEDB88320  # without x^32, the bit of x^31 lowest


def temporary_name(path: Path) -> Path:
    """A sibling of ``path`` with a name that no reader takes for the real thing."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def fsync_path(path: Path) -> None:
    """Flush a file's, or a folder's, contents to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on success it becomes ``path``, on any error it is removed."""
    path = Path(path)
    temporary = temporary_name(path)
    try:
        yield temporary
        fsync_path(temporary)
        temporary.replace(path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder; on success it becomes ``path`` (which must not exist), on any error it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        fsync_path(temporary)
        temporary.rename(path)
        fsync_path(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path`` atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def crc32_of(path: Path) -> str:
    """CRC32 of a file's bytes as eight hex digits."""
    value = 0
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def crc32_joined(pieces: Iterable[tuple[int, int]]) -> int:
    """CRC32 of bytes that are known as pieces one after the other, each by its CRC32 and length.

    ``crc(a + b) = crc(a) x^(8 len(b)) + crc(b)`` as polynomials over GF(2), modulo the CRC's own.
    """
    value = 0
    for crc, length in pieces:
        value = _times(value, _shift(length)) ^ crc
    return value


@cache
def _shift(length: int) -> int:
    """``x^(8 length)``."""
    result, power = 1 << 31, 1 << 23  # x^0, x^8
    while length:
        if length & 1:
            result = _times(result, power)
        power, length = _times(power, power), length >> 1
    return result


def _times(first: int, second: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if first >> bit & 1:
            product ^= second
        second = second >> 1 ^ (_CRC32_POLYNOMIAL if second & 1 else 0)
    return product
