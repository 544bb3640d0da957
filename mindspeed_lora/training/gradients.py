"""Gradients in one flat fp32 buffer: accumulated over micro-batches, reduced once a step, measured and clipped.

Order of a step: all micro-batches' backward passes (hooks add into the buffer) -> :meth:`FlatGradients.reduce`
(TP sum of the partial range, DP sum, tied-embedding sum) -> in fp16 :meth:`FlatGradients.unscale` ->
:meth:`FlatGradients.norm` -> :meth:`FlatGradients.clip`.
The loss is divided by the global token count before backward, so that every reduction is a plain sum.

Where experts have a grid of their own there are two buffers (:class:`Gradients`): the experts' is reduced over the ranks that hold the
same experts, and its norm is summed over those that hold the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn

from mindspeed_lora.parallel.collectives import all_reduce, reduce_scatter_dim0
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.training.flat import FlatLayout, TrainedParameter, intersect

_CLIP_EPSILON = 1e-6  # Megatron's and torch's
_PIECE = 1 << 16
_ADDED = 1 << 18  # elements: 1 MiB in fp32, which a core's second-level cache holds


def norm_in_pieces(values: torch.Tensor) -> torch.Tensor:
    """L2 norm of fp32 ``[n]``, of the norms of pieces: on a CPU torch adds the squares of a vector up in one fp32 number, which is off
    by 3e-5 at some million elements and by 6e-4 at 30 million.
    """
    rows = values[: len(values) // _PIECE * _PIECE].view(-1, _PIECE)
    rest = torch.linalg.vector_norm(values[rows.numel() :])
    return torch.linalg.vector_norm(torch.cat((torch.linalg.vector_norm(rows, dim=1), rest.view(1))))


def _add(total: torch.Tensor, gradient: torch.Tensor) -> None:
    """``total += gradient``; on a CPU in pieces, where torch would make an fp32 copy of a 16-bit gradient of any size."""
    if total.device.type != "cpu" or gradient.dtype == total.dtype or gradient.numel() <= _ADDED:
        total.add_(gradient)
        return
    for part, added in zip(total.view(-1).split(_ADDED), gradient.reshape(-1).split(_ADDED), strict=True):
        part.add_(added)


def _accumulate_into(view: torch.Tensor) -> Callable[[nn.Parameter], None]:
    """A hook that adds a finished gradient into ``view`` (fp32) and frees it."""

    def hook(parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            _add(view, parameter.grad)
            parameter.grad = None

    return hook


class FlatGradients:
    """The fp32 gradients of one rank's trained parameters.

    ``own`` is what this rank's optimizer reads after :meth:`reduce`: the whole buffer, or with ``sharded`` its 1/dp.
    """

    def __init__(self, layout: FlatLayout, context: ParallelContext, sharded: bool) -> None:
        self.layout, self.context, self.sharded = layout, context, sharded and context.dp_size > 1
        self.buffer = torch.zeros(layout.size, dtype=torch.float32, device=context.device)
        self.own = torch.zeros(layout.own[1] - layout.own[0], dtype=torch.float32, device=context.device) if self.sharded else self.buffer
        for item in layout.parameters:
            item.parameter.register_post_accumulate_grad_hook(_accumulate_into(layout.view(self.buffer, item)))

    def zero(self) -> None:
        """Forget the last step's gradients."""
        self.buffer.zero_()

    def view(self, name: str) -> torch.Tensor:
        """One parameter's accumulated gradient (before :meth:`reduce`, and after it unless sharded over dp)."""
        return self.layout.view(self.buffer, next(item for item in self.layout.parameters if item.name == name))

    def reduce(self) -> None:
        """Sum over TP (partial ones), over DP, and over the two copies of a tied embedding. Collective, once per step.

        The tied sum comes after the DP sum: a sum over two is the same in either order, so both copies stay equal to the
        bit. Where the buffer is scattered, the tied range is therefore summed whole first and then sent by one rank only.
        """
        if not self.buffer.numel():
            return
        start, end = self.layout.partial
        if end > start:
            all_reduce(self.buffer[start:end], self.context.tp_group)
        if self.sharded:
            self._reduce_tied_before_scatter()
            self.own.copy_(reduce_scatter_dim0(self.buffer, self.context.dp_group))
        else:
            all_reduce(self.buffer, self.context.dp_group)
            self._reduce_tied()

    def _reduce_tied(self) -> None:
        for item in self.layout.parameters:
            if item.tied:
                all_reduce(self.layout.view(self.buffer, item), self.context.embedding_group)

    def _reduce_tied_before_scatter(self) -> None:
        tied = [self.layout.view(self.buffer, item) for item in self.layout.parameters if item.tied]
        for gradient in tied:
            all_reduce(gradient, self.context.dp_group)
        self._reduce_tied()
        for gradient in tied if self.context.dp_rank > 0 else []:
            gradient.zero_()

    def unscale(self, scale: float) -> bool:
        """Divide by the loss scale; False where a gradient of any rank is not finite. Collective over all ranks."""
        overflow = torch.zeros((), dtype=torch.float32, device=self.buffer.device)
        if self.own.numel():
            overflow += ~torch.linalg.vector_norm(self.own, math.inf).isfinite()  # the largest, and no temporary of the buffer's size
            self.own.mul_(1.0 / scale)
        for group in (self.context.dp_group, self.context.model_group):
            all_reduce(overflow, group, dist.ReduceOp.MAX)
        return not bool(overflow)

    def norm(self) -> float:
        """L2 norm over the whole model, every parameter counted once. Collective over the model group."""
        own_start = self.layout.own[0]
        total = torch.zeros((), dtype=torch.float32, device=self.buffer.device)
        for counted in self.layout.counted:
            start, end = intersect(counted, self.layout.own)
            if end > start:
                total += norm_in_pieces(self.own[start - own_start : end - own_start]).square()
        if self.sharded:
            all_reduce(total, self.context.dp_group)
        return float(all_reduce(total, self.context.model_group).sqrt())

    def clip(self, norm: float, limit: float) -> None:
        """Scale so that the norm is at most ``limit``; 0 turns clipping off."""
        if limit > 0 and norm > limit:
            self.own.mul_(limit / (norm + _CLIP_EPSILON))


class Gradients:
    """All gradients of a rank: of every grid that its parameters have copies in, one :class:`FlatGradients`."""

    def __init__(self, parts: Sequence[FlatGradients]) -> None:
        self.parts = tuple(parts)

    def zero(self) -> None:
        """Forget the last step's gradients."""
        for part in self.parts:
            part.zero()

    def views(self) -> Iterator[tuple[TrainedParameter, torch.Tensor]]:
        """Every parameter's accumulated gradient (before :meth:`reduce`)."""
        for part in self.parts:
            yield from ((item, part.layout.view(part.buffer, item)) for item in part.layout.parameters)

    def reduce(self) -> None:
        """Sum over all ranks that have a share or a copy. Collective, once per step."""
        for part in self.parts:
            part.reduce()

    def unscale(self, scale: float) -> bool:
        """Divide by the loss scale; False where a gradient of any rank is not finite. Collective over all ranks."""
        finite = [part.unscale(scale) for part in self.parts]
        return all(finite)

    def norm(self) -> float:
        """L2 norm over the whole model, every parameter counted once. Collective over all ranks that hold different ones."""
        return math.hypot(*(part.norm() for part in self.parts))

    def clip(self, norm: float, limit: float) -> None:
        """Scale so that the norm is at most ``limit``; 0 turns clipping off."""
        for part in self.parts:
            part.clip(norm, limit)
