"""Rotary position tables in fp32, plain or rescaled as the family's ``rope_scaling`` says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.weights.config import ModelConfig


def _llama3(frequencies: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Llama 3.1: slow waves are stretched by ``factor``, fast ones kept, those between interpolated."""
    factor, low, high = float(scaling["factor"]), float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    original = float(scaling["original_max_position_embeddings"])
    wavelength = 2 * math.pi / frequencies
    smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / factor + smooth * frequencies


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """``[d/2]`` float32 angular steps per position.

    Raises:
        CheckpointError: the rope is unknown or of a kind this version does not have.
    """
    if config.rotary_base is None:
        raise CheckpointError("the rotary base is unknown: no config.json beside the checkpoint says rope_theta; pass --rotary-base")
    exponents = torch.arange(0, config.kv_channels, 2, dtype=torch.int64).float() / config.kv_channels
    frequencies = 1.0 / (config.rotary_base**exponents)
    scaling = config.rope_scaling
    kind = (scaling.get("rope_type") or scaling.get("type") or "default") if scaling else "default"
    if kind == "default":
        return frequencies
    if scaling is not None and kind == "linear":
        return frequencies / float(scaling["factor"])
    if scaling is not None and kind == "llama3":
        return _llama3(frequencies, scaling)
    raise CheckpointError(f"config.json: rope type {kind!r} is not supported; default, linear and llama3 are")


def rotary_tables(inverse: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin ``[s, b or 1, 1, d]`` for ``positions`` ``[b or 1, s]``; angles in fp32, tables in ``dtype``."""
    angles = positions.t().float().unsqueeze(-1) * inverse
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
    return angles.cos().to(dtype), angles.sin().to(dtype)
