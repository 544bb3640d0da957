"""LoRA inside a parallel linear layer at the frozen layer's own number of collectives.

With ``W`` frozen, ``s = alpha / r`` and SP (sequence parallelism) on, per rank i:

    column:  x = all-gather(x_i)                     backward: [dx_i | g_u] = reduce-scatter([dy W_i | dy B_i]),  g_u *= s
             u = x A^T                                         dx_i += g_u A,  dA = g_u^T x_i (partial),  dB_i = s dy^T u
             y_i = x W_i^T + s u B_i^T

    row:     [y | u] = reduce-scatter([x_i W_i^T | x_i A_i^T]) backward: dy = all-gather(dy_i),  g_u = s dy B
             y += s u B^T                                      dx_i = dy W_i + g_u A_i,  dA_i = g_u^T x_i,  dB = s dy_i^T u (partial)

SP off: the all-gather disappears and the reduce-scatter becomes an all-reduce, of ``dy W_i + g_u A`` in the column layer.
In backward each collective runs behind a product that does not need it: dB behind the column layer's reduce-scatter and the row
layer's all-gather, dA behind the all-reduce. What is reduced together is written side by side by the products
themselves. Partial gradients are summed over tp once per step (``grad_sum`` of the weight table). Only ``x`` as it came in
and the r-wide ``u`` are saved.
"""

from __future__ import annotations

from typing import Any

import torch

from mindspeed_lora.ops.products import add_outer, add_product, in_cached_rows, product, product_dtype, times, times_transposed, wide_rows
from mindspeed_lora.parallel import collectives
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


def _add_low_rank(y: torch.Tensor, u: torch.Tensor, weight: torch.Tensor, scale: Scale = 1.0) -> torch.Tensor:
    """``y += scale * u weight`` in place; y ``[n, k]``, u ``[n, r]``, weight ``[r, k]``."""
    u, factor = (u, scale) if isinstance(scale, float) else (scaled(u, scale), 1.0)
    return add_product(y, u.to(y.dtype), weight.to(y.dtype), factor)


