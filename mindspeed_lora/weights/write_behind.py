"""Writing a file a few blocks behind its caller, who reads and computes the next ones meanwhile: two cores, side by side."""

from __future__ import annotations

import os
import zlib
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from mindspeed_lora.files import crc32_joined

_WAITING = 4  # blocks that have not been written yet; the caller waits where there are more
_READ_BYTES = 1 << 22


class _Written(NamedTuple):
    start: int
    length: int
    crc: int


class WriteBehind:
    """An open file. Blocks are written in order by a second thread, which also takes their CRC32 while they are in the cache.

    A block must not change after :meth:`write`. An error of the writing thread is raised in the caller, by a later :meth:`write` or by
    :meth:`settle`. Leaving the ``with`` block waits for the write under way and drops the others: call :meth:`settle` first.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write-behind")
        self._pending: deque[Future[_Written]] = deque()
        self._written: list[_Written] = []

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)
        os.close(self.descriptor)

    def write(self, offset: int, content: memoryview) -> None:
        """Have ``content`` written at ``offset``; Raises OSError where an earlier block could not be."""
        if len(self._pending) >= _WAITING:
            self._written.append(self._pending.popleft().result())
        self._pending.append(self._thread.submit(self._write, offset, content))

    def leave(self, offset: int, length: int) -> None:
        """Leave a hole (a dry run has no data), which no checksum covers."""
        self._written.append(_Written(offset, length, 0))

    def settle(self) -> None:
        """Wait until all is written; Raises OSError where it cannot be."""
        while self._pending:
            self._written.append(self._pending.popleft().result())
        self._written.sort()

    def _write(self, offset: int, content: memoryview) -> _Written:
        write_at(self.descriptor, offset, content)
        return _Written(offset, len(content), zlib.crc32(content))

    def checksum(self, start: int, stop: int) -> int:
        """CRC32 of a range of the settled file; only what was not written by :meth:`write` is read."""
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


def write_at(descriptor: int, offset: int, data: memoryview) -> None:
    """Write all of ``data`` (one ``pwrite`` takes at most 2 GiB)."""
    while data:
        written = os.pwrite(descriptor, data[: 1 << 30], offset)
        data, offset = data[written:], offset + written
