#!/usr/bin/env bash
# Talk with Llama-3-8B, with or without an adapter. q, quit, exit or Ctrl-D ends it; new or clear begins again.
#   CHECKPOINT      Megatron or Hugging Face folder  (./model_weights/llama3_mcore)
#   CHECKPOINT_LORA adapter, unmerged                (none)
#   TOKENIZER_PATH  folder with the tokenizer        (./model_from_hf/llama3_hf)
#   TP, PP          layout of the run                (1, 2; the files' own layout does not matter)
#   NPUS_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   (2, 1, 0, localhost, 6000)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

CHECKPOINT="${CHECKPOINT:-./model_weights/llama3_mcore}"
TOKENIZER_PATH="${TOKENIZER_PATH:-./model_from_hf/llama3_hf}"
NPUS_PER_NODE="${NPUS_PER_NODE:-2}"
ADAPTER_ARGS=()
if [[ -n "${CHECKPOINT_LORA:-}" ]]; then
    ADAPTER_ARGS=(--lora-load "$CHECKPOINT_LORA" --lora-fusion)
fi

run_distributed chat_llama3_8b_ptd inference.py \
    "${MODEL_ARGS[@]}" \
    "${PARALLEL_ARGS[@]}" \
    ${ADAPTER_ARGS[@]+"${ADAPTER_ARGS[@]}"} \
    --load "$CHECKPOINT" \
    --task chat \
    --prompt-type llama3 \
    --history-turns 3 \
    --tokenizer-type PretrainedFromHF \
    --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --bf16 \
    --use-fused-rmsnorm \
    --use-fused-swiglu \
    --use-fused-rotary-pos-emb \
    --seq-length 4096 \
    --max-new-tokens 512 \
    --seed 42 \
    --exit-on-missing-checkpoint \
    "$@"
