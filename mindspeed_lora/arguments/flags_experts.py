"""Flags of MindSpeed-LLM's scripts for experts, latent attention and rope scaling.

What describes the model is compared with ``config.json``; what only changes speed or memory is accepted; what would change the
result and is not supported is refused.
"""

from __future__ import annotations

from mindspeed_lora.arguments.flag import CONVERT, EVALUATE, INFER, RUNS, TRAIN, Flag, accepted, active, refused
from mindspeed_lora.arguments.values import COUNT, LAYER_PATTERN, NOT_NEGATIVE, NUMBER, POSITIVE, TEXT, WHOLE, ValueType

CONFIG_SAYS = "config.json describes a model's experts and its attention; leave the flag out"
SAME_RESULT = "it changes speed or memory only; no token is ever dropped, whatever way it travels"
OTHER_CHOICE = "it chooses experts in a way that no family here has"
BALANCING = ("none", "aux_loss", "seq_aux_loss", "pai_megatron_aux_loss", "softmax_topk", "group_limited_greedy")


def _compared(name: str, dest: str, help: str, value: ValueType | None = None, **more: object) -> Flag:
    where = f"architecture.{dest}"
    return active(name, RUNS, "experts and latent attention", help, value, where, default_text="config.json", **more)


EXPERTS = [
    _compared("--num-experts", "experts.count", "routed experts of a layer", COUNT),
    _compared("--moe-router-topk", "experts.top_k", "experts that a token takes", COUNT),
    _compared("--moe-ffn-hidden-size", "experts.ffn_hidden_size", "width inside one routed expert", COUNT),
    _compared("--moe-intermediate-size", "experts.ffn_hidden_size", "the same", COUNT),
    _compared("--moe-shared-expert-intermediate-size", "experts.shared_ffn_hidden_size", "width of the shared experts together", COUNT),
    _compared("--n-shared-experts", "experts.shared_count", "shared experts, each as wide as a routed one", COUNT),
    _compared("--shared-expert-gate", "experts.shared_gate", "a gate scales the shared expert", None),
    _compared("--first-k-dense-replace", "experts.first_dense", "so many first layers are dense; -1: not said", WHOLE),
    _compared(
        "--moe-layer-freq", "experts.layer_pattern", "every so many layers have experts; -1: not said; or [0]*3+[1]*58", LAYER_PATTERN
    ),
    _compared("--norm-topk-prob", "experts.normalize", "the weights of a token's experts sum to one", None),
    _compared("--moe-router-pre-softmax", "experts.pre_softmax", "softmax over all experts, not over the chosen ones", None),
    _compared("--moe-router-score-function", "experts.score", "how logits become scores", TEXT, choices=("softmax", "sigmoid")),
    _compared("--moe-router-num-groups", "experts.groups", "groups of experts that compete first", COUNT),
    _compared("--moe-router-group-topk", "experts.top_groups", "groups whose experts a token may take", COUNT),
    _compared("--moe-router-topk-scaling-factor", "experts.scale", "factor of the weights", POSITIVE),
    _compared("--moe-router-enable-expert-bias", "experts.bias", "a bias takes part in the choice", None),
    active(
        "--moe-grouped-gemm",
        RUNS,
        "experts and latent attention",
        "one grouped product for all experts of a rank, refused where torch has none; without it the device's fastest; same results",
        None,
        "runtime.moe_grouped_gemm",
    ),
    active(
        "--moe-router-load-balancing-type",
        RUNS,
        "experts and latent attention",
        "MindSpeed-LLM's word for how experts are chosen and balanced; how they are chosen is config.json's",
        TEXT,
        "architecture.experts.balancing",
        choices=BALANCING,
        not_yet={"sinkhorn": OTHER_CHOICE, "sparsemixer_topk": OTHER_CHOICE},
        default_text="none",
    ),
]

BALANCE = [
    active(
        "--moe-aux-loss-coeff",
        (TRAIN,),
        "experts and latent attention",
        "coefficient of the load-balancing loss that --moe-router-load-balancing-type names (without it: aux_loss)",
        NOT_NEGATIVE,
        "balance.aux",
        default_text="0, none",
    ),
    active(
        "--seq-aux",
        (TRAIN,),
        "experts and latent attention",
        "the load-balancing loss of none and group_limited_greedy is of each row, not of a micro-batch",
        None,
        "balance.by_row",
    ),
    active(
        "--moe-z-loss-coeff",
        (TRAIN,),
        "experts and latent attention",
        "coefficient of the z loss, which keeps the router's logits small",
        NOT_NEGATIVE,
        "balance.z",
        default_text="0, none",
    ),
    active(
        "--moe-router-bias-update-rate",
        (TRAIN,),
        "experts and latent attention",
        "after each step, an expert with fewer tokens than the mean gets so much more bias, one with more so much less (DeepSeek V3)",
        NOT_NEGATIVE,
        "balance.bias_rate",
        default_text="0, the biases stay",
    ),
    active(
        "--moe-per-layer-logging",
        (TRAIN,),
        "experts and latent attention",
        "log how evenly each layer's experts are used, and its auxiliary losses",
        None,
        "balance.log_layers",
    ),
    *accepted("moe-aux-loss-coeff moe-z-loss-coeff moe-router-bias-update-rate", (INFER, EVALUATE), "it belongs to training", NUMBER),
    *accepted("seq-aux moe-per-layer-logging", (INFER, EVALUATE), "it belongs to training"),
]