def _grad_a(grad_u: torch.Tensor, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """``dA = g_u^T x`` in A's dtype; x is widened a few rows at a time."""
    x, total = _rows(x), None
    grad_u = grad_u.to(product_dtype(x))
    for rows, grads in in_cached_rows(x, grad_u):
        total = add_outer(total, grads, rows.to(grad_u.dtype))
    assert total is not None
    return total.to(a.dtype)


def _grad_b(dy: torch.Tensor, u: torch.Tensor, b: torch.Tensor, scale: Scale) -> torch.Tensor:
    """``dB = s dy^T u`` in B's dtype, formed as ``(u^T dy)^T``: the wide factor second is twice as fast on a CPU."""
    return product(scaled(u, scale).to(dy.dtype).t(), dy).t().to(b.dtype)


def _grads_of_low_rank(dy: torch.Tensor, u: torch.Tensor, b: torch.Tensor, scale: Scale) -> tuple[torch.Tensor, torch.Tensor]:
    """``g_u = s dy B`` and :func:`_grad_b`, both of a few rows of dy while these are in the cache."""
    matrix, adapted = b.to(dy.dtype), scaled(u, scale).to(dy.dtype)
    grad_u, grad_b = dy.new_empty(dy.shape[0], b.shape[1]), None
    for rows, adapted_rows, grads in in_cached_rows(dy, adapted, grad_u):
        product(rows, matrix, grads)
        grad_b = add_outer(grad_b, adapted_rows, rows)
    assert grad_b is not None
    return grad_u.mul_(scale), grad_b.t().to(b.dtype)


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
        whole = collectives.all_gather_dim0(x, context.tp_group) if context.sequence_parallel else x
        wide = wide_rows(whole)
        u = times_transposed(wide, a)
        y = _add_low_rank(times_transposed(wide, weight, bias), u, b.t(), scale)
        ctx.save_for_backward(x, weight, a, b, u)
        ctx.scale, ctx.context = scale, context
        return y.to(x.dtype).view(*whole.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Grads:
        """Gradients of x, A and B; none for the frozen weight."""
        saved = x, weight, a, b, u = ctx.saved_tensors  # once: recomputation hands each tensor out a single time
        wide = wide_rows(dy)
        if ctx.context.sequence_parallel:
            grad_x, grad_u, grad_b = _column_scattered(ctx, saved, dy, wide)
            grad_a = _grad_a(grad_u, x, a)
        else:
            grad_u, grad_b = _grads_of_low_rank(wide, u, b, ctx.scale)
            pending = None
            if ctx.needs_input_grad[0]:
                grad_x = _add_low_rank(times(wide, weight), grad_u, a).to(x.dtype).view(x.shape)
                pending = collectives.start_all_reduce(grad_x, ctx.context.tp_group)
            grad_a = _grad_a(grad_u, x, a)
            grad_x = None if pending is None else pending.wait()
        return grad_x, None, None, grad_a, grad_b, None, None


def _column_scattered(
    ctx: Any, saved: tuple[torch.Tensor, ...], dy: torch.Tensor, wide: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """(dx_i or None, g_u ``[n/t, r]``, dB_i) of the column layer with SP: one reduce-scatter, dB behind it."""
    x, weight, a, b, u = saved
    width = x.shape[-1] if ctx.needs_input_grad[0] else 0
    both = dy.new_empty(wide.shape[0], width + a.shape[0])
    if width:
        times(wide, weight, out=both[:, :width])
    times(wide, b, out=both[:, width:])
    pending = collectives.start_reduce_scatter_dim0(both.view(*dy.shape[:-1], -1), ctx.context.tp_group)
    grad_b = _grad_b(wide, u, b, ctx.scale)
    grad_x, grad_u = pending.wait().split((width, a.shape[0]), dim=-1)
    grad_u = scaled(_rows(grad_u), ctx.scale)
    if not width:
        return None, grad_u, grad_b
    _add_low_rank(grad_x.view(-1, width), grad_u, a)
    return grad_x, grad_u, grad_b


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
        wide, width = wide_rows(x), weight.shape[0]
        if context.tp_group is None:
            u = times_transposed(wide, a)
            y = _add_low_rank(times_transposed(wide, weight), u, b.t(), scale).to(x.dtype).view(*x.shape[:-1], width)
        else:
            both = x.new_empty(wide.shape[0], width + a.shape[0])
            times_transposed(wide, weight, out=both[:, :width])
            times_transposed(wide, a, out=both[:, width:])
            both = both.view(*x.shape[:-1], -1)
            leave = collectives.reduce_scatter_dim0 if context.sequence_parallel else collectives.all_reduce
            y, u = leave(both, context.tp_group).split((width, a.shape[0]), dim=-1)
            u = _rows(u).contiguous()  # else it would keep all of y
            _add_low_rank(y.view(-1, width), u, b.t(), scale)
        ctx.save_for_backward(x, weight, a, b, u)
        ctx.scale, ctx.context = scale, context
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Grads:
        """Gradients of x, A and B; none for the frozen weight."""
        x, weight, a, b, u = ctx.saved_tensors
        group = ctx.context.tp_group if ctx.context.sequence_parallel else None
        pending = collectives.start_all_gather_dim0(dy, group)
        wide = wide_rows(dy)
        if group is None:
            whole = wide
            grad_u, grad_b = _grads_of_low_rank(wide, u, b, ctx.scale)
        else:
            grad_b = _grad_b(wide, u, b, ctx.scale)
            whole = wide_rows(pending.wait())
            grad_u = times(whole, b).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _add_low_rank(times(whole, weight), grad_u, a).to(x.dtype).view(x.shape)
        return grad_x, None, _grad_a(grad_u, x, a), grad_b, None, None
