"""The kernels on CUDA: torch's own fused norm (where it has one: 2.8 on) and flash attention, fused functions for the rest."""

from __future__ import annotations

import torch

from mindspeed_lora.ops import eager, fused
from mindspeed_lora.ops.eager import attention, document_attention, exp_, linear
from mindspeed_lora.ops.fused import rotate, swiglu

__all__ = ["attention", "document_attention", "exp_", "linear", "rms_norm", "rotate", "swiglu"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """See :func:`mindspeed_lora.ops.eager.rms_norm`."""
    if weight.dim() > 1:  # generation: a row of weights for each head
        return eager.rms_norm(x, weight, epsilon)
    if hasattr(torch.ops.aten, "_fused_rms_norm"):
        return torch.nn.functional.rms_norm(x, weight.shape, weight, epsilon)
    return fused.rms_norm(x, weight, epsilon)
