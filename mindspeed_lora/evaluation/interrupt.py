"""Ctrl-C, and the SIGTERM that torchrun passes on, end the scoring; the results so far are then written undisturbed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM: torchrun sends it to the processes that are left once one has died."""


KINDS = (signal.SIGINT, signal.SIGTERM)


def ignore_signals() -> None:
    """What is left to do is writing; outside the main thread, where signals do not arrive, nothing changes."""
    if threading.current_thread() is threading.main_thread():
        for kind in KINDS:
            signal.signal(kind, signal.SIG_IGN)


@contextmanager
def interruptible() -> Iterator[None]:
    """The first SIGINT raises KeyboardInterrupt, SIGTERM Terminated; further ones do nothing: torchrun sends several, and kills after 30 s.

    Outside the main thread, where signals do not arrive, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        ignore_signals()
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    before = {kind: signal.signal(kind, stop) for kind in KINDS}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
