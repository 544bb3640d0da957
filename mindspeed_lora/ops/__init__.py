"""Kernels by name, chosen by the device the tensor lies on.

| kernel             | cpu, cuda                                 | npu                       |
|--------------------|-------------------------------------------|---------------------------|
| linear             | linear, on a CPU transposed for few rows  | linear                    |
| rms_norm           | eager                                     | npu_rms_norm              |
| rotate             | eager                                     | npu_rotary_mul            |
| swiglu             | eager                                     | npu_swiglu                |
| attention          | scaled_dot_product_attention              | npu_fusion_attention      |
| document_attention | scaled_dot_product_attention per document | npu_fusion_attention, TND |
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch

from mindspeed_lora.ops import eager, npu
from mindspeed_lora.ops.eager import band_mask

__all__ = ["attention", "band_mask", "document_attention", "linear", "rms_norm", "rotate", "swiglu"]


def _kernels(x: torch.Tensor) -> ModuleType:
    return npu if x.device.type == "npu" else eager


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.linear`."""
    return eager.linear(x, weight, bias)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.rms_norm`."""
    return _kernels(x).rms_norm(x, weight, epsilon)


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.rotate`."""
    return _kernels(x).rotate(x, cosine, sine)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.swiglu`."""
    return _kernels(x).swiglu(x)


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None, is_causal: bool = True
) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.attention`."""
    return _kernels(query).attention(query, key, value, mask, is_causal)


def document_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: Sequence[Sequence[int]], window: int | None = None
) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.document_attention`."""
    return _kernels(query).document_attention(query, key, value, ends, window)
