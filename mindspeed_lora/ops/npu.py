"""The same kernels on Ascend, from ``torch_npu``; chosen by :mod:`mindspeed_lora.ops` for tensors on ``npu``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mindspeed_lora.device import load_torch_npu
from mindspeed_lora.ops.eager import exp_, linear

__all__ = ["attention", "document_attention", "exp_", "linear", "rms_norm", "rotate", "swiglu"]

_CAUSAL_MASK_SIZE = 2048  # what sparse_mode 2 and 3 want, whatever the length


def _causal_mask(device: torch.device) -> torch.Tensor:
    return torch.ones(_CAUSAL_MASK_SIZE, _CAUSAL_MASK_SIZE, dtype=torch.bool, device=device).triu(1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.rms_norm`."""
    if weight.dim() == 1:
        return load_torch_npu().npu_rms_norm(x, weight, epsilon=epsilon)[0]
    return weight * load_torch_npu().npu_rms_norm(x, torch.ones_like(weight[0]), epsilon=epsilon)[0]  # its weight says the normed dims


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.rotate`."""
    return load_torch_npu().npu_rotary_mul(x, cosine, sine)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.swiglu`."""
    return load_torch_npu().npu_swiglu(x, dim=-1)


def _scale(query: torch.Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
) -> torch.Tensor:
    """As :func:`mindspeed_lora.ops.eager.attention`; the kernel's mask is True where a key is hidden."""
    hidden, sparse_mode = None, 0
    if mask is not None:
        hidden = ~mask
    elif is_causal and query.shape[2] > 1:
        hidden, sparse_mode = _causal_mask(query.device), 3
    return load_torch_npu().npu_fusion_attention(
        query, key, value, query.shape[1], "BNSD", atten_mask=hidden, scale=_scale(query, scale), sparse_mode=sparse_mode
    )[0]


def document_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: Sequence[Sequence[int]],
    window: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """As :func:`mindspeed_lora.ops.eager.document_attention`: all rows behind one another, cut at the cumulative ends."""
    batch, heads, length, channels = query.shape
    cumulative = [row * length + end for row, row_ends in enumerate(ends) for end in sorted({*row_ends} - {0})]
    flat = (tensor.transpose(1, 2).reshape(batch * length, tensor.shape[1], channels) for tensor in (query, key, value))
    band = (
        {"sparse_mode": 3} if window is None else {"sparse_mode": 4, "pre_tockens": window - 1, "next_tockens": 0}
    )  # the kernel's spelling
    output = load_torch_npu().npu_fusion_attention(
        *flat,
        heads,
        "TND",
        atten_mask=_causal_mask(query.device),
        scale=_scale(query, scale),
        actual_seq_qlen=cumulative,
        actual_seq_kvlen=cumulative,
        **band,
    )[0]
    return output.view(batch, length, heads, channels).transpose(1, 2)
