# DeepSeek-V3: what its scripts differ in from other families'. Sourced, not run.

FAMILY=deepseek3
MODEL=deepseek3-671b
MODEL_TYPE_HF=deepseek3
PROMPT_TYPE=deepseek3
LORA_TARGETS="linear_qkv linear_proj linear_q_up_proj linear_kv_up_proj linear_fc1 linear_fc2"
# 8 machines of 8 devices. The released weights are FP8: bring a bf16 copy.
TP="${TP:-8}" EP="${EP:-64}" ETP="${ETP:-1}" PP="${PP:-1}" NNODES="${NNODES:-8}"

# The same values lie in config.json, which is where they are taken from; a flag that disagrees is an error.
MODEL_ARGS=(
    --num-layers 61
    --hidden-size 7168
    --ffn-hidden-size 18432
    --num-attention-heads 128
    --padded-vocab-size 129280
    --max-position-embeddings 163840
    --rotary-base 10000
    --norm-epsilon 1e-6
    --multi-latent-attention
    --q-lora-rank 1536
    --kv-lora-rank 512
    --qk-head-dim 128
    --qk-pos-emb-head-dim 64
    --v-head-dim 128
    --moe-grouped-gemm
    --num-experts 256
    --moe-router-topk 8
    --moe-intermediate-size 2048
    --n-shared-experts 1
    --first-k-dense-replace 3
    --moe-router-num-groups 8
    --moe-router-group-topk 4
    --moe-router-topk-scaling-factor 2.5
    --moe-router-score-function sigmoid
    --moe-router-enable-expert-bias
    --norm-topk-prob
)

source "$(dirname "${BASH_SOURCE[0]}")/../shared.sh"
