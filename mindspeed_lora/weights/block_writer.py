"""Writing a file block by block, by two threads. Each takes a block and, piece by piece, reads, computes, checksums and writes it.

A block is large, as threads meet once per block. A piece is small: it is still in the core's cache when it is written, where copying
it into the file costs a fraction of what copying from memory does.
"""

from __future__ import annotations

import os
import zlib
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch

from mindspeed_lora.files import crc32_joined

THREADS = 2  # more would wait for the disk; each holds one block
FLUSH_BYTES = 1 << 24  # the disk is given work in such portions while later blocks are made
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Block:
    """Some rows of a tensor, or all of it: shape and dtype are known, ``make`` is called by the thread that writes it.

    What it gives are the pieces one below the other; each is used before the next is asked for, so that they may share memory.
    ``make`` None: there is no data (a dry run), its place stays empty.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Iterable[torch.Tensor]] | None

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return prod(self.shape) * self.dtype.itemsize


class _Written(NamedTuple):
    start: int
    length: int
    crc: int


class BlockWriter:
    """An open file. An error in a thread is raised in the caller, by a later :meth:`write` or by :meth:`settle`.

    Leaving the ``with`` block waits for the blocks under way and drops the others: call :meth:`settle` first.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="block-writer")
        self._pending: deque[Future[_Written]] = deque()
        self._written: list[_Written] = []
        self._flushed = 0  # of the blocks in _written

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._threads.shutdown(cancel_futures=True)
        os.close(self.descriptor)

    def write(self, offset: int, block: Block) -> None:
        """Have a block made and written at ``offset``; Raises what an earlier block raised."""
        if len(self._pending) >= 2 * THREADS:
            self._take()
        self._pending.append(self._threads.submit(self._write, offset, block))

    def settle(self) -> None:
        """Wait until all is written; Raises what a block raised."""
        while self._pending:
            self._take()
        self._written.sort()

    def _take(self) -> None:
        """Wait for the oldest block; once a portion has gathered, have the disk begin with it, so that the fsync at the end is short."""
        self._written.append(self._pending.popleft().result())
        fresh = self._written[self._flushed :]
        if sum(block.length for block in fresh) >= FLUSH_BYTES:
            self._flushed = len(self._written)
            begin_writeback(self.descriptor, min(fresh).start, max(block.start + block.length for block in fresh))

    def _write(self, offset: int, block: Block) -> _Written:
        if block.make is None:
            return _Written(offset, block.num_bytes, 0)
        crc, length = 0, 0
        for piece in block.make():
            content = tensor_bytes(piece)
            crc = zlib.crc32(content, crc)
            write_at(self.descriptor, offset + length, content)
            length += len(content)
        if length != block.num_bytes:
            raise ValueError(f"a block of {block.dtype} {list(block.shape)} came as {length} bytes")
        return _Written(offset, length, crc)

    def checksum(self, start: int, stop: int) -> int:
        """CRC32 of a range of the settled file; only what lies between its blocks is read."""
        return crc32_joined(self._pieces(start, stop))

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        for index in range(bisect_left(self._written, (start,)), bisect_left(self._written, (stop,))):
            block = self._written[index]
            yield from self._read(start, block.start)
            yield block.crc, block.length
            start = block.start + block.length
        yield from self._read(start, stop)

    def _read(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        for first in range(start, stop, _READ_BYTES):
            content = os.pread(self.descriptor, min(_READ_BYTES, stop - first), first)
            yield zlib.crc32(content), len(content)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes, without a copy where it already is one."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def write_at(descriptor: int, offset: int, data: memoryview) -> None:
    """Write all of ``data`` (one ``pwrite`` takes at most 2 GiB)."""
    while data:
        written = os.pwrite(descriptor, data[: 1 << 30], offset)
        data, offset = data[written:], offset + written


def begin_writeback(descriptor: int, start: int, stop: int) -> None:
    """Have the system write a range to the disk from now on, without waiting for it; does nothing where it knows no such call.

    Linux begins at this advice, and drops only pages that are on the disk already: fresh ones stay in memory for the next reader.
    """
    if hasattr(os, "posix_fadvise"):  # not on macOS
        with suppress(OSError):  # advice that a file system does not take changes nothing about what is written
            os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)


@contextmanager
def one_thread_per_operation() -> Iterator[None]:
    """Keep torch from dividing each operation among cores that already have a block each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
