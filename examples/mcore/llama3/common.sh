# Llama-3-8B: what its scripts differ in from other families'. Sourced, not run.

FAMILY=llama3
MODEL=llama3-8b
MODEL_TYPE_HF=llama2
PROMPT_TYPE=llama3

# The same values lie in config.json, which is where they are taken from; a flag that disagrees is an error.
MODEL_ARGS=(
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 14336
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --padded-vocab-size 128256
    --max-position-embeddings 8192
    --rotary-base 500000
    --norm-epsilon 1e-5
)

source "$(dirname "${BASH_SOURCE[0]}")/../shared.sh"
