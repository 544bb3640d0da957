"""Ctrl-C: the driver finishes the order that it is in, releases its workers, and all ranks end with exit code 130.

A terminal sends SIGINT to every process of the run, and torchrun sends it once more. Workers leave it to the driver: where they stand
(in a collective, waiting for a message) they could do nothing sensible with it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from mindspeed_lora.errors import MindSpeedLoraError

if TYPE_CHECKING:
    from mindspeed_lora.inference.engine import Engine


class Interrupted(MindSpeedLoraError):
    """The user ended the run."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__("interrupted")


class Terminated(KeyboardInterrupt):
    """SIGTERM: torchrun sends it to the processes that are left once one has died."""


_KINDS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruptible(engine: Engine) -> Iterator[None]:
    """The first SIGINT raises KeyboardInterrupt, SIGTERM Terminated, where the engine is not busy, else at the end of an order.

    Further ones do nothing: torchrun sends several, and kills after 30 s.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        ignore_signals()
        engine.interruption = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
        if not engine.busy:
            raise engine.interruption

    with _handled(stop, *_KINDS):
        yield


def ignore_signals() -> None:
    """What is left to do is writing and ending; outside the main thread, where signals do not arrive, nothing changes."""
    if threading.current_thread() is threading.main_thread():
        for kind in _KINDS:
            signal.signal(kind, signal.SIG_IGN)


@contextmanager
def left_to_the_driver() -> Iterator[None]:
    """SIGINT does nothing."""
    with _handled(signal.SIG_IGN, signal.SIGINT):
        yield


@contextmanager
def _handled(handler: object, *kinds: signal.Signals) -> Iterator[None]:
    """Signals arrive in the main thread only; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {kind: signal.signal(kind, handler) for kind in kinds}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for kind, previous in before.items():
            signal.signal(kind, previous)
