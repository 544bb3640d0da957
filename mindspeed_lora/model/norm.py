"""The norm of every family here."""

from __future__ import annotations

import torch
from torch import nn

from mindspeed_lora import ops
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.weights.config import ModelConfig


class RMSNorm(nn.Module):
    """Over the last dim, weight ``[size]``, statistics in fp32; ``epsilon`` None: the model's."""

    def __init__(self, size: int, config: ModelConfig, context: ParallelContext, dtype: torch.dtype, epsilon: float | None = None) -> None:
        super().__init__()
        self.epsilon = config.norm_epsilon if epsilon is None else epsilon
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=context.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape that ends in ``size`` -> the same."""
        return ops.rms_norm(x, self.weight, self.epsilon)
