"""Every collective and every point-to-point transfer of the package, and their autograd pairs.

| function              | forward        | backward       | used                                     |
|-----------------------|----------------|----------------|------------------------------------------|
| gather_from_sequence  | all-gather     | reduce-scatter | into a column-parallel layer, SP on      |
| scatter_to_sequence   | reduce-scatter | all-gather     | out of a row-parallel layer, SP on       |
| copy_to_tp            | identity       | all-reduce     | into a column-parallel layer, SP off     |
| reduce_from_tp        | all-reduce     | identity       | out of a row-parallel layer, SP off      |

(Rows of tokens travel to their experts and back in :mod:`mindspeed_lora.parallel.dispatch`.)

Sequences lie on dim 0 of ``[s, b, h]``. Source: Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models" (2022), section 4.2. A group of ``None`` means one rank: every function is then the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

Group = dist.ProcessGroup | None
# torch 2.13 renamed both; the old names warn there.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Pending:
    """A collective or a send that has been started: :meth:`wait` returns its result. Holds what it still reads until then."""

    def __init__(self, result: torch.Tensor, work: dist.Work | None = None, source: torch.Tensor | None = None) -> None:
        self._result, self._work, self._source = result, work, source

    def wait(self) -> torch.Tensor:
        """The result, once it is there (on a device: in stream order, without stopping the host)."""
        if self._work is not None:
            self._work.wait()
        self._work = self._source = None
        return self._result


def all_reduce(tensor: torch.Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
    """Sum (or ``op``) over the group in place; returns ``tensor``."""
    if group is not None:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def start_all_reduce(tensor: torch.Tensor, group: Group) -> Pending:
    """:func:`all_reduce` (sum) behind what follows; ``tensor`` is not to be touched before ``wait``."""
    return Pending(tensor, None if group is None else dist.all_reduce(tensor, group=group, async_op=True))


def all_gather_dim0(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """``[n, ...]`` on each rank -> ``[n * size, ...]`` in rank order."""
    return start_all_gather_dim0(tensor, group).wait()


def start_all_gather_dim0(tensor: torch.Tensor, group: Group) -> Pending:
    """:func:`all_gather_dim0` behind what follows."""
    if group is None:
        return Pending(tensor)
    output = tensor.new_empty((tensor.shape[0] * group.size(), *tensor.shape[1:]))
    source = tensor.contiguous()
    return Pending(output, _all_gather(output, source, group=group, async_op=True), source)


def reduce_scatter_dim0(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """``[n * size, ...]`` on each rank -> this rank's ``[n, ...]`` of the sum."""
    return start_reduce_scatter_dim0(tensor, group).wait()


def start_reduce_scatter_dim0(tensor: torch.Tensor, group: Group) -> Pending:
    """:func:`reduce_scatter_dim0` behind what follows."""
    if group is None:
        return Pending(tensor)
    output = tensor.new_empty((tensor.shape[0] // group.size(), *tensor.shape[1:]))
    source = tensor.contiguous()
    return Pending(output, _reduce_scatter(output, source, group=group, async_op=True), source)


def all_to_all_rows(rows: torch.Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
    """``rows`` ``[sum(sent), ...]``, the first ``sent[0]`` for the group's rank 0 and so on -> ``[sum(received), ...]``, by source."""
    output = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(output, rows.contiguous(), list(received), list(sent), group=group)
    return output


def broadcast(tensor: torch.Tensor, group_source: int, group: Group) -> torch.Tensor:
    """Overwrite ``tensor`` with the one of the group's rank ``group_source``; returns it."""
    if group is not None:
        dist.broadcast(tensor, src=dist.get_global_rank(group, group_source), group=group)
    return tensor


def broadcast_object(value: object, group_source: int, group: Group) -> object:
    """Small Python values (headers, decisions), pickled by torch between our own ranks."""
    if group is None:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=dist.get_global_rank(group, group_source), group=group)
    return holder[0]


def start_gather_into(whole: torch.Tensor, part: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Start gathering flat ``part`` of every rank into flat ``whole``, in rank order; neither is to be touched before it is waited for."""
    return _all_gather(whole, part, group=group, async_op=True)


def gather_objects(value: object, group: Group) -> list[object]:
    """Every rank's value, in rank order, on every rank."""
    if group is None:
        return [value]
    values: list[object] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def barrier(group: Group = None) -> None:
    """Wait for the group, or for the whole world when ``group`` is None and there is one."""
    if dist.is_initialized():
        dist.barrier(group=group)


def send(tensor: torch.Tensor, group_rank: int, group: dist.ProcessGroup) -> None:
    """Blocking send to the group's rank ``group_rank``."""
    dist.send(tensor.contiguous(), dst=dist.get_global_rank(group, group_rank), group=group)


def send_later(tensor: torch.Tensor, group_rank: int, group: dist.ProcessGroup) -> Pending:
    """Start a send to the group's rank ``group_rank`` and return at once."""
    tensor = tensor.contiguous()
    return Pending(tensor, dist.isend(tensor, dst=dist.get_global_rank(group, group_rank), group=group))


def receive(tensor: torch.Tensor, group_rank: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Blocking receive into ``tensor``; returns it."""
    dist.recv(tensor, src=dist.get_global_rank(group, group_rank), group=group)
    return tensor


class _GatherFromSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return all_gather_dim0(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return reduce_scatter_dim0(grad, ctx.group), None


class _ScatterToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return reduce_scatter_dim0(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_gather_dim0(grad, ctx.group), None


class _CopyToTp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce(grad.clone(memory_format=torch.contiguous_format), ctx.group), None


class _ReduceFromTp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        return all_reduce(tensor.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def gather_from_sequence(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """``[s/t, b, h]`` -> ``[s, b, h]``; backward reduce-scatters."""
    return tensor if group is None else _GatherFromSequence.apply(tensor, group)


def scatter_to_sequence(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Partial ``[s, b, h]`` -> summed ``[s/t, b, h]``; backward all-gathers."""
    return tensor if group is None else _ScatterToSequence.apply(tensor, group)


def copy_to_tp(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Identity whose backward sums over the group."""
    return tensor if group is None else _CopyToTp.apply(tensor, group)


def reduce_from_tp(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Sum over the group whose backward is the identity."""
    return tensor if group is None else _ReduceFromTp.apply(tensor, group)
