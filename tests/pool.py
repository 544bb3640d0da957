"""A pool of gloo processes that lives as long as the test run, so that imports are paid once.

Each cell is a function of the top level of a test module, run on the first ``world_size`` processes, each with a fresh
process group of that size. What the ranks return comes back in rank order; an exception on any rank fails the test
with that rank's traceback. A cell that hangs, or whose other ranks do not end, costs the pool its processes: they are
killed and started anew for the next cell.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_GRACE_SECONDS = 15.0
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


class RankError(AssertionError):
    """A rank of a cell raised, or did not end in time."""


def _run_cell(function: Callable[..., Any], rank: int, world_size: int, store: str, timeout: float, args: tuple[Any, ...]) -> Any:
    import torch.distributed as dist

    from mindspeed_lora.parallel.context import shutdown

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        value = function(*args)
        if dist.is_initialized():
            dist.barrier()  # torch 2.7's gloo loses what is still under way when the other side leaves first
        return value
    finally:
        for name in _VARIABLES:
            os.environ.pop(name, None)
        shutdown()


def _worker(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            cell = connection.recv()
        except EOFError:
            return
        if cell is None:
            return
        try:
            connection.send(("value", _run_cell(*cell)))
        except BaseException:
            connection.send(("error", traceback.format_exc()))


class ProcessPool:
    """Up to ``size`` processes, started when a cell first needs them."""

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self._workers: list[tuple[Any, Connection]] = []
        self._folder = Path(tempfile.mkdtemp(prefix="pool_"))
        self._cells = 0

    def _grow(self, count: int) -> None:
        if count > self.size:
            raise ValueError(f"the pool has {self.size} processes, the cell wants {count}")
        context = multiprocessing.get_context("spawn")
        while len(self._workers) < count:
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def run(self, function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 180.0) -> list[Any]:
        """``function(*args)`` on ``world_size`` ranks; ``timeout`` in seconds.

        Raises:
            RankError: with the tracebacks of the ranks that raised, or the names of those that did not end.
        """
        self._grow(world_size)
        self._cells += 1
        store = str(self._folder / f"store_{self._cells}")
        for rank, (_, connection) in enumerate(self._workers[:world_size]):
            connection.send((function, rank, world_size, store, timeout, args))
        results = self._collect(world_size, timeout)
        errors = [f"rank {rank}:\n{text}" for rank, (kind, text) in sorted(results.items()) if kind != "value"]
        missing = [str(rank) for rank in range(world_size) if rank not in results]
        if missing:
            self.close()
            errors.append(f"rank {', '.join(missing)}: no answer")
        if errors:
            raise RankError("\n".join(errors))
        return [results[rank][1] for rank in range(world_size)]

    def _collect(self, world_size: int, timeout: float) -> dict[int, tuple[str, Any]]:
        results: dict[int, tuple[str, Any]] = {}
        deadline = time.monotonic() + timeout
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._workers[:world_size])}
        while waiting and time.monotonic() < deadline:
            for ready in multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic())):
                rank = waiting.pop(ready)  # type: ignore[call-overload]
                try:
                    results[rank] = ready.recv()  # type: ignore[union-attr]
                except EOFError:
                    results[rank] = ("error", "the process died")
                if results[rank][0] == "error":
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        return results

    def close(self) -> None:
        """End the processes; the next cell starts new ones."""
        for _, connection in self._workers:
            with contextlib.suppress(OSError):
                connection.send(None)
            connection.close()
        for process, _ in self._workers:
            process.join(timeout=2)
            if process.is_alive():
                process.kill()
                process.join()
        self._workers.clear()

    def remove(self) -> None:
        """End the processes for good."""
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)
