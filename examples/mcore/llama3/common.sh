# What the Llama-3-8B scripts beside this file share: the model's sizes, and examples/mcore/shared.sh. Sourced, not run.

source "$(dirname "${BASH_SOURCE[0]}")/../shared.sh"

# Llama-3-8B. The same values lie in config.json, which is where they are taken from; a flag that disagrees is an error.
MODEL_ARGS=(
    --use-mcore-models
    --transformer-impl local
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 14336
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --untie-embeddings-and-output-weights
    --padded-vocab-size 128256
    --make-vocab-size-divisible-by 1
    --max-position-embeddings 8192
    --position-embedding-type rope
    --use-rotary-position-embeddings
    --rotary-base 500000
    --normalization RMSNorm
    --norm-epsilon 1e-5
    --swiglu
    --disable-bias-linear
    --attention-dropout 0.0
    --hidden-dropout 0.0
    --attention-softmax-in-fp32
    --no-masked-softmax-fusion
    --no-gradient-accumulation-fusion
)
