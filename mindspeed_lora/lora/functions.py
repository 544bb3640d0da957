"""LoRA inside a parallel linear layer at the frozen layer's own number of collectives.

With ``W`` frozen, ``s = alpha / r`` and SP (sequence parallelism) on, per rank i:

    column:  x = all-gather(x_i)                     backward: g_u = s dy B_i
             u = x A^T                                         [dx_i | g_u] = reduce-scatter([dy W_i | g_u])
             y_i = x W_i^T + s u B_i^T                         dx_i += g_u A,  dA = g_u^T x_i (partial),  dB_i = s dy^T u

    row:     [y | u] = reduce-scatter([x_i W_i^T | x_i A_i^T]) backward: dy = all-gather(dy_i),  g_u = s dy B
             y += s u B^T                                      dx_i = dy W_i + g_u A_i,  dA_i = g_u^T x_i,  dB = s dy_i^T u (partial)

SP off: the all-gather disappears and the reduce-scatter becomes an all-reduce, of ``dy W_i + g_u A`` in the column layer.
Partial gradients are summed over tp once per step (``grad_sum`` of the weight table). Only ``x`` as it came in and the
r-wide ``u`` are saved.
"""

from __future__ import annotations

from typing import Any

import torch

from mindspeed_lora.parallel.collectives import all_gather_dim0, all_reduce, reduce_scatter_dim0
from mindspeed_lora.parallel.context import ParallelContext

Grads = tuple[torch.Tensor | None, ...]
Scale = float | torch.Tensor
"""s of the formulas; where the parts of a fused linear differ in it, one value for each of A's rows, fp32 ``[r]``."""


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """``[..., k] -> [n, k]``."""
    return tensor.reshape(-1, tensor.shape[-1])


def scaled(u: torch.Tensor, scale: Scale) -> torch.Tensor:
    """``scale * u`` in u's dtype; u ``[..., r]``."""
    return (u * scale).to(u.dtype)


def _add_low_rank(y: torch.Tensor, u: torch.Tensor, weight: torch.Tensor, scale: Scale) -> torch.Tensor:
    """``y += scale * u weight`` in place; y ``[..., k]``, u ``[..., r]``, weight ``[r, k]``."""
    u, factor = (u, scale) if isinstance(scale, float) else (scaled(u, scale), 1.0)
    y.view(-1, y.shape[-1]).addmm_(_rows(u), weight, alpha=factor)
    return y


class KeepBlocks(torch.autograd.Function):
    """B as it is; its gradient only where ``mask`` is true."""

    @staticmethod
    def forward(ctx: Any, b: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """b ``[out, r]``, mask bool ``[out, r]``."""
        ctx.save_for_backward(mask)
        return b.view_as(b)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Grads:
        """The masked gradient."""
        (mask,) = ctx.saved_tensors
        return grad * mask, None


class ColumnLora(torch.autograd.Function):
    """Column-parallel linear with LoRA; see the module's formulas."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: Scale,
        context: ParallelContext,
    ) -> torch.Tensor:
        """x ``[s, b, in]`` (SP: ``[s/t, b, in]``) -> ``[s, b, out/t]``."""
        whole = all_gather_dim0(x, context.tp_group) if context.sequence_parallel else x
        u = torch.nn.functional.linear(whole, a)
        y = _add_low_rank(torch.nn.functional.linear(whole, weight, bias), u, b.t(), scale)
        ctx.save_for_backward(x, weight, a, b, u)
        ctx.scale, ctx.context = scale, context
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Grads:
        """Gradients of x, A and B; none for the frozen weight."""
        x, weight, a, b, u = ctx.saved_tensors
        context = ctx.context
        dy = dy.contiguous()
        grad_u = (dy @ b).mul_(ctx.scale)
        grad_b = (_rows(dy).t() @ _rows(u)).mul_(ctx.scale)
        grad_x = None
        if context.sequence_parallel:
            if ctx.needs_input_grad[0]:
                both = reduce_scatter_dim0(torch.cat((dy @ weight, grad_u), dim=-1), context.tp_group)
                grad_x, grad_u = both.split((x.shape[-1], a.shape[0]), dim=-1)
                grad_x = _add_low_rank(grad_x.contiguous(), grad_u, a, 1.0)
            else:
                grad_u = reduce_scatter_dim0(grad_u, context.tp_group)
        elif ctx.needs_input_grad[0]:
            grad_x = all_reduce(_add_low_rank(dy @ weight, grad_u, a, 1.0), context.tp_group)
        grad_a = _rows(grad_u).t() @ _rows(x)
        return grad_x, None, None, grad_a, grad_b, None, None


class RowLora(torch.autograd.Function):
    """Row-parallel linear with LoRA; see the module's formulas."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: Scale,
        context: ParallelContext,
    ) -> torch.Tensor:
        """x ``[s, b, in/t]`` -> ``[s, b, out]`` (SP: ``[s/t, b, out]``)."""
        y, u = torch.nn.functional.linear(x, weight), torch.nn.functional.linear(x, a)
        if context.tp_group is not None:
            both = torch.cat((y, u), dim=-1)
            both = reduce_scatter_dim0(both, context.tp_group) if context.sequence_parallel else all_reduce(both, context.tp_group)
            y, u = (part.contiguous() for part in both.split((y.shape[-1], u.shape[-1]), dim=-1))
        ctx.save_for_backward(x, weight, a, b, u)
        ctx.scale, ctx.context = scale, context
        return _add_low_rank(y, u, b.t(), scale)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Grads:
        """Gradients of x, A and B; none for the frozen weight."""
        x, weight, a, b, u = ctx.saved_tensors
        context = ctx.context
        dy = dy.contiguous()
        grad_b = (_rows(dy).t() @ _rows(u)).mul_(ctx.scale)
        whole = all_gather_dim0(dy, context.tp_group) if context.sequence_parallel else dy
        grad_u = (whole @ b).mul_(ctx.scale)
        grad_x = _add_low_rank(whole @ weight, grad_u, a, 1.0) if ctx.needs_input_grad[0] else None
        grad_a = _rows(grad_u).t() @ _rows(x)
        return grad_x, None, grad_a, grad_b, None, None
