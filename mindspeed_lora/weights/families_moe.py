"""What ``config.json`` says about experts and latent attention, family by family (transformers' configuration classes)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed_lora.weights.config import ExpertShape, LatentShape


def _size(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(key)
    return value


def mixtral_experts(values: Mapping[str, Any]) -> ExpertShape:
    """Every layer has experts of ``intermediate_size``."""
    return ExpertShape(_size(values, "num_local_experts"), _size(values, "intermediate_size"))


def qwen_experts(values: Mapping[str, Any]) -> ExpertShape:
    """Qwen2-MoE (with a gated shared expert) and Qwen3-MoE; a layer is dense if listed, or between two sparse steps."""
    step = values.get("decoder_sparse_step") or 1
    listed = values.get("mlp_only_layers") or []
    dense = tuple(layer for layer in range(_size(values, "num_hidden_layers")) if layer in listed or (layer + 1) % step)
    shared = _size(values, "shared_expert_intermediate_size") if values.get("model_type") == "qwen2_moe" else 0
    count, width = _size(values, "num_experts"), _size(values, "moe_intermediate_size")
    return ExpertShape(count, width, shared, shared_gate=bool(shared), dense_layers=dense)


def deepseek_experts(values: Mapping[str, Any]) -> ExpertShape | None:
    """DeepSeek V2 and V3: the first layers are dense, shared experts lie side by side in one MLP."""
    if not values.get("n_routed_experts"):
        return None
    first, step = values.get("first_k_dense_replace") or 0, values.get("moe_layer_freq") or 1
    dense = tuple(layer for layer in range(_size(values, "num_hidden_layers")) if layer < first or layer % step)
    width = _size(values, "moe_intermediate_size")
    shared = width * int(values.get("n_shared_experts") or 0)
    bias = values.get("model_type") == "deepseek_v3"
    return ExpertShape(_size(values, "n_routed_experts"), width, shared, router_bias=bias, dense_layers=dense)


def latent_shape(values: Mapping[str, Any]) -> LatentShape:
    """Sizes of DeepSeek's attention."""
    return LatentShape(
        q_rank=_size(values, "q_lora_rank") if values.get("q_lora_rank") else None,
        kv_rank=_size(values, "kv_lora_rank"),
        nope_head_dim=_size(values, "qk_nope_head_dim"),
        rope_head_dim=_size(values, "qk_rope_head_dim"),
        value_head_dim=_size(values, "v_head_dim"),
    )
