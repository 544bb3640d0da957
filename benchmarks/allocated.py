"""Bytes that torch holds on the CPU, moment by moment: what ``torch.cuda.max_memory_allocated`` says on a GPU.

torch's CPU allocator reports every allocation and every release to the profiler (``profile_memory``); their running sum is the memory
held by tensors, temporaries inside operators included, but neither Python nor pages that a mapped file brought in.

    with Allocated() as allocated:
        work()
        allocated.mark("forward")
        more()
    allocated.peak, allocated.at["forward"], allocated.end
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "allocated mark: "


class Allocated:
    """Counts from zero at ``__enter__``; memory held before is not seen, but its release inside counts as negative."""

    def __init__(self) -> None:
        self._profile: Any = None
        self.peak = self.end = 0
        self.at: dict[str, int] = {}
        self.peaks: dict[str, int] = {}  # peak of the stretch that ends at a mark

    def __enter__(self) -> Allocated:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    @staticmethod
    def mark(name: str) -> None:
        """Note what is held now, as ``at[name]``, and the peak since the last mark, as ``peaks[name]``."""
        with record_function(_MARK + name):
            pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._profile.__exit__(kind, error, trace)
        events = [
            event
            for event in self._profile.profiler.kineto_results.events()
            if event.name() == "[memory]" or event.name().startswith(_MARK)
        ]
        self._profile = None
        held = stretch = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                held += event.nbytes() if event.device_type() == torch.autograd.DeviceType.CPU else 0
                stretch = max(stretch, held)
                continue
            name = event.name().removeprefix(_MARK)
            self.at[name], self.peaks[name] = held, max(stretch, self.peaks.get(name, 0))
            self.peak, stretch = max(self.peak, stretch), held
        self.peak, self.end = max(self.peak, stretch), held
