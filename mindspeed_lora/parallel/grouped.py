"""The same linear of all experts of a rank as one layer: one weight ``[E, out, in]``, rows sorted by expert.

It makes no collective: the mixture that it is part of gathers tokens before and sums the ranks' results after. Cut over TP like a
column- or row-parallel layer by the sizes it is given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mindspeed_lora.ops.grouped import RowGroups, grouped_linear, grouped_matmul, grouped_outer


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.groups = groups
        return grouped_linear(x, weight, groups)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dy = dy.contiguous()
        grad_x = grouped_matmul(dy, weight, ctx.groups) if ctx.needs_input_grad[0] else None
        return grad_x, None if x is None else grouped_outer(dy, x, ctx.groups), None


class GroupedLinear(nn.Module):
    """``y = x W_e^T`` for the rows of expert e. ``in_features`` and ``out_features`` are this rank's sizes (as peft reads them)."""

    def __init__(self, num_experts: int, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, dtype=dtype, device=device))

    def forward(self, x: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """``[n, in] -> [n, out]``; ``groups``: rows of each expert."""
        return _GroupedLinear.apply(x, self.weight, groups)
