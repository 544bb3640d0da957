"""AdamW over flat fp32 masters; with ``--use-distributed-optimizer`` each dp rank owns 1/dp of them (flat ZeRO-1).

Per trained parameter: weight in the model's dtype, fp32 master (the weight itself where that is fp32), two fp32
moments. Sharded, masters and moments are cut over dp: gradients arrive by reduce-scatter, weights return by
all-gather. Both ways compute the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch

from mindspeed_lora.arguments.configs import OptimizerFlags
from mindspeed_lora.parallel.collectives import all_gather_dim0, start_gather_into
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.training.flat import FlatLayout, TrainedParameter, by_grid, intersect
from mindspeed_lora.training.gradients import FlatGradients, Gradients

STATE_NAMES = ("master", "exp_avg", "exp_avg_sq")
_CHUNK = 1 << 24  # elements handled at once: bounds AdamW's temporaries and the transfers of a gathered state


@dataclass(frozen=True)
class Room:
    """Memory for a rank's states whole over dp: ``whole`` ``[kinds, dp, own]`` on dp rank 0's host, ``piece`` on the device; fp32."""

    whole: torch.Tensor
    piece: torch.Tensor


class FlatAdamW:
    """AdamW (decoupled weight decay, none on one-dimensional parameters) on one rank's flat range.

    Args:
        layout: built with ``sharded`` equal to ``flags.use_distributed_optimizer``.
        gradients: its ``own`` buffer is read in every :meth:`step`.
    """

    def __init__(
        self, layout: FlatLayout, flat: torch.Tensor, gradients: FlatGradients, flags: OptimizerFlags, context: ParallelContext
    ) -> None:
        self.layout, self.flat, self.context = layout, flat, context
        self.sharded = gradients.sharded
        own = flat[layout.own[0] : layout.own[1]]
        self._aliased = flat.dtype == torch.float32
        self.state = {
            "master": own if self._aliased else own.float(),
            "exp_avg": torch.zeros_like(own, dtype=torch.float32),
            "exp_avg_sq": torch.zeros_like(own, dtype=torch.float32),
        }
        self._adam = self._build(gradients.own, flags)

    def _build(self, gradient: torch.Tensor, flags: OptimizerFlags) -> torch.optim.AdamW:
        start, end = self.layout.own
        split = min(max(self.layout.decay_start, start), end)
        groups, state = [], {}
        fused = self.flat.device.type in ("cpu", "cuda")
        for (low, high), decay in (((start, split), 0.0), ((split, end), flags.weight_decay)):
            chunks = []
            for position in range(low, high, _CHUNK):
                part = slice(position - start, min(position + _CHUNK, high) - start)
                chunk = self.state["master"][part].detach().requires_grad_()
                chunk.grad = gradient[part]
                step = torch.zeros((), dtype=torch.float32, device=self.flat.device if fused else "cpu")
                state[chunk] = {"step": step, "exp_avg": self.state["exp_avg"][part], "exp_avg_sq": self.state["exp_avg_sq"][part]}
                chunks.append(chunk)
            if chunks:
                groups.append({"params": chunks, "weight_decay": decay})
        if not groups:  # a stage may train nothing
            groups = [{"params": [torch.zeros(0, device=self.flat.device, requires_grad=True)], "weight_decay": 0.0}]
        betas = (flags.adam_beta1, flags.adam_beta2)
        adam = torch.optim.AdamW(groups, lr=flags.lr, betas=betas, eps=flags.adam_eps, foreach=False, fused=fused)
        adam.state.update(state)
        return adam

    def step(self, lr: float) -> None:
        """Update masters with ``gradients.own`` at rate ``lr``, then the weights. Collective over dp where sharded."""
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Write the masters into the model's weights (all-gathered over dp where sharded)."""
        own = self.flat[self.layout.own[0] : self.layout.own[1]]
        if not self._aliased:
            own.copy_(self.state["master"])
        if self.sharded and self.flat.numel():
            self.flat.copy_(all_gather_dim0(own, self.context.dp_group))

    def set_steps(self, steps: int) -> None:
        """Continue at ``steps`` updates (Adam's bias correction)."""
        for entry in self._adam.state.values():
            entry["step"].fill_(steps)

    @property
    def items(self) -> tuple[TrainedParameter, ...]:
        """The trained parameters in flat order."""
        return self.layout.parameters

    def make_room(self) -> Room:
        """What :meth:`gather` fills; taken apart from it, because a rank that failed between collectives would leave its peers waiting."""
        own, size = self.state["master"], self.context.dp_size
        length = own.numel() if self.sharded else 0
        kinds = len(STATE_NAMES) if self.context.dp_rank == 0 else 0
        return Room(torch.empty(kinds, size, length), torch.empty(size * min(length, _CHUNK), device=own.device))

    def gather(self, room: Room) -> None:
        """Make the states whole over dp in ``room``. Collective over dp where sharded, and nothing else."""
        group, size = self.context.dp_group, self.context.dp_size
        if not self.sharded or group is None:
            return
        for number, kind in enumerate(STATE_NAMES):
            for position, part in zip(count(0, _CHUNK), self.state[kind].detach().split(_CHUNK)):
                piece = room.piece[: size * part.numel()]
                start_gather_into(piece, part, group).wait()
                if self.context.dp_rank == 0:
                    room.whole[number, :, position : position + _CHUNK] = piece.view(size, -1)

    def export(self, kind: str, room: Room) -> Iterator[tuple[TrainedParameter, torch.Tensor]]:
        """This rank's tp shard of one state (of :data:`STATE_NAMES`) per parameter, fp32 on the CPU, whole over dp, after :meth:`gather`.

        Yields nothing on dp ranks other than 0.
        """
        if self.context.dp_rank == 0:
            whole = room.whole[STATE_NAMES.index(kind)].flatten() if self.sharded else self.state[kind].detach().cpu()
            for item in self.layout.parameters:
                yield item, self.layout.view(whole, item)

    @torch.no_grad()
    def restore(self, kind: str, fetch: Callable[[TrainedParameter], torch.Tensor]) -> None:
        """Overwrite one state with ``fetch(parameter)`` (this rank's tp shard, whole over dp, any device). Not collective."""
        start = self.layout.own[0]
        for item in self.layout.parameters:
            span = self.layout.ranges[item.name]
            low, high = intersect(span, self.layout.own)
            if high > low:
                values = fetch(item).reshape(-1)[low - span[0] : high - span[0]]
                self.state[kind][low - start : high - start].copy_(values)


