# Qwen2.5-7B: what its scripts differ in from other families'. Sourced, not run.

FAMILY=qwen25
MODEL=qwen25-7b
MODEL_TYPE_HF=llama2
PROMPT_TYPE=qwen

# The same values lie in config.json, which is where they are taken from; a flag that disagrees is an error.
MODEL_ARGS=(
    --num-layers 28
    --hidden-size 3584
    --ffn-hidden-size 18944
    --num-attention-heads 28
    --group-query-attention
    --num-query-groups 4
    --add-qkv-bias
    --padded-vocab-size 152064
    --max-position-embeddings 32768
    --rotary-base 1000000
    --norm-epsilon 1e-6
)

source "$(dirname "${BASH_SOURCE[0]}")/../shared.sh"
