# What the Qwen2.5-7B scripts beside this file share: the model's sizes, and examples/mcore/shared.sh. Sourced, not run.

source "$(dirname "${BASH_SOURCE[0]}")/../shared.sh"

# Qwen2.5-7B. The same values lie in config.json, which is where they are taken from; a flag that disagrees is an error.
MODEL_ARGS=(
    --use-mcore-models
    --transformer-impl local
    --num-layers 28
    --hidden-size 3584
    --ffn-hidden-size 18944
    --num-attention-heads 28
    --group-query-attention
    --num-query-groups 4
    --untie-embeddings-and-output-weights
    --padded-vocab-size 152064
    --make-vocab-size-divisible-by 1
    --max-position-embeddings 32768
    --position-embedding-type rope
    --use-rotary-position-embeddings
    --rotary-base 1000000
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --swiglu
    --disable-bias-linear
    --add-qkv-bias
    --attention-dropout 0.0
    --hidden-dropout 0.0
    --attention-softmax-in-fp32
    --no-masked-softmax-fusion
    --no-gradient-accumulation-fusion
)
