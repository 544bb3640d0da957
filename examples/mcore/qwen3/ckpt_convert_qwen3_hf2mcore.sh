#!/usr/bin/env bash
# Step 1. Qwen3-8B from Hugging Face safetensors to Megatron (V1) files, TP1 PP2, bf16.
#   CKPT_LOAD_DIR  Hugging Face folder              (./model_from_hf/qwen3_hf)
#   CKPT_SAVE_DIR  Megatron folder, is made         (./model_weights/qwen3_mcore)
#   TP, PP         layout of the files              (1, 2)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

CKPT_LOAD_DIR="${CKPT_LOAD_DIR:-./model_from_hf/qwen3_hf}"
CKPT_SAVE_DIR="${CKPT_SAVE_DIR:-./model_weights/qwen3_mcore}"

run_python ckpt_convert_qwen3_hf2mcore convert_ckpt.py \
    --use-mcore-models \
    --model-type GPT \
    --load-model-type hf \
    --save-model-type mg \
    --model-type-hf qwen3 \
    --spec mindspeed_llm.tasks.models.spec.qwen3_spec layer_spec \
    --target-tensor-parallel-size "$TP" \
    --target-pipeline-parallel-size "$PP" \
    --params-dtype bf16 \
    --load-dir "$CKPT_LOAD_DIR" \
    --save-dir "$CKPT_SAVE_DIR" \
    "$@"