LATENT = [
    _compared("--multi-latent-attention", "latent.used", "queries, keys and values come from low-rank latents"),
    _compared("--multi-head-latent-attention", "latent.used", "the same"),
    _compared("--q-lora-rank", "latent.q_rank", "size of the queries' latent", COUNT),
    _compared("--kv-lora-rank", "latent.kv_rank", "size of the keys' and values' latent", COUNT),
    _compared("--qk-head-dim", "latent.nope_head_dim", "part of a query head that is not rotated", COUNT),
    _compared("--qk-nope-head-dim", "latent.nope_head_dim", "the same", COUNT),
    _compared("--qk-pos-emb-head-dim", "latent.rope_head_dim", "part of a query head that is rotated", COUNT),
    _compared("--qk-rope-head-dim", "latent.rope_head_dim", "the same", COUNT),
    _compared("--v-head-dim", "latent.value_head_dim", "size of a value head", COUNT),
]

ROPE_SCALING = [
    _compared("--rope-scaling-factor", "rope_scaling.factor", "factor of yarn and llama3 rope scaling", POSITIVE),
    _compared(
        "--rope-scaling-original-max-position-embeddings",
        "rope_scaling.original_max_position_embeddings",
        "positions before scaling",
        POSITIVE,
    ),
    _compared("--original-max-position-embeddings", "rope_scaling.original_max_position_embeddings", "the same", POSITIVE),
    _compared("--beta-fast", "rope_scaling.beta_fast", "of yarn", NUMBER),
    _compared("--beta-slow", "rope_scaling.beta_slow", "of yarn", NUMBER),
    _compared("--rope-scaling-mscale", "rope_scaling.mscale", "of DeepSeek's yarn", NUMBER),
    _compared("--rope-scaling-mscale-all-dim", "rope_scaling.mscale_all_dim", "of DeepSeek's yarn", NUMBER),
    _compared("--low-freq-factor", "rope_scaling.low_freq_factor", "of llama3", NUMBER),
    _compared("--high-freq-factor", "rope_scaling.high_freq_factor", "of llama3", NUMBER),
]

ACCEPTED = [
    *accepted(
        "moe-token-dispatcher-type",
        RUNS,
        SAME_RESULT,
        TEXT,
        only=("alltoall", "alltoall_seq", "allgather"),
        otherwise="tokens travel by all-to-all; use alltoall",
    ),
    *accepted(
        "moe-permutation-async-comm moe-permute-fusion moe-alltoall-overlap-comm moe-allgather-overlap-comm moe-fb-overlap "
        "use-fused-moe-token-permute-and-unpermute",
        RUNS,
        SAME_RESULT,
    ),
    *accepted(
        "moe-zero-memory",
        RUNS,
        "a memory option; results are the same. Where memory is short: --recompute-granularity full",
        TEXT,
        only=("disable", "level0", "level1"),
        otherwise="use disable, level0 or level1",
    ),
    *accepted(
        "moe-router-dtype",
        RUNS,
        "logits and scores of the router are always in fp32",
        TEXT,
        only=("fp32",),
        otherwise="logits and scores of the router are always in fp32; use fp32, or leave it out",
    ),
    *accepted("router-gating-in-fp32 topk-softmax-in-fp32", RUNS, "logits and scores of the router are always in fp32"),
    *accepted(
        "moe-input-jitter-eps",
        RUNS,
        "the router's input is not disturbed",
        NUMBER,
        only=(0.0,),
        otherwise="noise makes results depend on the parallel layout and is refused; use 0",
    ),
    *accepted("mla-fa-without-pad", RUNS, "the attention kernel is chosen here"),
]

REFUSED = [
    *refused(
        "num-experts moe-ffn-hidden-size moe-intermediate-size moe-router-topk moe-router-load-balancing-type moe-token-dispatcher-type "
        "moe-layer-freq moe-aux-loss-coeff moe-router-num-groups moe-router-group-topk moe-router-topk-scaling-factor "
        "moe-router-score-function moe-router-dtype moe-input-jitter-eps moe-shared-expert-intermediate-size moe-zero-memory "
        "n-shared-experts q-lora-rank kv-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim",
        (CONVERT,),
        CONFIG_SAYS,
        TEXT,
    ),
    *refused(
        "moe-permutation-async-comm moe-alltoall-overlap-comm moe-permute-fusion moe-router-enable-expert-bias moe-fb-overlap "
        "moe-router-pre-softmax seq-aux router-gating-in-fp32 topk-softmax-in-fp32 shared-expert-gate multi-latent-attention "
        "use-fused-moe-token-permute-and-unpermute mla-fa-without-pad",
        (CONVERT,),
        CONFIG_SAYS,
    ),
    *refused(
        "num-zero-experts", (*RUNS, CONVERT), "experts that compute nothing (LongCat) come with a later release; leave the flag out", TEXT
    ),
]

FLAGS: list[Flag] = [*EXPERTS, *BALANCE, *LATENT, *ROPE_SCALING, *ACCEPTED, *REFUSED]
