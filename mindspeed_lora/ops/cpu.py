"""The kernels on a CPU: fused functions, and attention in fp32 for 16-bit tensors.

The CPU's flash attention takes twice as long backward in bf16 as in fp32 (measured, 256 tokens: 10.2 against 4.8 ms).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mindspeed_lora.ops import eager, few_rows, fused
from mindspeed_lora.ops.fused import rotate, swiglu

__all__ = ["attention", "document_attention", "linear", "rms_norm", "rotate", "swiglu"]

_FEW_QUERIES = 16  # below this (generation) widening all keys and values would cost more than it saves


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.linear`."""
    return (eager if torch.is_grad_enabled() else few_rows).linear(x, weight, bias)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.rms_norm`."""
    return (fused if torch.is_grad_enabled() else few_rows).rms_norm(x, weight, epsilon)


def _widened(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if query.dtype.itemsize != 2 or query.shape[2] < _FEW_QUERIES:
        return query, key, value
    return query.float(), key.float(), value.float()


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.attention`."""
    return eager.attention(*_widened(query, key, value), mask, is_causal, scale).to(query.dtype)


def document_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: Sequence[Sequence[int]],
    window: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.document_attention`."""
    return eager.document_attention(*_widened(query, key, value), ends, window, scale).to(query.dtype)
