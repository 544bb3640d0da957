"""Kernels by name, chosen by the device the tensor lies on; :mod:`~mindspeed_lora.ops.eager` is the reference of each.

| kernel             | cpu                            | cuda                       | npu                       |
|--------------------|--------------------------------|----------------------------|---------------------------|
| linear             | linear, 16-bit in fp32         | linear                     | linear                    |
| rms_norm           | fused                          | torch's own                | npu_rms_norm              |
| rotate, swiglu     | fused                          | fused                      | npu_rotary_mul, _swiglu   |
| exp_               | torch's own or by powers of 2  | torch's own                | torch's own               |
| attention          | sdpa, 16-bit in fp32, or whole | sdpa                       | npu_fusion_attention      |
|                    | matrices: cpu_attention        |                            |                           |
| document_attention | the same for each document     | the same for each document | npu_fusion_attention, TND |

No kernel takes a mask tensor for causal attention. A CPU without gradients, a few rows: :mod:`~mindspeed_lora.ops.few_rows`. Which CPUs
multiply 16 bits in fp32, and by which library, inside LoRA layers and the loss head too: :mod:`~mindspeed_lora.ops.products`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch

from mindspeed_lora.ops import cpu, cuda, eager, npu
from mindspeed_lora.ops.eager import band_mask

__all__ = ["attention", "band_mask", "document_attention", "exp_", "linear", "rms_norm", "rotate", "swiglu"]

_BY_DEVICE = {"cpu": cpu, "cuda": cuda, "npu": npu}


def _kernels(x: torch.Tensor) -> ModuleType:
    return _BY_DEVICE.get(x.device.type, eager)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.linear`."""
    return _kernels(x).linear(x, weight, bias)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.rms_norm`."""
    return _kernels(x).rms_norm(x, weight, epsilon)


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.rotate`."""
    return _kernels(x).rotate(x, cosine, sine)


def exp_(x: torch.Tensor) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.exp_`."""
    return _kernels(x).exp_(x)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.swiglu`."""
    return _kernels(x).swiglu(x)


def _as_wide(value: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """``value`` with zeros behind each head up to the queries' head dim, the only shape that flash attention has."""
    missing = query.shape[-1] - value.shape[-1]
    return torch.nn.functional.pad(value, (0, missing)) if missing else value


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.attention`."""
    output = _kernels(query).attention(query, key, _as_wide(value, query), mask, is_causal, scale)
    return output[..., : value.shape[-1]]


def document_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: Sequence[Sequence[int]],
    window: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.document_attention`."""
    output = _kernels(query).document_attention(query, key, _as_wide(value, query), ends, window, scale)
    return output[..., : value.shape[-1]]
