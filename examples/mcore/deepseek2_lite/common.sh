# DeepSeek-V2-Lite-Chat: what its scripts differ in from other families'. Sourced, not run.

FAMILY=deepseek2_lite
MODEL=deepseek2-lite-16b
MODEL_TYPE_HF=deepseek2-lite
PROMPT_TYPE=deepseek2-lite
LORA_TARGETS="linear_qkv linear_proj linear_kv_up_proj linear_fc1 linear_fc2"
EP="${EP:-8}" PP="${PP:-1}"

# The same values lie in config.json, which is where they are taken from; a flag that disagrees is an error.
MODEL_ARGS=(
    --num-layers 27
    --hidden-size 2048
    --ffn-hidden-size 10944
    --num-attention-heads 16
    --padded-vocab-size 102400
    --max-position-embeddings 163840
    --rotary-base 10000
    --norm-epsilon 1e-6
    --multi-latent-attention
    --kv-lora-rank 512
    --qk-head-dim 128
    --qk-pos-emb-head-dim 64
    --v-head-dim 128
    --moe-grouped-gemm
    --num-experts 64
    --moe-router-topk 6
    --moe-intermediate-size 1408
    --n-shared-experts 2
    --first-k-dense-replace 1
)

FULL_ARGS=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1)

source "$(dirname "${BASH_SOURCE[0]}")/../shared.sh"
