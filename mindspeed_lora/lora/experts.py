"""LoRA on stacked experts: every expert has its own A and B, and its tokens pass through no other's; or one A and B serve all of them.

Per expert e, rows x_e and s = alpha / r:  ``u = x_e A_e^T;  y = x_e W_e^T + s u B_e^T`` and backward ``g_u = s dy B_e;
dx = dy W_e + g_u A_e;  dA_e = g_u^T x_e;  dB_e = s dy^T u``. Saved: x and the r-wide u. No collective (see ``parallel/grouped.py``).
Shared matrices have no dim of experts; their products are of all rows at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mindspeed_lora.lora.functions import Scale, scaled
from mindspeed_lora.lora.layers import ParallelLoraLinear
from mindspeed_lora.ops.grouped import Products, RowGroups


class _OneForAll:
    """The products of :class:`mindspeed_lora.ops.grouped.Products` with one matrix for the rows of all groups."""

    def matmul(self, x: torch.Tensor, weight: torch.Tensor, _groups: RowGroups) -> torch.Tensor:
        """``[n, k], [k, m] -> [n, m]``."""
        return x @ weight.to(x.dtype)

    def add_matmul(self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, _groups: RowGroups, scale: float = 1.0) -> torch.Tensor:
        """``y += scale * x weight`` in place."""
        return y.addmm_(x, weight.to(x.dtype), alpha=scale)

    def outer(self, y: torch.Tensor, x: torch.Tensor, _groups: RowGroups) -> torch.Tensor:
        """``[n, p], [n, q] -> [p, q]``."""
        return y.t() @ x.to(y.dtype)


class GroupedLora(torch.autograd.Function):
    """x ``[n, in]``, weight ``[E, out, in]``, a ``[E, r, in]`` or ``[r, in]``, b ``[E, out, r]`` or ``[out, r]`` -> ``[n, out]``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: Scale,
        groups: RowGroups,
        products: Products,
    ) -> torch.Tensor:
        """See the module's formulas."""
        wide, low_rank = products.widen(x, groups), _OneForAll() if a.dim() == 2 else products
        u = low_rank.matmul(wide, a.transpose(-2, -1), groups)
        y = products.matmul(wide, weight.transpose(1, 2), groups)
        adapted, factor = (u, scale) if isinstance(scale, float) else (scaled(u, scale), 1.0)
        low_rank.add_matmul(y, adapted, b.transpose(-2, -1), groups, factor)
        ctx.save_for_backward(x, weight, a, b, u)
        ctx.scale, ctx.groups, ctx.products, ctx.low_rank = scale, groups, products, low_rank
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, A and B; none for the frozen weight. dB is formed as ``(u^T dy)^T``, as in the dense functions."""
        x, weight, a, b, u = ctx.saved_tensors
        groups, products, low_rank = ctx.groups, ctx.products, ctx.low_rank
        wide, grad_x = products.widen(dy.contiguous(), groups), None
        grad_b = low_rank.outer(scaled(u, ctx.scale), wide, groups).transpose(-2, -1).to(b.dtype)
        grad_u = low_rank.matmul(wide, b, groups).mul_(ctx.scale)
        if ctx.needs_input_grad[0]:
            grad_x = products.matmul(wide, weight, groups)
            grad_x = low_rank.add_matmul(grad_x, grad_u, a, groups).to(x.dtype)
        grad_a = low_rank.outer(grad_u, x, groups).to(a.dtype)
        return grad_x, None, grad_a, grad_b, None, None, None


class _Zeros(nn.Module):
    """Holds A or B, of all experts or one for all, under peft's name ``weight``."""

    def __init__(self, like: torch.Tensor, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))


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
        self.lora_A[adapter_name] = _Zeros(weight, num_experts, r, in_features)
        self.lora_B[adapter_name] = _Zeros(weight, num_experts, out_features, r)
        self.set_adapter([adapter_name])

    def share(self, adapter_name: str) -> None:
        """Put one A ``[r, in]`` and B ``[out, r]`` in the place of the experts' own."""
        for matrices in (self.lora_A, self.lora_B):
            own = self._weight(matrices, adapter_name)
            matrices[adapter_name] = _Zeros(own, *own.shape[1:])

    def forward(self, x: torch.Tensor, groups: RowGroups) -> torch.Tensor:  # type: ignore[override]
        """As the base layer's, plus the adapter's part."""
        base, used = self.get_base_layer(), self._in_use()
        if used is None:
            return base(x, groups)
        a, b, scale = used
        return GroupedLora.apply(x, base.weight, a, b, scale, groups, base.products)
