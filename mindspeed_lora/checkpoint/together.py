"""Steps that every rank takes, of which one may fail: then all of them stop, with the reason.

A step holds no collective: a rank that fails between two collectives cannot tell the others, which wait in the second. What needs them
stands outside, with nothing in it that may fail (memory is taken before), between two steps::

    step: memory, files      collectives only      step: memory, files      ...
                       agree                                          agree
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from mindspeed_lora.errors import CheckpointError, MindSpeedLoraError
from mindspeed_lora.parallel.collectives import gather_objects
from mindspeed_lora.parallel.context import ParallelContext

T = TypeVar("T")


def gather_from_all(value: T, context: ParallelContext) -> list[T]:
    """One small value of each rank, on every rank, in rank order."""
    replica = gather_objects(value, context.model_group)
    return [item for items in gather_objects(replica, context.dp_group) for item in items]  # type: ignore[attr-defined]


@contextmanager
def together(context: ParallelContext, what: str) -> Iterator[None]:
    """Run the block here, which holds no collective, and wait for the others.

    Raises:
        CheckpointError: the block failed on some rank (an own error of this package or the system's); every rank raises.
    """
    failure, message = None, None
    try:
        yield
    except (MindSpeedLoraError, OSError, RuntimeError, MemoryError) as error:
        failure, message = error, f"rank {context.rank}: {str(error) or type(error).__name__}"
    messages = [text for text in gather_from_all(message, context) if text]
    if messages:
        raise CheckpointError(f"{what} failed: {'; '.join(messages)}") from failure
