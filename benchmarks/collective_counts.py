"""Counts what the package sends between tensor-parallel ranks: for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from mindspeed_lora.parallel import collectives

Calls = list[tuple[str, int]]
"""(kind, bytes of this rank's input) of each collective, in order."""


class counted:
    """``with counted() as calls:`` records every all-reduce, all-gather and reduce-scatter that torch.distributed is asked for."""

    def __enter__(self) -> Calls:
        self.calls: Calls = []
        self.saved: list[tuple[ModuleType, str, Callable[..., Any]]] = []
        targets = (
            (torch.distributed, "all_reduce", "all_reduce", 0),
            (collectives, "_all_gather", "all_gather", 1),
            (collectives, "_reduce_scatter", "reduce_scatter", 1),
        )
        for module, name, kind, sent in targets:
            original = getattr(module, name)
            self.saved.append((module, name, original))
            setattr(module, name, self._wrap(kind, sent, original))
        return self.calls

    def _wrap(self, kind: str, sent: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*tensors: torch.Tensor, **options: Any) -> Any:
            self.calls.append((kind, tensors[sent].numel() * tensors[sent].element_size()))
            return original(*tensors, **options)

        return wrapped

    def __exit__(self, *_exc: object) -> None:
        for module, name, original in reversed(self.saved):
            setattr(module, name, original)
