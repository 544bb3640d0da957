#!/usr/bin/env bash
# Preference pairs (columns instruction, input, chosen, rejected) to token files, for dpo_qwen3_8b_4K_lora_ptd.sh.
#   DATA_PATH       parquet, json, jsonl or csv      (./dataset/pairs.json)
#   TOKENIZER_PATH  folder with the tokenizer        (./model_from_hf/qwen3_hf)
#   OUTPUT_PREFIX   prefix of the files written      (./finetune_dataset/pairs)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

DATA_PATH="${DATA_PATH:-./dataset/pairs.json}"
TOKENIZER_PATH="${TOKENIZER_PATH:-./model_from_hf/qwen3_hf}"
OUTPUT_PREFIX="${OUTPUT_PREFIX:-./finetune_dataset/pairs}"

run_python data_convert_qwen3_pairwise preprocess_data.py \
    --input "$DATA_PATH" \
    --output-prefix "$OUTPUT_PREFIX" \
    --tokenizer-type PretrainedFromHF \
    --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --handler-name AlpacaStylePairwiseHandler \
    --prompt-type qwen3 \
    --enable-thinking none \
    --workers 4 \
    --log-interval 1000 \
    "$@"
