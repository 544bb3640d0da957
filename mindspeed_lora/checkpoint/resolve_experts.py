"""What a command line says of experts, latent attention and rope scaling must be what ``config.json`` says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mindspeed_lora.arguments.configs import ArchitectureFlags, ExpertFlags, LatentFlags, RopeScalingFlags
from mindspeed_lora.errors import UsageError
from mindspeed_lora.weights.config import ExpertShape, LatentShape, ModelConfig

Pair = tuple[str, Any, Any, str]
"""A flag, the value it was given (None: it was not), what is found, and the word for it in ``config.json``."""


def disagree(flag: str, passed: Any, source: str, found: Any, word: str) -> UsageError:
    """The error of a value that is not the model's."""
    given = "" if passed is True else f" {passed}"
    return UsageError(f"{flag}{given} contradicts {source}, which says {word} {found}; leave the flag out or load the model it describes")


def check_special_flags(config: ModelConfig, flags: ArchitectureFlags, source: str) -> None:
    """Compare every flag of :mod:`mindspeed_lora.arguments.flags_experts` that was passed.

    Raises:
        UsageError: one of them contradicts ``source``.
    """
    for flag, passed, found, word in (
        *_experts(config, flags.experts),
        *_latent(config.latent, flags.latent),
        *_rope_scaling(config, flags.rope_scaling),
    ):
        if passed is not None and passed != found:
            raise disagree(flag, passed, source, found, word)


def _experts(config: ModelConfig, flags: ExpertFlags) -> Iterator[Pair]:
    """Scripts of dense models pass ``--norm-topk-prob`` too, and -1 where nothing is meant."""
    shape = config.experts
    if shape is None:
        yield "--num-experts", flags.count, 0, "experts"
        yield "--moe-router-topk", flags.top_k, 0, "experts"
        yield "--moe-ffn-hidden-size", flags.ffn_hidden_size, 0, "experts"
        yield "--n-shared-experts", flags.shared_count, 0, "experts"
        return
    yield "--num-experts", flags.count, shape.count, "routed experts"
    yield "--moe-ffn-hidden-size", flags.ffn_hidden_size, shape.ffn_hidden_size, "moe_intermediate_size"
    shared = "the shared experts' width"
    yield "--moe-shared-expert-intermediate-size", flags.shared_ffn_hidden_size, shape.shared_ffn_hidden_size, shared
    yield "--n-shared-experts", flags.shared_count, shape.shared_ffn_hidden_size / shape.ffn_hidden_size, "n_shared_experts"
    yield "--shared-expert-gate", flags.shared_gate, shape.shared_gate, "a gate of the shared expert:"
    yield from _routing(shape, flags)
    yield from _dense_layers(config, shape, flags)


def _routing(shape: ExpertShape, flags: ExpertFlags) -> Iterator[Pair]:
    routing = shape.routing
    yield "--moe-router-topk", flags.top_k, routing.top_k, "num_experts_per_tok"
    yield "--norm-topk-prob", flags.normalize, routing.normalize, "norm_topk_prob"
    if routing.score == "softmax" and routing.normalize and not flags.normalize:  # for the peer, then weights do not sum to one
        yield "--moe-router-pre-softmax without --norm-topk-prob", flags.pre_softmax, "on", "norm_topk_prob"
    yield "--moe-router-score-function", flags.score, routing.score, "a score function"
    yield "--moe-router-topk-scaling-factor", flags.scale, routing.scale, "routed_scaling_factor"
    yield "--moe-router-enable-expert-bias", flags.bias, shape.router_bias, "a bias of the experts:"
    if flags.groups_matter:
        yield "--moe-router-num-groups", flags.groups, routing.groups, "n_group"
        yield "--moe-router-group-topk", flags.top_groups, routing.top_groups, "topk_group"


def _dense_layers(config: ModelConfig, shape: ExpertShape, flags: ExpertFlags) -> Iterator[Pair]:
    """``--first-k-dense-replace`` and ``--moe-layer-freq`` say together which layers are dense."""
    first, pattern = flags.first_dense, flags.layer_pattern
    said = [
        f"{name} {value}"
        for name, value in (("--first-k-dense-replace", first), ("--moe-layer-freq", pattern))
        if value is not None and value != -1
    ]
    if not said:
        return
    layers = range(config.num_layers)
    if isinstance(pattern, tuple):
        with_experts = [layer for layer in layers if layer < len(pattern) and pattern[layer]]
    else:
        step = pattern if pattern is not None and pattern > 0 else 1
        with_experts = [layer for layer in layers if layer % step == 0]
    dense = tuple(layer for layer in layers if layer < (first or 0) or layer not in with_experts)
    yield " with ".join(said) + ": dense layers", dense, shape.dense_layers, "dense layers"


def _latent(shape: LatentShape | None, flags: LatentFlags) -> Iterator[Pair]:
    word = "no latent attention:"
    yield "--multi-latent-attention", flags.used, shape is not None, "latent attention:"
    yield "--q-lora-rank", flags.q_rank, shape and shape.q_rank, "q_lora_rank" if shape else word
    yield "--kv-lora-rank", flags.kv_rank, shape and shape.kv_rank, "kv_lora_rank" if shape else word
    yield "--qk-head-dim", flags.nope_head_dim, shape and shape.nope_head_dim, "qk_nope_head_dim" if shape else word
    yield "--qk-pos-emb-head-dim", flags.rope_head_dim, shape and shape.rope_head_dim, "qk_rope_head_dim" if shape else word
    yield "--v-head-dim", flags.value_head_dim, shape and shape.value_head_dim, "v_head_dim" if shape else word


def _rope_scaling(config: ModelConfig, flags: RopeScalingFlags) -> Iterator[Pair]:
    """Without rope scaling in ``config.json`` the numbers have no effect, as in the peer; ``--rope-scaling-type`` is compared itself."""
    scaling = config.rope_scaling or {}
    for name, flag in (
        ("factor", "--rope-scaling-factor"),
        ("original_max_position_embeddings", "--rope-scaling-original-max-position-embeddings"),
        ("beta_fast", "--beta-fast"),
        ("beta_slow", "--beta-slow"),
        ("mscale", "--rope-scaling-mscale"),
        ("mscale_all_dim", "--rope-scaling-mscale-all-dim"),
        ("low_freq_factor", "--low-freq-factor"),
        ("high_freq_factor", "--high-freq-factor"),
    ):
        if scaling.get(name) is not None:
            yield flag, getattr(flags, name), scaling[name], f"{name} of the rope scaling"
