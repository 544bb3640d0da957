# Mistral-7B-Instruct v0.2: what its scripts differ in from other families'. Sourced, not run.

FAMILY=mistral
MODEL=mistral-7b
MODEL_TYPE_HF=llama2
PROMPT_TYPE=mistral

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
)

source "$(dirname "${BASH_SOURCE[0]}")/../shared.sh"
