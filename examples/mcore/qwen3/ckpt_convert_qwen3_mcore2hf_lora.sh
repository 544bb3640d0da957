#!/usr/bin/env bash
# Step 6. Merge the adapter into the base and write a Hugging Face model.
#   CKPT_LOAD_DIR   Megatron folder of the base      (./model_weights/qwen3_mcore)
#   CHECKPOINT_LORA the adapter that step 3 saved    (./ckpt/qwen3-8b-lora)
#   CKPT_SAVE_DIR   Hugging Face folder of the base  (./model_from_hf/qwen3_hf); the result goes to its mg2hg/
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

CKPT_LOAD_DIR="${CKPT_LOAD_DIR:-./model_weights/qwen3_mcore}"
CHECKPOINT_LORA="${CHECKPOINT_LORA:-./ckpt/qwen3-8b-lora}"
CKPT_SAVE_DIR="${CKPT_SAVE_DIR:-./model_from_hf/qwen3_hf}"

run_python ckpt_convert_qwen3_mcore2hf_lora convert_ckpt.py \
    --use-mcore-models \
    --model-type GPT \
    --load-model-type mg \
    --save-model-type hf \
    --model-type-hf qwen3 \
    --target-tensor-parallel-size 1 \
    --target-pipeline-parallel-size 1 \
    --load-dir "$CKPT_LOAD_DIR" \
    --lora-load "$CHECKPOINT_LORA" \
    "${LORA_ARGS[@]}" \
    --save-dir "$CKPT_SAVE_DIR" \
    "$@"
