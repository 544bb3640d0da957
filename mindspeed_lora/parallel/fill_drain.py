"""The plainest pipeline schedule: every micro-batch forward, then every one backward, with blocking transfers.

Used where the library's schedules cannot be: torch below 2.9 over gloo, whose batched transfers wait for the last one only
(``torch/distributed/pipelining/schedules.py: _batch_p2p`` of 2.7 returns ``batch_isend_irecv(...).pop()``; backends that
coalesce, nccl and hccl, return one handle for all). Same numbers; it holds the activations of all micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mindspeed_lora.device import torch_version
from mindspeed_lora.parallel.collectives import receive, send
from mindspeed_lora.parallel.context import ParallelContext

if TYPE_CHECKING:
    from mindspeed_lora.parallel.pipeline import Inputs, RowLoss, Stage

OLDEST_WITH_WAITING_TRANSFERS = (2, 9)


def library_schedules_work(context: ParallelContext) -> bool:
    """Whether ``torch.distributed.pipelining`` waits for all its transfers here."""
    return context.device.type != "cpu" or torch_version() >= OLDEST_WITH_WAITING_TRANSFERS


def fill_drain(
    stages: Sequence[Stage],
    context: ParallelContext,
    ids: torch.Tensor,
    inputs: Inputs,
    micro_batch_size: int,
    loss: RowLoss,
    targets: torch.Tensor,
) -> torch.Tensor:
    """Accumulate the gradients of all micro-batches of ``ids`` ``[m * micro_batch_size, s]``.

    Returns:
        What the last stage returns, ``[m * micro_batch_size]``, on its ranks; 0 elsewhere.
    """
    group = context.pp_group
    assert group is not None
    before, behind = (context.pp_rank - 1) % context.pp_size, (context.pp_rank + 1) % context.pp_size
    losses = torch.zeros(ids.shape[0], dtype=torch.float32, device=context.device)
    done: list[tuple[Stage, torch.Tensor, torch.Tensor]] = []
    for start in range(0, ids.shape[0], micro_batch_size):
        rows = slice(start, start + micro_batch_size)
        for stage in stages:
            x = ids[rows]
            if not stage.is_first:
                shape = stage.hidden_shape(*x.shape)
                x = receive(torch.empty(shape, dtype=stage.dtype, device=context.device), before, group).requires_grad_()
            output = stage(x, **{name: tensor[rows] for name, tensor in inputs.items()})
            if stage.is_last:
                losses[rows] = output.detach()
                output = loss(output, targets[rows])
            else:
                send(output.detach(), behind, group)
            done.append((stage, x, output))
    for stage, x, output in reversed(done):
        grad = None if stage.is_last else receive(torch.empty_like(output), behind, group)
        if output.requires_grad:
            output.backward(grad)
        if not stage.is_first:
            send(torch.zeros_like(x) if x.grad is None else x.grad, before, group)
    return losses
