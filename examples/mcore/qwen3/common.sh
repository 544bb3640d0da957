# Qwen3-8B: what its scripts differ in from other families'. Sourced, not run.

FAMILY=qwen3
MODEL=qwen3-8b
MODEL_TYPE_HF=qwen3
PROMPT_TYPE=qwen3

# The same values lie in config.json, which is where they are taken from; a flag that disagrees is an error.
MODEL_ARGS=(
    --spec mindspeed_llm.tasks.models.spec.qwen3_spec layer_spec
    --num-layers 36
    --hidden-size 4096
    --ffn-hidden-size 12288
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --kv-channels 128
    --qk-layernorm
    --padded-vocab-size 151936
    --max-position-embeddings 40960
    --rotary-base 1000000
    --norm-epsilon 1e-6
)

source "$(dirname "${BASH_SOURCE[0]}")/../shared.sh"
