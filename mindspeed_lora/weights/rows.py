"""Every tensor of every family, once: names on both sides, sizes, and how it is cut.

Letters of ``dims`` are the keys of :func:`sizes`. ``{layer}`` and ``{expert}`` in names stand for global numbers; a row with
``{expert}`` holds for each routed expert. Rows lie in the order of the peer's files.
Sources: the peer's converters (formats.md 1.4) and transformers' ``modeling_*.py`` of the families.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from mindspeed_lora.weights.config import ModelConfig


@dataclass(frozen=True)
class RowSpec:
    """One Megatron tensor before a model's sizes are known; fields as in :class:`mindspeed_lora.weights.table.Row`."""

    megatron: str
    hf: tuple[str, ...]
    dims: tuple[str, ...]  # of each HF part, e.g. "qh" = [q, h]
    axis: int | None = None
    unit: str = "whole"
    place: str = "layer"
    grad_sum: str = "never"
    module: str | None = None
    padded: bool = False
    linear: bool = False  # the peer stores a None under <prefix>._extra_state beside it
    when: Callable[[ModelConfig], bool] = field(default=lambda config: True)
    alias_of: str | None = None
    layers: str = "all"  # "all" | "dense" | "experts"


def sizes(config: ModelConfig) -> dict[str, int]:
    """What each letter of ``dims`` stands for in a model."""
    heads, experts, latent = config.num_attention_heads, config.experts, config.latent
    found = {
        "h": config.hidden_size,
        "f": config.ffn_hidden_size,
        "q": heads * config.kv_channels,
        "k": config.num_query_groups * config.kv_channels,
        "d": config.kv_channels,
        "v": config.vocab_size,
        "o": heads * (latent.value_head_dim if latent else config.kv_channels),  # attention's output
        "1": 1,
    }
    if experts is not None:
        found |= {"E": experts.count, "e": experts.ffn_hidden_size, "s": experts.shared_ffn_hidden_size}
    if latent is not None:
        found |= {
            "a": latent.q_rank or heads * latent.query_head_dim,  # queries' latent, or the queries
            "c": latent.kv_rank,
            "m": latent.kv_rank + latent.rope_head_dim,
            "u": heads * latent.query_head_dim,
            "w": heads * (latent.nope_head_dim + latent.value_head_dim),
        }
    return found


_LAYER, _HF = "decoder.layers.{layer}.", "model.layers.{layer}."
_ATTENTION, _HF_ATTENTION = _LAYER + "self_attention.", _HF + "self_attn."
_QKV = tuple(f"{_HF_ATTENTION}{name}_proj." for name in "qkv")
_EMBEDDING = "embedding.word_embeddings.weight"


def _latent(config: ModelConfig) -> bool:
    return config.latent is not None


def _heads(config: ModelConfig) -> bool:
    return config.latent is None


def _latent_queries(config: ModelConfig) -> bool:
    return config.latent is not None and config.latent.q_rank is not None


def _direct_queries(config: ModelConfig) -> bool:
    return config.latent is not None and config.latent.q_rank is None


def _family(*names: str) -> Callable[[ModelConfig], bool]:
    return lambda config: config.experts is not None and config.family in names


def _gated(name: str, hf: tuple[str, str, str], width: str, layers: str, when: Callable[[ModelConfig], bool]) -> tuple[RowSpec, RowSpec]:
    """The two linears of a gated MLP; ``hf``: gate, up, down."""
    gate, up, down = hf
    return (
        RowSpec(
            f"{name}linear_fc1.weight",
            (gate, up),
            (f"{width}h", f"{width}h"),
            axis=0,
            unit="rank",
            module="linear_fc1",
            linear=True,
            when=when,
            layers=layers,
        ),
        RowSpec(f"{name}linear_fc2.weight", (down,), (f"h{width}",), axis=1, module="linear_fc2", linear=True, when=when, layers=layers),
    )


def _projections(prefix: str) -> tuple[str, str, str]:
    return f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight", f"{prefix}down_proj.weight"


def _norm(megatron: str, hf: str, dims: str, grad_sum: str, when: Callable[[ModelConfig], bool] = lambda config: True) -> RowSpec:
    return RowSpec(megatron, (hf,), (dims,), grad_sum=grad_sum, when=when)


_ATTENTION_ROWS = (
    RowSpec(_ATTENTION + "linear_proj.weight", (_HF_ATTENTION + "o_proj.weight",), ("ho",), axis=1, module="linear_proj", linear=True),
    RowSpec(
        _ATTENTION + "linear_qkv.weight",
        tuple(name + "weight" for name in _QKV),
        ("qh", "kh", "kh"),
        axis=0,
        unit="group",
        module="linear_qkv",
        linear=True,
        when=_heads,
    ),
    RowSpec(
        _ATTENTION + "linear_qkv.bias",
        tuple(name + "bias" for name in _QKV),
        ("q", "k", "k"),
        axis=0,
        unit="group",
        linear=True,
        when=lambda config: config.qkv_bias,
    ),
    _norm(_ATTENTION + "q_layernorm.weight", _HF_ATTENTION + "q_norm.weight", "d", "always", lambda config: config.qk_layernorm),
    _norm(_ATTENTION + "k_layernorm.weight", _HF_ATTENTION + "k_norm.weight", "d", "always", lambda config: config.qk_layernorm),
)


