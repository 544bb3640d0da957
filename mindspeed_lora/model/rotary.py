"""Rotary position tables in fp32, plain or rescaled as the family's ``rope_scaling`` says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.weights.config import ModelConfig

RotaryTables = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, see :func:`rotary_tables`."""


def _llama3(frequencies: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Llama 3.1: slow waves are stretched by ``factor``, fast ones kept, those between interpolated."""
    factor, low, high = float(scaling["factor"]), float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    original = float(scaling["original_max_position_embeddings"])
    wavelength = 2 * math.pi / frequencies
    smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / factor + smooth * frequencies


def _yarn_factor(config: ModelConfig, scaling: Mapping[str, Any]) -> float:
    """How many times the context was stretched."""
    if scaling.get("factor"):
        return float(scaling["factor"])
    return (config.max_position_embeddings or 1) / _yarn_original(config, scaling)


def _yarn_original(config: ModelConfig, scaling: Mapping[str, Any]) -> float:
    return float(scaling.get("original_max_position_embeddings") or config.max_position_embeddings or 1)


def _yarn(frequencies: torch.Tensor, config: ModelConfig, scaling: Mapping[str, Any]) -> torch.Tensor:
    """YaRN: waves that turn fewer than ``beta_slow`` times in the original context are stretched, those of more than ``beta_fast``
    kept, and those between blended along a ramp over the dims. Source: Peng et al., "YaRN" (2023), section 3.2.
    """
    size, base, original = 2 * len(frequencies), config.rotary_base or 1.0, _yarn_original(config, scaling)

    def dim_of(rotations: float) -> float:
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dim_of(float(scaling.get("beta_fast") or 32)), dim_of(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (torch.arange(len(frequencies), dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    stretched = ramp.clamp(0.0, 1.0)
    return frequencies / _yarn_factor(config, scaling) * stretched + frequencies * (1 - stretched)


def _mscale(factor: float, weight: float) -> float:
    """YaRN's temperature: ``0.1 weight ln(factor) + 1``."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotary_scale(config: ModelConfig) -> float:
    """What cos and sin are multiplied by: 1 but for YaRN."""
    scaling = config.rope_scaling
    if scaling is None or _kind(scaling) != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor, mscale, all_dims = _yarn_factor(config, scaling), scaling.get("mscale"), scaling.get("mscale_all_dim")
    return _mscale(factor, mscale) / _mscale(factor, all_dims) if mscale and all_dims else _mscale(factor, 1.0)


def softmax_scale(config: ModelConfig) -> float:
    """Factor of latent attention's scores: ``1 / sqrt(query head dim)``, times ``mscale_all_dim``'s temperature squared."""
    assert config.latent is not None
    scale, scaling = config.latent.query_head_dim**-0.5, config.rope_scaling or {}
    weight = float(scaling.get("mscale_all_dim") or 0.0)
    return scale * _mscale(_yarn_factor(config, scaling), weight) ** 2 if weight else scale


def _kind(scaling: Mapping[str, Any]) -> str:
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """``[d/2]`` float32 angular steps per position; d is the head dim, with latent attention the part of it that is rotated.

    Raises:
        CheckpointError: the rope is unknown or of a kind this version does not have.
    """
    if config.rotary_base is None:
        raise CheckpointError("the rotary base is unknown: no config.json beside the checkpoint says rope_theta; pass --rotary-base")
    size = config.latent.rope_head_dim if config.latent else config.kv_channels
    exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    frequencies = 1.0 / (config.rotary_base**exponents)
    scaling = config.rope_scaling or {}
    kind = _kind(scaling)
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / float(scaling["factor"])
    if kind == "llama3":
        return _llama3(frequencies, scaling)
    if kind == "yarn":
        return _yarn(frequencies, config, scaling)
    raise CheckpointError(f"config.json: rope type {kind!r} is not supported; default, linear, llama3 and yarn are")


def rotary_tables(inverse: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype, scale: float = 1.0) -> RotaryTables:
    """cos and sin ``[s, b or 1, 1, d]`` for ``positions`` ``[b or 1, s]``, times ``scale``; angles in fp32, tables in ``dtype``."""
    angles = positions.t().float().unsqueeze(-1) * inverse
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)
