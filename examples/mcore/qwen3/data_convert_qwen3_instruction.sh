#!/usr/bin/env bash
# Step 2. Alpaca-style records to token files.
#   DATA_PATH       parquet, json, jsonl or csv      (./dataset/train-00000-of-00001-a09b74b3ef9c3b56.parquet)
#   TOKENIZER_PATH  folder with the tokenizer        (./model_from_hf/qwen3_hf)
#   OUTPUT_PREFIX   prefix of the files written      (./finetune_dataset/alpaca)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

DATA_PATH="${DATA_PATH:-./dataset/train-00000-of-00001-a09b74b3ef9c3b56.parquet}"
TOKENIZER_PATH="${TOKENIZER_PATH:-./model_from_hf/qwen3_hf}"
OUTPUT_PREFIX="${OUTPUT_PREFIX:-./finetune_dataset/alpaca}"

run_python data_convert_qwen3_instruction preprocess_data.py \
    --input "$DATA_PATH" \
    --output-prefix "$OUTPUT_PREFIX" \
    --tokenizer-type PretrainedFromHF \
    --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --handler-name AlpacaStyleInstructionHandler \
    --prompt-type qwen3 \
    --enable-thinking none \
    --workers 4 \
    --log-interval 1000 \
    "$@"
