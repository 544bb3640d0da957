# Qwen2-57B-A14B-Instruct: what its scripts differ in from other families'. Sourced, not run.

FAMILY=qwen2_moe
MODEL=qwen2-57b-a14b
MODEL_TYPE_HF=qwen2-moe
PROMPT_TYPE=qwen
TP="${TP:-2}" EP="${EP:-8}" ETP="${ETP:-1}" PP="${PP:-1}"

# The same values lie in config.json, which is where they are taken from; a flag that disagrees is an error.
MODEL_ARGS=(
    --num-layers 28
    --hidden-size 3584
    --ffn-hidden-size 18944
    --num-attention-heads 28
    --group-query-attention
    --num-query-groups 4
    --add-qkv-bias
    --padded-vocab-size 151936
    --max-position-embeddings 32768
    --rotary-base 1000000
    --norm-epsilon 1e-6
    --moe-grouped-gemm
    --num-experts 64
    --moe-router-topk 8
    --moe-intermediate-size 2560
    --n-shared-experts 8
    --shared-expert-gate
)

FULL_ARGS=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1)

source "$(dirname "${BASH_SOURCE[0]}")/../shared.sh"