def _down(queries: str, grad_sum: str, when: Callable[[ModelConfig], bool]) -> tuple[RowSpec, RowSpec]:
    """Latent attention's down projection and the norm of its key-value latent, whole on every rank (model/latent_attention.py).

    With a latent for the queries each rank computes its part of the sequence ("sp"); without one, its heads' queries ("always").
    """
    hf = (f"{_HF_ATTENTION}{queries}.weight", _HF_ATTENTION + "kv_a_proj_with_mqa.weight")
    return (
        RowSpec(_ATTENTION + "linear_qkv.weight", hf, ("ah", "mh"), grad_sum=grad_sum, module="linear_qkv", when=when),
        _norm(_ATTENTION + "kv_layernorm.weight", _HF_ATTENTION + "kv_a_layernorm.weight", "c", grad_sum, when),
    )


def _up(name: str, hf: str, dims: str, when: Callable[[ModelConfig], bool]) -> RowSpec:
    return RowSpec(f"{_ATTENTION}{name}.weight", (f"{_HF_ATTENTION}{hf}.weight",), (dims,), axis=0, module=name, linear=True, when=when)


_Q_NORM = _norm(_ATTENTION + "q_layernorm.weight", _HF_ATTENTION + "q_a_layernorm.weight", "a", "sp", _latent_queries)
_LATENT_DOWN, _DIRECT_DOWN = _down("q_a_proj", "sp", _latent_queries), _down("q_proj", "always", _direct_queries)
_LATENT_ROWS = (
    _LATENT_DOWN[0],
    _DIRECT_DOWN[0],
    _Q_NORM,
    _LATENT_DOWN[1],
    _DIRECT_DOWN[1],
    _up("linear_q_up_proj", "q_b_proj", "ua", _latent_queries),
    _up("linear_kv_up_proj", "kv_b_proj", "wc", _latent),
)

_MIXTRAL, _QWEN2, _DEEPSEEK = _family("mixtral"), _family("qwen2_moe"), _family("deepseek_v2", "deepseek_v3")
_NAMED_GATE = _family("qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3")  # experts and router under the usual names
_EXPERT = _LAYER + "mlp.experts.local_experts.{expert}."
_MIXTRAL_EXPERT = _HF + "block_sparse_moe.experts.{expert}."


def _router(megatron: str, hf: str, dims: str, when: Callable[[ModelConfig], bool]) -> RowSpec:
    """Every rank routes all tokens, but weighs its own share of the experts' output: the gradient is partial over TP."""
    return RowSpec(_LAYER + megatron, (_HF + hf,), (dims,), grad_sum="always", when=when, layers="experts")


_EXPERT_ROWS = (
    _router("mlp.router.weight", "block_sparse_moe.gate.weight", "Eh", _MIXTRAL),
    _router("mlp.router.weight", "mlp.gate.weight", "Eh", _NAMED_GATE),
    _router(
        "mlp.router.expert_bias",
        "mlp.gate.e_score_correction_bias",
        "E",
        lambda config: config.experts is not None and config.experts.router_bias,
    ),
    *_gated(
        _EXPERT, (_MIXTRAL_EXPERT + "w1.weight", _MIXTRAL_EXPERT + "w3.weight", _MIXTRAL_EXPERT + "w2.weight"), "e", "experts", _MIXTRAL
    ),
    *_gated(_EXPERT, _projections(_HF + "mlp.experts.{expert}."), "e", "experts", _NAMED_GATE),
    *_gated(_LAYER + "mlp.shared_experts.", _projections(_HF + "mlp.shared_expert."), "s", "experts", _QWEN2),
    *_gated(
        _LAYER + "mlp.shared_experts.",
        _projections(_HF + "mlp.shared_experts."),
        "s",
        "experts",
        lambda config: _DEEPSEEK(config) and config.experts is not None and config.experts.shared_ffn_hidden_size > 0,
    ),
    _router("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight", "1h", _QWEN2),
)


def _head(hf: str, when: Callable[[ModelConfig], bool], alias_of: str | None = None) -> RowSpec:
    return RowSpec("output_layer.weight", (hf,), ("vh",), axis=0, place="head", padded=True, linear=True, when=when, alias_of=alias_of)


ROWS = (
    RowSpec(_EMBEDDING, ("model.embed_tokens.weight",), ("vh",), axis=0, place="embedding", padded=True),
    _norm(_LAYER + "input_layernorm.weight", _HF + "input_layernorm.weight", "h", "sp"),
    *_ATTENTION_ROWS,
    *_LATENT_ROWS,
    _norm(_LAYER + "pre_mlp_layernorm.weight", _HF + "post_attention_layernorm.weight", "h", "sp"),
    *_gated(_LAYER + "mlp.", _projections(_HF + "mlp."), "f", "dense", lambda config: True),
    *_EXPERT_ROWS,
    RowSpec("decoder.final_layernorm.weight", ("model.norm.weight",), ("h",), place="head", grad_sum="sp"),
    _head("lm_head.weight", lambda config: not config.tied_embeddings),
    _head("model.embed_tokens.weight", lambda config: config.tied_embeddings, alias_of=_EMBEDDING),
)

# Keys that both sides may carry and that hold no weight: (end of the name, why it is dropped).
DROPPED = (
    ("._extra_state", "state of transformer-engine's FP8 scaling, None or empty in these models"),
    (".rotary_emb.inv_freq", "computed from the rotary base"),
)
