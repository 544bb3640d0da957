"""What ``config.json`` says about experts and latent attention, family by family (transformers' configuration classes)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed_lora.weights.config import ExpertShape, LatentShape, Routing


def _size(values: Mapping[str, Any], *keys: str) -> int:
    """The first of ``keys`` that is there."""
    key = next((key for key in keys if key in values), keys[0])
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(key)
    return value


def _top_k(values: Mapping[str, Any], count: int, default: int) -> int:
    """``num_experts_per_tok``, or transformers' default where the file does not say (at most all of them)."""
    if values.get("num_experts_per_tok") is None:
        return min(default, count)
    top_k = _size(values, "num_experts_per_tok")
    if top_k > count:
        raise ValueError(f"num_experts_per_tok of at most {count}")
    return top_k


def mixtral_experts(values: Mapping[str, Any]) -> ExpertShape:
    """Every layer has experts of ``intermediate_size``."""
    count = _size(values, "num_local_experts")
    routing = Routing(_top_k(values, count, 2), normalize=True)
    return ExpertShape(count, _size(values, "intermediate_size"), routing=routing)


def qwen_experts(values: Mapping[str, Any]) -> ExpertShape:
    """Qwen2-MoE (with a gated shared expert) and Qwen3-MoE; a layer is dense if listed, or between two sparse steps."""
    step = values.get("decoder_sparse_step") or 1
    listed = values.get("mlp_only_layers") or []
    dense = tuple(layer for layer in range(_size(values, "num_hidden_layers")) if layer in listed or (layer + 1) % step)
    shared = _size(values, "shared_expert_intermediate_size") if values.get("model_type") == "qwen2_moe" else 0
    count = _size(values, "num_experts", "num_local_experts")  # Qwen3-MoE as transformers 5 writes it: the latter
    width = _size(values, "moe_intermediate_size")
    routing = Routing(
        _top_k(values, count, 4 if shared else 8),
        normalize=bool(values.get("norm_topk_prob", False)),
    )
    return ExpertShape(count, width, shared, shared_gate=bool(shared), dense_layers=dense, routing=routing)


def deepseek_experts(values: Mapping[str, Any]) -> ExpertShape | None:
    """DeepSeek V2 and V3: the first layers are dense, shared experts lie side by side in one MLP."""
    if not values.get("n_routed_experts"):
        return None
    first, step = values.get("first_k_dense_replace") or 0, values.get("moe_layer_freq") or 1
    dense = tuple(layer for layer in range(_size(values, "num_hidden_layers")) if layer < first or layer % step)
    width = _size(values, "moe_intermediate_size")
    shared = width * int(values.get("n_shared_experts") or 0)
    third = values.get("model_type") == "deepseek_v3"
    count = _size(values, "n_routed_experts")
    grouped = third or values.get("topk_method") == "group_limited_greedy"
    routing = Routing(
        _top_k(values, count, 8 if third else 6),
        normalize=third and bool(values.get("norm_topk_prob", True)),  # transformers' V2 never normalises
        score="sigmoid" if third else "softmax",
        scale=float(values.get("routed_scaling_factor", 2.5 if third else 1.0)),
        groups=int(values.get("n_group", 8 if third else 1) or 1) if grouped else 1,
        top_groups=int(values.get("topk_group", 4 if third else 1) or 1) if grouped else 1,
        group_score="top2" if third else "max",
    )
    return ExpertShape(count, width, shared, router_bias=third, dense_layers=dense, routing=routing)


def latent_shape(values: Mapping[str, Any]) -> LatentShape:
    """Sizes of DeepSeek's attention."""
    return LatentShape(
        q_rank=_size(values, "q_lora_rank") if values.get("q_lora_rank") else None,
        kv_rank=_size(values, "kv_lora_rank"),
        nope_head_dim=_size(values, "qk_nope_head_dim"),
        rope_head_dim=_size(values, "qk_rope_head_dim"),
        value_head_dim=_size(values, "v_head_dim"),
        interleaved=values.get("model_type") != "deepseek_v3" or bool(values.get("rope_interleave", True)),
    )
