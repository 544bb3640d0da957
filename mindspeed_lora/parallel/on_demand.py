"""Frozen weights that exist whole only while their layer computes: cut over data parallelism, held in 4 bits, or both.

    at rest      own part of one flat buffer      [n / dp] in the model's dtype, or 4-bit codes and their scales
    forward      whole = gather, decode   -> compute -> free       (the next layer's gather is started meanwhile)
    backward     whole = gather, decode   -> compute -> free       (the layer's before)

A layer's linear weights are views of one flat buffer whose *storage* is emptied and filled again in place, so that whatever
autograd saved (the weight, or a view of it) is right again when backward reaches it. Between uses the parameters themselves show
one NaN expanded to their shape: code that reads a weight at rest sees NaN, not garbage. Norms and biases stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from mindspeed_lora.errors import UsageError
from mindspeed_lora.parallel.collectives import start_gather_into
from mindspeed_lora.parallel.context import ParallelContext

Rows = Callable[[int, int], torch.Tensor]
"""Rows [start, stop) of one weight of this rank, from wherever it is loaded."""


class Codec(Protocol):
    """How a stretch of the flat buffer is held. ``block``: values that are coded together; stretches are multiples of it."""

    block: int

    def holders(self, size: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
        """Flat empty tensors that hold ``size`` values; those of several ranks, one behind the other, hold all of theirs."""
        ...

    def encode(self, values: torch.Tensor, holders: Sequence[torch.Tensor], start: int) -> None:
        """Put flat ``values`` at position ``start``, both multiples of ``block``."""
        ...

    def decode(self, holders: Sequence[torch.Tensor], into: torch.Tensor) -> None:
        """All values of ``holders``, into a flat tensor."""
        ...


class Plain:
    """Values in the model's own dtype."""

    block = 1

    def holders(self, size: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
        """See the protocol."""
        return [torch.empty(size, dtype=dtype, device=device)]

    def encode(self, values: torch.Tensor, holders: Sequence[torch.Tensor], start: int) -> None:
        """See the protocol."""
        holders[0][start : start + values.numel()].copy_(values)

    def decode(self, holders: Sequence[torch.Tensor], into: torch.Tensor) -> None:
        """See the protocol."""
        if holders[0] is not into:
            into.copy_(holders[0])


class BaseStorage:
    """The layers of one stage that hold their weights on demand, in the order in which they compute.

    ``sharded``: cut over dp (one rank's part each). ``codec``: how the values are held.
    """

    def __init__(self, context: ParallelContext, codec: Codec, sharded: bool) -> None:
        self.context, self.codec = context, codec
        self.sharded = sharded and context.dp_size > 1
        self.layers: list[OnDemandLayer] = []
        self.in_backward = False

    def take(self, layer: nn.Module, weights: Sequence[nn.Parameter]) -> None:
        """Hold ``weights`` of ``layer`` on demand from here on."""
        self.layers.append(OnDemandLayer(self, len(self.layers), layer, weights))

    def holder(self, weight: torch.Tensor) -> OnDemandLayer | None:
        """The layer that holds this parameter on demand."""
        return next((layer for layer in self.layers if any(own is weight for own in layer.weights)), None)

    def neighbour(self, index: int) -> OnDemandLayer | None:
        """The layer of that number, where there is one."""
        return self.layers[index] if 0 <= index < len(self.layers) else None

    def backward_begins(self) -> None:
        """At the first layer of a backward pass: see that everything is free when autograd's engine has finished it."""
        if not self.in_backward:
            self.in_backward = True
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ends)

    def _backward_ends(self) -> None:
        self.in_backward = False
        for layer in self.layers:
            layer.backward_done()