class Optimizer:
    """All of a rank's updates: one :class:`FlatAdamW` for each of :class:`~mindspeed_lora.training.gradients.Gradients`' parts."""

    kinds: tuple[str, ...] = STATE_NAMES

    def __init__(self, parts: Sequence[FlatAdamW]) -> None:
        self.parts = tuple(parts)

    @property
    def items(self) -> list[TrainedParameter]:
        """The trained parameters."""
        return [item for part in self.parts for item in part.items]

    def step(self, lr: float) -> None:
        """See :meth:`FlatAdamW.step`."""
        for part in self.parts:
            part.step(lr)

    def publish(self) -> None:
        """See :meth:`FlatAdamW.publish`."""
        for part in self.parts:
            part.publish()

    def set_steps(self, steps: int) -> None:
        """Continue at ``steps`` updates."""
        for part in self.parts:
            part.set_steps(steps)

    def make_room(self) -> list[Room]:
        """See :meth:`FlatAdamW.make_room`."""
        return [part.make_room() for part in self.parts]

    def gather(self, room: list[Room]) -> None:
        """See :meth:`FlatAdamW.gather`."""
        for part, own in zip(self.parts, room, strict=True):
            part.gather(own)

    def export(self, kind: str, room: list[Room]) -> Iterator[tuple[TrainedParameter, torch.Tensor]]:
        """See :meth:`FlatAdamW.export`."""
        for part, own in zip(self.parts, room, strict=True):
            yield from part.export(kind, own)

    def restore(self, kind: str, fetch: Callable[[TrainedParameter], torch.Tensor]) -> None:
        """See :meth:`FlatAdamW.restore`."""
        for part in self.parts:
            part.restore(kind, fetch)


def build_updates(trained: Sequence[TrainedParameter], context: ParallelContext, flags: OptimizerFlags) -> tuple[Gradients, Optimizer]:
    """Flat buffers and optimizer of this rank's parameters; their data moves into the buffers."""
    gradients, optimizers = [], []
    sharded = flags.use_distributed_optimizer
    for items, own in by_grid(trained, context):
        layout = FlatLayout(items, own, sharded)
        flat = layout.flatten_parameters()
        gradients.append(FlatGradients(layout, own, sharded))
        optimizers.append(FlatAdamW(layout, flat, gradients[-1], flags, own))
    return Gradients(gradients), Optimizer(optimizers)


def optimizer_bytes(trained: int, own: int, parameter_bytes: int) -> dict[str, int]:
    """Bytes per device beside the weights: ``trained`` elements here, ``own`` of them updated here."""
    masters = 0 if parameter_bytes == 4 else 4 * own
    shard = 4 * own if own != trained else 0
    return {"gradients (fp32)": 4 * trained + shard, "masters and moments (fp32)": masters + 8 * own}
