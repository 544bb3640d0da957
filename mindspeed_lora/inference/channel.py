"""CPU message groups of a run in which one rank drives and the others follow.

```
world    all ranks                         agree on the exit code
replica  all ranks of one whole model      driver (group rank 0: tp 0, pp 0) -> workers, scores -> driver
drivers  the driver of every replica       replica 0 deals out work and collects the results
```

They are gloo groups of their own because followers wait in them while the driver does something else (prints, computes
metrics, waits for a person), longer than any timeout that should bound a collective of the model. A process that dies
closes its connections, so its peers fail at once, whatever the timeout.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from mindspeed_lora.errors import MindSpeedLoraError
from mindspeed_lora.parallel.collectives import Group, gather_objects
from mindspeed_lora.parallel.context import ParallelContext

IDLE_TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class Channels:
    """The groups this rank belongs to; None where a group would have one rank (``drivers``: also on workers)."""

    world: Group = None
    replica: Group = None
    drivers: Group = None


def open_channels(context: ParallelContext) -> Channels:
    """Make the groups. Collective: every rank of the run calls it."""
    if not dist.is_initialized() or context.world_size == 1:
        return Channels()

    def group(ranks: list[int]) -> Group:
        return dist.new_group(ranks, backend="gloo", timeout=IDLE_TIMEOUT) if len(ranks) > 1 else None

    size = context.tp_size * context.pp_size * context.dp_ranks_of_replica
    world = group(list(range(context.world_size)))
    replicas = [group(list(range(start, start + size))) for start in range(0, context.world_size, size)]
    drivers = group(list(range(0, context.world_size, size)))
    is_driver = context.speaks and context.is_first_stage
    return Channels(world, replicas[context.replica_rank], drivers if is_driver else None)


class StoppedElsewhere(MindSpeedLoraError):
    """Another rank met the error and says so; this one leaves with the same exit code and without a message."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"stopped because another rank did, with exit code {exit_code}")
        self.exit_code = exit_code


class RankDied(MindSpeedLoraError):
    """Another process of the run is gone, so that nothing more can be computed; its own message, if any, is above."""


@contextmanager
def other_ranks(who: str) -> Iterator[None]:
    """Turn what torch raises when the other end of a connection is gone into one sentence.

    Raises:
        RankDied: naming ``who``.
    """
    try:
        yield
    except RuntimeError as error:  # gloo's own type
        if not any(word in str(error) for word in ("onnection closed", "onnection reset", "roken pipe", "onnection refused")):
            raise
        line = str(error).splitlines()[0]
        reason = (line.rpartition("] ")[2] or line).partition(". ")[0]  # behind it gloo guesses at causes
        raise RankDied(f"{who} of this run has died or was ended ({reason}); see the messages above, then start the run again") from error


def agree(error: MindSpeedLoraError | None, world: Group) -> None:
    """Collective: go on only if every rank can.

    Raises:
        MindSpeedLoraError: this rank's own error, on the lowest rank that has one.
        StoppedElsewhere: on all other ranks, when any rank has one.
    """
    codes = gather_objects(None if error is None else error.exit_code, world)
    failed = [rank for rank, code in enumerate(codes) if code is not None]
    if not failed:
        return
    rank = dist.get_rank(world) if world is not None else 0
    if error is not None and rank == failed[0]:
        raise error
    # torchrun ends every rank once one has left: let the failing one speak first (the entry point makes ranks but 0 wait 3 s).
    time.sleep(1.0 if failed[0] == 0 else 4.0)
    raise StoppedElsewhere(int(str(codes[failed[0]])))