class OnDemandLayer:
    """One layer's linear weights in a flat buffer of ``size`` elements, each weight at a multiple of the codec's block.

    This rank holds the elements [start, stop).
    """

    def __init__(self, storage: BaseStorage, index: int, layer: nn.Module, weights: Sequence[nn.Parameter]) -> None:
        self.storage, self.index, self.weights = storage, index, tuple(weights)
        block, dtype, device = storage.codec.block, self.weights[0].dtype, self.weights[0].device
        self.offsets, position = [], 0
        for weight in self.weights:
            if weight.dim() > 2 and weight[0].numel() % block:
                shape = tuple(weight.shape[1:])
                raise UsageError(f"--qlora codes {block} values together, which {shape} of an expert does not fill; leave it out")
            self.offsets.append(position)
            position += _round_up(weight.numel(), block)
        parts = storage.context.dp_size if storage.sharded else 1
        self.group = storage.context.dp_group if storage.sharded else None
        self.size = _round_up(position, block * parts)
        self.start = storage.context.dp_rank * (self.size // parts) if parts > 1 else 0
        self.stop = self.start + self.size // parts
        self.holders = storage.codec.holders(self.stop - self.start, dtype, device)
        self._nan = torch.full((1,), float("nan"), dtype=dtype, device=device)
        self._whole = torch.empty(self.size, dtype=dtype, device=device)
        self._gathering: tuple[list[torch.Tensor], list[dist.Work]] | None = None
        self._filled = True
        self._backward_pending = False
        self.free()
        layer.register_forward_pre_hook(self._before_forward)
        layer.register_forward_hook(self._after_forward)

    @torch.no_grad()
    def load(self, weight: torch.Tensor, rows: Rows, number: int = 0) -> None:
        """Take this rank's part of one matrix ``[out, in]``, of a stack that of ``number``; only the rows that hold it are asked for."""
        size, width = weight.shape[-2:].numel(), weight.shape[-1]
        offset = self.offsets[next(index for index, own in enumerate(self.weights) if own is weight)] + number * size
        first, last = max(self.start, offset), min(self.stop, offset + size)
        if last <= first:
            return
        low, high = (first - offset) // width, -(-(last - offset) // width)
        values = rows(low, high).to(device=weight.device, dtype=weight.dtype).reshape(-1)
        values = values[first - offset - low * width : last - offset - low * width]
        missing = -values.numel() % self.storage.codec.block
        values = torch.nn.functional.pad(values, (0, missing)) if missing else values.contiguous()
        self.storage.codec.encode(values, self.holders, first - self.start)

    def begin(self) -> None:
        """Start gathering, to run behind what is computed meanwhile."""
        if self._filled or self._gathering is not None or self.group is None:
            return
        wholes = [self._restored()] if isinstance(self.storage.codec, Plain) else []
        wholes = wholes or [held.new_empty(held.numel() * self.group.size()) for held in self.holders]
        works = [start_gather_into(whole, held, self.group) for whole, held in zip(wholes, self.holders, strict=True)]
        self._gathering = wholes, works

    def fill(self) -> None:
        """Have the whole weights in place."""
        if self._filled:
            return
        self.begin()
        holders, works = self._gathering or (self.holders, [])
        for work in works:
            work.wait()
        self.storage.codec.decode(holders, self._restored())
        self._gathering = None
        for weight, offset in zip(self.weights, self.offsets, strict=True):
            weight.data = self._whole[offset : offset + weight.numel()].view(weight.shape)
        self._filled = True

    def _restored(self) -> torch.Tensor:
        """The flat buffer with its memory."""
        storage, size = self._whole.untyped_storage(), self.size * self._whole.itemsize
        if storage.nbytes() != size:
            storage.resize_(size)
        return self._whole

    def free(self) -> None:
        """Give the whole weights' memory back."""
        if not self._filled:
            return
        for weight in self.weights:
            weight.data = self._nan.expand(weight.shape)
        self._whole.untyped_storage().resize_(0)
        self._filled = False

    def backward_done(self) -> None:
        """No backward pass needs the weights any more."""
        self._backward_pending = False
        self.free()

    def _before_forward(self, _layer: nn.Module, _inputs: Any) -> None:
        self.fill()
        behind = self.storage.neighbour(self.index + 1)
        if behind is not None and not self.storage.in_backward:
            behind.begin()

    def _after_forward(self, _layer: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        """Free, unless this is a recomputation for the backward pass that runs now."""
        if output.requires_grad:
            output.register_hook(self._before_backward)
        if not self._backward_pending:
            self.free()

    def _before_backward(self, _grad: torch.Tensor) -> None:
        """The output's gradient is there: the layer behind is done with, this one computes, the one before comes next."""
        self.storage.backward_begins()
        behind, before = self.storage.neighbour(self.index + 1), self.storage.neighbour(self.index - 1)
        if behind is not None:
            behind.backward_done()
        self._backward_pending = True
        self.fill()
        if before is not None:
            before.begin()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
