"""The kernels on a CPU: fused functions; attention and linear layers in the dtype that the CPU multiplies faster.

Without 16-bit matrix units flash attention takes twice as long backward in bf16 as in fp32 (256 tokens: 10.2 against 4.8 ms); with
avx512_bf16 at twice fp32's rate it takes as long (256 tokens: 3.7 ms both) or less (1024: 27 against 44), and is passed over where
:mod:`mindspeed_lora.ops.cpu_attention` takes half of its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mindspeed_lora.device import small_bf16_products_are_slow
from mindspeed_lora.ops import eager, few_rows, fused
from mindspeed_lora.ops.cpu_attention import LOG2_OF_E, causal_attention, repeated
from mindspeed_lora.ops.fused import Grads, rotate, swiglu
from mindspeed_lora.ops.products import goes_to_onednn, product_dtype, times, times_transposed, transposed_times, wide_rows

__all__ = ["attention", "document_attention", "exp_", "linear", "rms_norm", "rotate", "swiglu"]

_FEW_QUERIES = 16  # below this (generation) widening all keys and values would cost more than it saves
_MANY_QUERIES = 64  # from here on products of whole matrices are faster than flash attention (1.0 against 0.7 ms)


class _WidenedLinear(torch.autograd.Function):
    """:func:`linear` by products in fp32; keeps x as it came, and only for a trained weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        y = times_transposed(wide_rows(x), weight, bias)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Grads:
        x, weight = ctx.saved_tensors
        wide = wide_rows(dy)
        dx = times(wide, weight).to(dy.dtype).view(*dy.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        weight_grad = transposed_times(wide, wide_rows(x), weight.dtype) if ctx.needs_input_grad[1] else None
        return dx, weight_grad, wide.sum(dim=0).to(dy.dtype) if ctx.needs_input_grad[2] else None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.linear`."""
    if product_dtype(x) == x.dtype and not torch.is_grad_enabled():
        return few_rows.linear(x, weight, bias)
    if product_dtype(x) != x.dtype or goes_to_onednn(x):
        return _WidenedLinear.apply(x, weight, bias)
    return eager.linear(x, weight, bias)


def exp_(x: torch.Tensor) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.exp_`; where MKL, which torch takes for it, needs four times as long as for a power of 2."""
    return x.mul_(LOG2_OF_E).exp2_() if goes_to_onednn(x) else x.exp_()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.rms_norm`."""
    return (fused if torch.is_grad_enabled() else few_rows).rms_norm(x, weight, epsilon)


def _prepared(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In the dtype of their products, and in groups that flash attention takes; as they are where there are few queries."""
    if query.shape[2] < _FEW_QUERIES:
        return query, key, value
    dtype = product_dtype(query)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return query, *repeated(query, key, value)


def _multiplies_whole_matrices(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether causal attention of these is faster by large products than by flash attention."""
    many = query.shape[2] == key.shape[2] >= _MANY_QUERIES
    return many and query.dtype == torch.bfloat16 and small_bf16_products_are_slow()


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.attention`."""
    if is_causal and mask is None and _multiplies_whole_matrices(query, key):
        return causal_attention(query, key, value, scale)
    return eager.attention(*_prepared(query, key, value), mask, is_causal, scale).to(query.dtype)


def document_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: Sequence[Sequence[int]],
    window: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.document_attention`."""
    return eager.document_attention(query, key, value, ends, window, scale, attention)
