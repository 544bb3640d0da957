"""Rows of tokens travel to the ranks that hold their experts, and the results travel back, over the EP group.

::

    rows [m, h], sorted by global expert = by EP rank
      counts [E] of every rank -> how many rows go where           (one small gather, one wait for the device)
      all-to-all -> rows [m', h] by (source, local expert) -> sorted by (local expert, source)
      ... experts ...
      the same way back: each rank has the results of its rows, in the order it sent them

m' is whatever the router decides, also 0: every rank takes part in every exchange, with or without rows. No token is dropped, none is
padded. Each way is the other's backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_lora.ops.grouped import RowGroups
from mindspeed_lora.parallel.collectives import all_gather_dim0, all_to_all_rows


@dataclass(frozen=True, eq=False)
class Exchange:
    """One dispatch, as one rank sees it.

    ``sent``, ``received``: rows to and from each EP rank. ``order`` int64 ``[m']``: where the rows, sorted by local expert, lie among
    those that arrived; ``back`` is its inverse. ``groups``: rows of each local expert.
    """

    group: dist.ProcessGroup
    sent: tuple[int, ...]
    received: tuple[int, ...]
    order: torch.Tensor
    back: torch.Tensor
    groups: RowGroups


def plan_exchange(counts: torch.Tensor, group: dist.ProcessGroup) -> Exchange:
    """``counts`` int64 ``[E]``: this rank's rows for each expert of the model. Collective over the EP group."""
    size = group.size()
    every = all_gather_dim0(counts.view(1, -1), group).view(size, size, -1)  # [source, EP rank, local expert]
    arriving = every[:, group.rank()]
    sent, received = torch.stack((counts.view(size, -1).sum(-1), arriving.sum(-1))).tolist()
    local = torch.arange(arriving.shape[1], device=counts.device).repeat(size)
    order = local.repeat_interleave(arriving.flatten(), output_size=sum(received)).argsort(stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return Exchange(group, tuple(sent), tuple(received), order, back, RowGroups(arriving.sum(0)))


def _there(rows: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    return all_to_all_rows(rows, exchange.sent, exchange.received, exchange.group).index_select(0, exchange.order)


def _back(rows: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    return all_to_all_rows(rows.index_select(0, exchange.back), exchange.received, exchange.sent, exchange.group)


class _ToExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        ctx.exchange = exchange
        return _there(rows, exchange)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _back(grad, ctx.exchange), None


class _FromExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        ctx.exchange = exchange
        return _back(rows, exchange)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _there(grad, ctx.exchange), None


def to_experts(rows: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    """``[m, h]`` sorted by expert -> ``[m', h]``, everybody's rows for this rank's experts, sorted by expert."""
    return _ToExperts.apply(rows, exchange)


def from_experts(rows: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    """``[m', h]`` -> ``[m, h]``: the results of the rows that this rank sent, in its order."""
    return _FromExperts.apply(rows, exchange)
