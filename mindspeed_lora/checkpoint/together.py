"""Steps that every rank takes, of which one may fail: then all of them stop, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mindspeed_lora.errors import CheckpointError, MindSpeedLoraError
from mindspeed_lora.parallel.collectives import gather_objects
from mindspeed_lora.parallel.context import ParallelContext

T = TypeVar("T")


def gather_from_all(value: T, context: ParallelContext) -> list[T]:
    """One small value of each rank, on every rank, in rank order."""
    replica = gather_objects(value, context.model_group)
    return [item for items in gather_objects(replica, context.dp_group) for item in items]  # type: ignore[attr-defined]


def together(context: ParallelContext, step: Callable[[], T], what: str) -> list[T]:
    """Run ``step`` here and wait for the others; returns every rank's result in rank order.

    Raises:
        CheckpointError: ``step`` failed on some rank (an own error of this package or the system's); every rank raises.
    """
    result, failure, message = None, None, None
    try:
        result = step()
    except (MindSpeedLoraError, OSError, RuntimeError) as error:
        failure, message = error, f"rank {context.rank}: {error or type(error).__name__}"
    outcomes = gather_from_all((message, result), context)
    messages = [text for text, _ in outcomes if text]
    if messages:
        raise CheckpointError(f"{what} failed: {'; '.join(messages)}") from failure
    return [value for _, value in outcomes]  # type: ignore[misc]
