"""Runs a global batch through the stages: 1F1B, interleaved 1F1B, or plain accumulation on one stage.

The schedules are ``torch.distributed.pipelining``'s, with static metadata: shapes are known before the step, so a step of
another padded length only builds a new (cheap) stage and schedule object. The last stage returns losses, never logits.
A batch whose micro-batches no single schedule takes (fewer than stages, a remainder for the interleaved schedule, or
receive buffers beyond the budget) is split over several calls; gradients accumulate over them exactly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.profiler import record_function

from mindspeed_lora.device import total_memory_bytes
from mindspeed_lora.parallel.collectives import all_reduce, receive, send
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.parallel.fill_drain import fill_drain, library_schedules_work

Inputs = dict[str, torch.Tensor]
"""Keyword inputs of a stage, each with one entry a row on dim 0, where the schedules cut them into micro-batches."""


RowLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The loss of a micro-batch from its rows' losses float32 ``[b]`` and what is known of each row ``[b, ...]`` (its targets)."""


def sum_of_rows(losses: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The rows' weights say everything: the loss is the sum."""
    return losses.sum()


class Stage(Protocol):
    """What the runner needs of a stage (see :class:`mindspeed_lora.model.stage.GPTStage`)."""

    is_first: bool
    is_last: bool
    dtype: torch.dtype

    def hidden_shape(self, batch: int, length: int) -> tuple[int, int, int]:
        """Shape of what stages pass on."""
        ...

    def __call__(self, x: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """See :meth:`mindspeed_lora.model.stage.GPTStage.forward`."""
        ...


def split_micro_batches(num_micro_batches: int, pp_size: int, num_chunks: int, largest: int) -> list[int]:
    """Sizes of the calls that make up ``num_micro_batches``, each one that the schedule accepts and at most ``largest``.

    The interleaved schedule wants ``n % max(1, n // pp) == 0``; 1F1B takes any n >= pp (fewer go through GPipe's).
    """
    sizes = []
    left = num_micro_batches
    while left:
        size = min(left, max(largest, 1))
        if num_chunks > 1:
            while size % max(1, size // pp_size):
                size -= 1
        sizes.append(size)
        left -= size
    return sizes


def bubble_fraction(num_micro_batches: int, pp_size: int, num_chunks: int = 1) -> float:
    """Idle share of a pipeline step: (p - 1) / (m v + p - 1)."""
    return (pp_size - 1) / (num_micro_batches * num_chunks + pp_size - 1)


def _stage_inputs(labels: torch.Tensor, row_weights: torch.Tensor, **more: torch.Tensor | None) -> Inputs:
    return {"labels": labels, "row_weights": row_weights, **{name: tensor for name, tensor in more.items() if tensor is not None}}


def _take(inputs: Inputs, rows: slice, columns: int | None = None) -> Inputs:
    """The rows' inputs, for the first ``columns`` positions of them."""
    taken = {name: tensor[rows] for name, tensor in inputs.items()}
    if columns is not None:
        for name in taken.keys() & {"labels", "token_shares"}:
            taken[name] = taken[name][:, :columns]
        if "document_ends" in taken:
            taken["document_ends"] = taken["document_ends"].clamp(max=columns)
    return taken


class PipelineRunner:
    """Forward and backward over this rank's stages.

    ``buffer_fraction`` of the smallest device's memory bounds the receive buffers of one schedule call. ``loss`` makes the
    micro-batch's loss from its rows'. ``loss_scale`` multiplies it before every backward pass, for fp16. Collective over the replica when
    made.
    """

    def __init__(
        self, stages: Sequence[Stage], context: ParallelContext, buffer_fraction: float = 0.05, loss: RowLoss = sum_of_rows
    ) -> None:
        self.stages, self.context, self.loss = list(stages), context, loss
        self.loss_scale = 1.0
        memory = torch.tensor(float(total_memory_bytes(context.device)), dtype=torch.float32, device=context.device)
        for group in (context.model_group, context.experts.ep_group):  # all ranks that work together must cut a step alike
            all_reduce(memory, group, dist.ReduceOp.MIN)
        self._budget_bytes = buffer_fraction * float(memory)
        self._key: tuple[int, int, int] | None = None
        self._schedule: Any = None
        self._rows: list[torch.Tensor] = []  # of the micro-batches of the call under way

    def largest_call(self, micro_batch_size: int, length: int) -> int:
        """Micro-batches whose receive buffers (activation and gradient, of all at once) fit the budget; a multiple of pp."""
        stage = self.stages[0]
        shape = stage.hidden_shape(micro_batch_size, length)
        each = 2 * len(self.stages) * shape[0] * shape[1] * shape[2] * stage.dtype.itemsize
        pp_size = self.context.pp_size
        return max(pp_size, int(self._budget_bytes // each) // pp_size * pp_size)

    def forward_backward(
        self,
        ids: torch.Tensor,
        labels: torch.Tensor,
        row_weights: torch.Tensor,
        micro_batch_size: int,
        document_ends: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        columns: Sequence[int] | None = None,
        token_shares: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Accumulate gradients of the loss (times ``loss_scale``) over the replica's rows: by default of ``sum(row_weights * -log p)``.

        Args:
            ids, labels: int64 ``[m * micro_batch_size, s]`` on the device, on every rank of the replica.
            row_weights: float32 ``[m * micro_batch_size]``.
            document_ends: int32 CPU ``[m * micro_batch_size, documents]``, see the stage; None: a row is one document.
            targets: float32 ``[m * micro_batch_size, ...]``, for the loss; only the last stage's are used.
            columns: of each micro-batch, how many of its s columns hold all its tokens; the others are left out where the schedule
                takes micro-batches of different lengths (on one stage).
            token_shares: float32 ``[m * micro_batch_size, s]``, for losses inside the stages (see the stage); None: there are none.

        Returns:
            The rows' losses (weighted sums of -log p) float32 ``[m * micro_batch_size]`` on the last stage, 0 elsewhere.
        """
        shares = None if token_shares is None else token_shares * self.loss_scale
        inputs = _stage_inputs(labels, row_weights, document_ends=document_ends, token_shares=shares)
        targets = row_weights if targets is None else targets
        if self.context.pp_size == 1:
            return self._accumulate(ids, inputs, targets, micro_batch_size, columns)
        if not library_schedules_work(self.context):
            return fill_drain(self.stages, self.context, ids, inputs, micro_batch_size, self._scaled_loss, targets)
        losses = []
        start = 0
        num_micro_batches = ids.shape[0] // micro_batch_size
        largest = self.largest_call(micro_batch_size, self._longest(ids.shape[1]))
        for size in split_micro_batches(num_micro_batches, self.context.pp_size, len(self.stages), largest):
            rows = slice(start, start + size * micro_batch_size)
            start = rows.stop
            losses.append(self._step(ids[rows], _take(inputs, rows), targets[rows], micro_batch_size, size))
        return torch.cat(losses)

    def _longest(self, length: int) -> int:
        """Padded tokens of a row, the most of any replica that this one exchanges rows of experts with: they take turns alike."""
        group = self.context.experts.ep_group
        if group is None:
            return length
        return int(all_reduce(torch.tensor(length, device=self.context.device), group, dist.ReduceOp.MAX))

    def _scaled_loss(self, losses: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.loss(losses, targets) * self.loss_scale

    def _accumulate(
        self, ids: torch.Tensor, inputs: Inputs, targets: torch.Tensor, micro_batch_size: int, columns: Sequence[int] | None
    ) -> torch.Tensor:
        losses = []
        for number, start in enumerate(range(0, ids.shape[0], micro_batch_size)):
            rows = slice(start, start + micro_batch_size)
            used = ids.shape[1] if columns is None else columns[number]
            with record_function("forward"):
                output = self.stages[0](ids[rows, :used], **_take(inputs, rows, used))
            with record_function("backward"):
                self._scaled_loss(output, targets[rows]).backward()
            losses.append(output.detach())
        return torch.cat(losses)

    def _step(self, ids: torch.Tensor, inputs: Inputs, targets: torch.Tensor, micro_batch_size: int, size: int) -> torch.Tensor:
        key = (size, micro_batch_size, ids.shape[1])
        if key != self._key:
            self._schedule = None  # free the old receive buffers before making new ones
            self._schedule, self._key = self._build(*key), key
        arguments = (ids,) if self.stages[0].is_first else ()
        keywords: dict[str, Any] = dict(inputs)
        if self.stages[-1].is_last:
            keywords["target"] = targets
        if "return_outputs" in inspect.signature(self._schedule.step).parameters:
            keywords["return_outputs"] = False
        self._rows = []
        self._schedule.step(*arguments, **keywords)
        return torch.cat(self._rows) if self._rows else torch.zeros(ids.shape[0], dtype=torch.float32, device=self.context.device)

    def _build(self, size: int, micro_batch_size: int, length: int) -> Any:
        """Stage and schedule objects for ``size`` micro-batches of ``[micro_batch_size, length]``."""
        context = self.context
        num_stages = context.pp_size * len(self.stages)
        pipeline_stages: list[Any] = []
        for index, stage in enumerate(self.stages):
            hidden = torch.empty(stage.hidden_shape(micro_batch_size, length), dtype=stage.dtype, device="meta")
            ids = torch.empty((micro_batch_size, length), dtype=torch.int64, device="meta")
            losses = torch.empty((micro_batch_size,), dtype=torch.float32, device="meta")
            pipeline_stages.append(
                PipelineStage(
                    stage,  # type: ignore[arg-type]
                    stage_index=index * context.pp_size + context.pp_rank,
                    num_stages=num_stages,
                    device=context.device,
                    input_args=ids if stage.is_first else hidden.requires_grad_(),
                    output_args=losses.requires_grad_() if stage.is_last else hidden.detach().requires_grad_(),
                    group=context.pp_group,
                )
            )

        def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            self._rows.append(output.detach())  # the schedules take a stage's micro-batches in order
            return self._scaled_loss(output, target)

        if len(pipeline_stages) > 1:
            return ScheduleInterleaved1F1B(pipeline_stages, size, loss_fn=loss_of, scale_grads=False)
        schedule = Schedule1F1B if size >= context.pp_size else ScheduleGPipe
        return schedule(pipeline_stages[0], size, loss_fn=loss_of, scale_grads=False)

    @torch.no_grad()
    def row_losses(
        self,
        ids: torch.Tensor,
        labels: torch.Tensor,
        row_weights: torch.Tensor,
        micro_batch_size: int,
        document_ends: torch.Tensor | None = None,
        columns: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """What :meth:`forward_backward` returns, without gradients."""
        inputs = _stage_inputs(labels, row_weights, document_ends=document_ends)
        losses = torch.zeros(ids.shape[0], dtype=torch.float32, device=self.context.device)
        for number, start in enumerate(range(0, ids.shape[0], micro_batch_size)):
            rows = slice(start, start + micro_batch_size)
            used = ids.shape[1] if columns is None else columns[number]
            output = forward_through_stages(self.stages, self.context, ids[rows, :used], **_take(inputs, rows, used))
            if output is not None:
                losses[rows] = output
        return losses


def forward_through_stages(stages: Sequence[Stage], context: ParallelContext, ids: torch.Tensor, **keywords: Any) -> torch.Tensor | None:
    """One forward pass of one micro-batch ``[b, s]`` through all stages of the replica, without gradients.

    Every rank of the replica calls it with the same ids; ``keywords`` go to each stage.

    Returns:
        What the last stage returns, on the last stage's ranks; None elsewhere.
    """
    pp_size, pp_rank = context.pp_size, context.pp_rank
    output: torch.Tensor | None = None
    for stage in stages:
        if stage.is_first:
            x = ids
        else:
            x = torch.empty(stage.hidden_shape(ids.shape[0], ids.shape[1]), dtype=stage.dtype, device=context.device)
            assert context.pp_group is not None
            receive(x, (pp_rank - 1) % pp_size, context.pp_group)
        output = stage(x, **keywords)
        if not stage.is_last:
            assert context.pp_group is not None
            send(output, (pp_rank + 1) % pp_size, context.pp_group)
            output = None
    return output
