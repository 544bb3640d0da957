"""Rows sorted by expert, and back: each token is read where it lies, and its results are added up where they lie.

::

    tokens [n, h]  --permute-->    rows [n k, h], those of expert 0 first     rows[i] = tokens[token of i]
    rows [n k, h]  --unpermute-->  tokens [n, h]                              tokens[t] = sum_j w[t, j] rows[place[t, j]]

Each is the other's backward (with weights 1). Nothing of ``[n, k, h]`` in the tokens' order is made where the device has a kernel
that adds rows as it gathers them, and no gradient is scattered: sums have one order, so that a run repeats bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from mindspeed_lora.ops.grouped import RowGroups


@dataclass(frozen=True, eq=False)
class RowOrder:
    """Where the k rows of each of n tokens lie, once sorted by expert.

    ``slots`` int64 ``[n k]``: of each row, ``token * k + choice``. ``place`` int64 ``[n, k]``: the row of each choice.
    """

    slots: torch.Tensor
    place: torch.Tensor
    groups: RowGroups

    @property
    def tokens(self) -> torch.Tensor:
        """int64 ``[n k]``: the token of each row."""
        top_k = self.place.shape[1]
        return self.slots if top_k == 1 else self.slots // top_k


def sort_by_expert(experts: torch.Tensor, count: int) -> RowOrder:
    """experts int64 ``[n, k]`` with numbers under ``count``; the rows of an expert keep the tokens' order."""
    flat = experts.flatten()
    slots = flat.argsort(stable=True)
    place = torch.empty_like(slots).scatter_(0, slots, torch.arange(len(slots), device=slots.device))
    counts = flat.new_zeros(count).scatter_add_(0, flat, torch.ones_like(flat))  # bincount would wait for the device
    return RowOrder(slots, place.view_as(experts), RowGroups(counts))


def _gathered_sum(rows: torch.Tensor, place: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """``sum_j weights[t, j] rows[place[t, j]]``: rows ``[m, h]``, place and weights ``[n, k]`` -> ``[n, h]``."""
    if place.shape[1] == 1 and weights is None:
        return rows.index_select(0, place.flatten())
    weights = None if weights is None else weights.to(rows.dtype)
    if rows.device.type in ("cpu", "cuda") and len(rows):
        return F.embedding_bag(place, rows, per_sample_weights=weights, mode="sum")
    gathered = rows.index_select(0, place.flatten()).view(*place.shape, rows.shape[1])
    return (gathered if weights is None else gathered * weights.unsqueeze(-1)).sum(dim=1)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, order: RowOrder) -> torch.Tensor:
        ctx.order = order
        return tokens.index_select(0, order.tokens)

    @staticmethod
    def backward(ctx: Any, grad_rows: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _gathered_sum(grad_rows, ctx.order.place, None), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: RowOrder, weights: torch.Tensor | None) -> torch.Tensor:
        ctx.order = order
        ctx.save_for_backward(rows if ctx.needs_input_grad[2] else None, weights)
        return _gathered_sum(rows, order.place, weights)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor | None]:
        rows, weights = ctx.saved_tensors
        grad_rows = grad.index_select(0, ctx.order.tokens)
        if weights is None:
            return grad_rows, None, None
        grad_weights = None
        if rows is not None:
            along = (rows * grad_rows).sum(dim=-1, dtype=weights.dtype)
            grad_weights = along.index_select(0, ctx.order.place.flatten()).view_as(weights)
        by_row = weights.flatten().index_select(0, ctx.order.slots).to(grad_rows.dtype)
        return grad_rows.mul_(by_row.unsqueeze(-1)), None, grad_weights


def permute(tokens: torch.Tensor, order: RowOrder) -> torch.Tensor:
    """tokens ``[n, h]`` -> rows ``[n k, h]``, sorted by expert."""
    return _Permute.apply(tokens, order)


def unpermute(rows: torch.Tensor, order: RowOrder, weights: torch.Tensor | None = None) -> torch.Tensor:
    """rows ``[n k, h]``, weights ``[n, k]`` (None: all 1) -> each token's weighted sum ``[n, h]``."""
    return _Unpermute.apply(rows, order, weights)
