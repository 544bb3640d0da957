"""LoRA on stacked experts: every expert has its own A and B, and its tokens pass through no other's.

Per expert e, rows x_e and s = alpha / r:  ``u = x_e A_e^T;  y = x_e W_e^T + s u B_e^T`` and backward ``g_u = s dy B_e;
dx = dy W_e + g_u A_e;  dA_e = g_u^T x_e;  dB_e = s dy^T u``. Saved: x and the r-wide u. No collective (see ``parallel/grouped.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mindspeed_lora.lora.layers import ParallelLoraLinear
from mindspeed_lora.ops.grouped import Products, RowGroups


class GroupedLora(torch.autograd.Function):
    """x ``[n, in]``, weight ``[E, out, in]``, a ``[E, r, in]``, b ``[E, out, r]`` -> ``[n, out]``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        groups: RowGroups,
        products: Products,
    ) -> torch.Tensor:
        """See the module's formulas."""
        wide = products.widen(x, groups)
        u = products.matmul(wide, a.transpose(1, 2), groups)
        y = products.matmul(wide, weight.transpose(1, 2), groups)
        products.add_matmul(y, u, b.transpose(1, 2), groups, scale)
        ctx.save_for_backward(x, weight, a, b, u)
        ctx.scale, ctx.groups, ctx.products = scale, groups, products
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, A and B; none for the frozen weight. dB is formed as ``(u^T dy)^T``, as in the dense functions."""
        x, weight, a, b, u = ctx.saved_tensors
        groups, products = ctx.groups, ctx.products
        wide, grad_x = products.widen(dy.contiguous(), groups), None
        grad_b = products.outer(u * ctx.scale, wide, groups).transpose(1, 2).to(b.dtype)
        grad_u = products.matmul(wide, b, groups).mul_(ctx.scale)
        if ctx.needs_input_grad[0]:
            grad_x = products.matmul(wide, weight, groups)
            grad_x = products.add_matmul(grad_x, grad_u, a, groups).to(x.dtype)
        grad_a = products.outer(grad_u, x, groups).to(a.dtype)
        return grad_x, None, grad_a, grad_b, None, None, None


class _Stacked(nn.Module):
    """Holds one of the matrices of all experts under peft's name ``weight``."""

    def __init__(self, num_experts: int, rows: int, columns: int, like: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, rows, columns, dtype=like.dtype, device=like.device))


class GroupedLoraLinear(ParallelLoraLinear):
    """The same around a :class:`mindspeed_lora.parallel.grouped.GroupedLinear`: A ``[E, r, in]``, B ``[E, out, r]``, this rank's sizes."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, **_peft: Any) -> None:  # type: ignore[override]
        """See the base class."""
        weight = self.get_base_layer().weight
        assert isinstance(weight, torch.Tensor)
        num_experts, out_features, in_features = weight.shape
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / r
        self.lora_dropout[adapter_name] = nn.Identity()
        self.lora_A[adapter_name] = _Stacked(num_experts, r, in_features, weight)
        self.lora_B[adapter_name] = _Stacked(num_experts, out_features, r, weight)
        self.set_adapter([adapter_name])

    def forward(self, x: torch.Tensor, groups: RowGroups) -> torch.Tensor:  # type: ignore[override]
        """As the base layer's, plus the adapter's part."""
        base, used = self.get_base_layer(), self._in_use()
        if used is None:
            return base(x, groups)
        a, b, scale = used
        return GroupedLora.apply(x, base.weight, a, b, scale, groups, base.products)
