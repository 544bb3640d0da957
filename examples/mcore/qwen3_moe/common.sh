# Qwen3-30B-A3B: what its scripts differ in from other families'. Sourced, not run.

FAMILY=qwen3_moe
MODEL=qwen3-30b-a3b
MODEL_TYPE_HF=qwen3-moe
PROMPT_TYPE=qwen3
EP="${EP:-8}" PP="${PP:-1}"

# The same values lie in config.json, which is where they are taken from; a flag that disagrees is an error.
MODEL_ARGS=(
    --spec mindspeed_llm.tasks.models.spec.qwen3_spec layer_spec
    --num-layers 48
    --hidden-size 2048
    --ffn-hidden-size 6144
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 4
    --kv-channels 128
    --qk-layernorm
    --padded-vocab-size 151936
    --max-position-embeddings 40960
    --rotary-base 1000000
    --norm-epsilon 1e-6
    --moe-grouped-gemm
    --num-experts 128
    --moe-router-topk 8
    --moe-intermediate-size 768
    --norm-topk-prob
)

FULL_ARGS=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1)

source "$(dirname "${BASH_SOURCE[0]}")/../shared.sh"
