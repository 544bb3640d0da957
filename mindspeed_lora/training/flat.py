"""One flat tensor for all trained parameters of a rank, ordered so that every later step works on contiguous ranges.

::

    | no decay: cut | whole | partial | decay: partial | whole | cut | padding to a multiple of dp |
                    '------ replicated over TP ------------------'
                            '--- summed over TP -----'

"cut": each TP rank holds another part; "whole": every TP rank computes the same gradient; "partial": every TP rank
computes a share of the gradient (``grad_sum`` of the weight table). Weight decay skips one-dimensional parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mindspeed_lora.parallel.context import ParallelContext

Range = tuple[int, int]


@dataclass(frozen=True)
class TrainedParameter:
    """A trained parameter and what the reductions must know of it.

    ``cut``: over TP. ``partial``: its gradient is a share, to be summed over TP. ``counted``: False for the second
    copy of a tied embedding, which the gradient norm leaves out. ``tied``: one of the two copies. ``of_expert``: its copies lie in the
    experts' grid.
    """

    name: str
    parameter: nn.Parameter
    cut: bool = False
    partial: bool = False
    counted: bool = True
    tied: bool = False
    of_expert: bool = False

    @property
    def decays(self) -> bool:
        """Whether weight decay applies."""
        return self.parameter.dim() > 1

    @property
    def section(self) -> int:
        """Place in the order above, 0..5."""
        place = 0 if self.cut else (2 if self.partial else 1)
        return 5 - place if self.decays else place


def intersect(one: Range, other: Range) -> Range:
    """The common part of two half-open ranges (empty: start == end)."""
    start = max(one[0], other[0])
    return start, max(start, min(one[1], other[1]))


def _merged(ranges: Iterable[Range]) -> list[Range]:
    """Sorted, adjacent ones joined, empty ones left out."""
    joined: list[Range] = []
    for start, end in sorted(ranges):
        if start == end:
            continue
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def by_grid(parameters: Sequence[TrainedParameter], context: ParallelContext) -> list[tuple[list[TrainedParameter], ParallelContext]]:
    """Parameters with the context that says who holds their copies: all together, or dense ones and, with a grid of their own, experts'."""
    if context.expert_grid is None:
        return [(list(parameters), context)]
    dense = [item for item in parameters if not item.of_expert]
    return [(dense, context), ([item for item in parameters if item.of_expert], context.for_experts())]


class FlatLayout:
    """Where each parameter lies in the flat tensor. Sizes are in elements.

    Args:
        parameters: this rank's trained parameters, in any order; the same set on all its dp peers.
        context: decides padding (dp size), this rank's shard, and who counts the replicated ones (tp rank 0).
        sharded: cut optimizer work over dp (ZeRO-1).
    """

    def __init__(self, parameters: Sequence[TrainedParameter], context: ParallelContext, sharded: bool) -> None:
        self.parameters = tuple(sorted(parameters, key=lambda item: item.section))  # stable: named order inside a section
        self.ranges: dict[str, Range] = {}
        position = 0
        for item in self.parameters:
            self.ranges[item.name] = (position, position + item.parameter.numel())
            position += item.parameter.numel()
        if len(self.ranges) != len(self.parameters):
            raise ValueError("two trained parameters have one name")
        self.used = position
        parts = context.dp_size if sharded else 1
        self.size = -(-position // parts) * parts
        shard = self.size // parts
        self.own: Range = (context.dp_rank * shard, (context.dp_rank + 1) * shard) if parts > 1 else (0, self.size)
        self.partial = self._span(item for item in self.parameters if item.partial)
        self.decay_start = min((self.ranges[item.name][0] for item in self.parameters if item.decays), default=position)
        self.counted = _merged(self.ranges[item.name] for item in self.parameters if item.counted and (item.cut or context.tp_rank == 0))

    def _span(self, items: Iterable[TrainedParameter]) -> Range:
        spans = _merged(self.ranges[item.name] for item in items)
        if len(spans) > 1:
            raise AssertionError(f"not contiguous: {spans}")
        return spans[0] if spans else (0, 0)

    def view(self, flat: torch.Tensor, item: TrainedParameter) -> torch.Tensor:
        """``item``'s part of a whole flat tensor, in the parameter's shape."""
        start, end = self.ranges[item.name]
        return flat[start:end].view(item.parameter.shape)

    def flatten_parameters(self) -> torch.Tensor:
        """Move all parameters into one new flat tensor (``parameter.data`` becomes a view of it) and return it.

        Raises:
            ValueError: parameters of different dtypes or devices.
        """
        kinds = {(item.parameter.dtype, item.parameter.device) for item in self.parameters}
        if len(kinds) > 1:
            raise ValueError(f"trained parameters differ in dtype or device: {sorted(map(str, kinds))}")
        dtype, device = kinds.pop() if kinds else (torch.float32, torch.device("cpu"))
        flat = torch.zeros(self.size, dtype=dtype, device=device)
        for item in self.parameters:
            view = self.view(flat, item)
            view.copy_(item.parameter.detach())
            item.parameter.data = view
        return flat
