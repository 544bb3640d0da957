#!/usr/bin/env bash
# Step 5 without LoRA. Qwen3-8B on MMLU, 5-shot, or other benchmarks.
#   CHECKPOINT      Megatron or Hugging Face folder  (./model_weights/qwen3_mcore)
#   TOKENIZER_PATH  folder with the tokenizer        (./model_from_hf/qwen3_hf)
#   DATA_PATH       root of MMLU, or its test/       (./mmlu/test)
#   TASK            one or several in quotes; then DATA_PATH has a folder of each name (mmlu)
#   TP, PP          layout of the run                (1, 2; the rest of the processes share the questions)
#   NPUS_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   (8, 1, 0, localhost, 6000)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

CHECKPOINT="${CHECKPOINT:-./model_weights/qwen3_mcore}"
TOKENIZER_PATH="${TOKENIZER_PATH:-./model_from_hf/qwen3_hf}"
DATA_PATH="${DATA_PATH:-./mmlu/test}"
TASK="${TASK:-mmlu}"
read -r -a TASKS <<<"$TASK"
NPUS_PER_NODE="${NPUS_PER_NODE:-8}"

run_distributed evaluate_qwen3_8b_ptd evaluation.py \
    "${MODEL_ARGS[@]}" \
    "${PARALLEL_ARGS[@]}" \
    --load "$CHECKPOINT" \
    --task "${TASKS[@]}" \
    --task-data-path "$DATA_PATH" \
    --no-chat-template \
    --max-new-tokens 1 \
    --tokenizer-type PretrainedFromHF \
    --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --bf16 \
    --use-flash-attn \
    --seq-length 4096 \
    --micro-batch-size 1 \
    --seed 42 \
    --no-load-optim \
    --no-load-rng \
    --exit-on-missing-checkpoint \
    "$@"
