"""The same linear of all experts of a rank as one layer: one weight ``[E, out, in]``, rows sorted by expert.

It makes no collective: the mixture that it is part of gathers tokens before and sums the ranks' results after. Cut over TP like a
column- or row-parallel layer by the sizes it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mindspeed_lora.errors import UsageError
from mindspeed_lora.ops.grouped import Products, RowGroups, Sequential, TorchGrouped, default_products, grouped_refusal
from mindspeed_lora.weights.config import ModelConfig


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, groups: RowGroups, products: Products) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.groups, ctx.products = groups, products
        return products.matmul(products.widen(x, groups), weight.transpose(1, 2), groups).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        groups, products = ctx.groups, ctx.products
        wide, grad_x, grad_weight = products.widen(dy.contiguous(), groups), None, None
        if ctx.needs_input_grad[0]:
            grad_x = products.matmul(wide, weight, groups).to(dy.dtype)
        if x is not None:
            grad_weight = products.outer(wide, x, groups).to(weight.dtype)
        return grad_x, grad_weight, None, None


class GroupedLinear(nn.Module):
    """``y = x W_e^T`` for the rows of expert e. ``in_features`` and ``out_features`` are this rank's sizes (as peft reads them).

    ``products``: how; see :func:`choose_products`.
    """

    def __init__(self, num_experts: int, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, dtype=dtype, device=device))
        self.products: Products = Sequential()

    def forward(self, x: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """``[n, in] -> [n, out]``; ``groups``: rows of each expert."""
        return _GroupedLinear.apply(x, self.weight, groups, self.products)


def choose_products(stages: Sequence[nn.Module], config: ModelConfig, grouped: bool) -> str | None:
    """Set how the experts of ``stages``, and their adapters, are multiplied; returns it in words, None where there are none.

    Args:
        grouped: ``--moe-grouped-gemm``; without it, what is fastest here.

    Raises:
        UsageError: ``grouped``, and the model has no experts, or the device, the dtype, a size or torch does not allow it.
    """
    linears = [module for stage in stages for module in stage.modules() if isinstance(module, GroupedLinear)]
    if grouped and config.experts is None:
        raise UsageError("--moe-grouped-gemm: the model has no experts; leave the flag out")
    if not linears:
        return None
    device, dtype = linears[0].weight.device, linears[0].weight.dtype
    stacked = (parameter for stage in stages for parameter in stage.parameters() if parameter.dim() == 3)  # A and B of adapters too
    sizes = {size for parameter in stacked for size in parameter.shape[1:]}
    products = default_products(device, dtype, sizes)
    if grouped and isinstance(products, Sequential):
        refusal = grouped_refusal(device, dtype, sizes)
        if refusal is not None:
            raise UsageError(f"--moe-grouped-gemm on {device.type}: {refusal}; leave the flag out, the experts then compute one by one")
        products = TorchGrouped()
    for linear in linears:
        linear.products = products
    return products.name
