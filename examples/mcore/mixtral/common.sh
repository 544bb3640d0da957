# Mixtral-8x7B-Instruct: what its scripts differ in from other families'. Sourced, not run.

FAMILY=mixtral
MODEL=mixtral-8x7b
MODEL_TYPE_HF=mixtral
PROMPT_TYPE=mixtral
EP="${EP:-8}" PP="${PP:-1}"

# The same values lie in config.json, which is where they are taken from; a flag that disagrees is an error.
MODEL_ARGS=(
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 14336
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --padded-vocab-size 32000
    --max-position-embeddings 32768
    --rotary-base 1000000
    --norm-epsilon 1e-5
    --moe-grouped-gemm
    --num-experts 8
    --moe-router-topk 2
)

FULL_ARGS=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1)

source "$(dirname "${BASH_SOURCE[0]}")/../shared.sh"
