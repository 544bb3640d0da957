#!/usr/bin/env bash
# Qwen2.5-7B with its adapter, unmerged, answers prompts.
#   CHECKPOINT      Megatron or Hugging Face folder  (./model_weights/qwen25_mcore)
#   CHECKPOINT_LORA the adapter that training saved  (./ckpt/qwen25-7b-lora)
#   TOKENIZER_PATH  folder with the tokenizer        (./model_from_hf/qwen25_hf)
#   TP, PP          layout of the run                (1, 2; the files' own layout does not matter)
#   TASK            one or several in quotes: greedy, do_sample, beam_search, beam_search_with_sampling, chat (greedy do_sample)
#   NPUS_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   (2, 1, 0, localhost, 6000)
# Ask something else: bash generate_qwen25_7b_lora_ptd.sh --prompt "Name three primary colours."
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

CHECKPOINT="${CHECKPOINT:-./model_weights/qwen25_mcore}"
CHECKPOINT_LORA="${CHECKPOINT_LORA:-./ckpt/qwen25-7b-lora}"
TOKENIZER_PATH="${TOKENIZER_PATH:-./model_from_hf/qwen25_hf}"
TASK="${TASK:-greedy do_sample}"
NPUS_PER_NODE="${NPUS_PER_NODE:-2}"
read -r -a TASKS <<<"$TASK"

run_distributed generate_qwen25_7b_lora_ptd inference.py \
    "${MODEL_ARGS[@]}" \
    "${PARALLEL_ARGS[@]}" \
    "${LORA_ARGS[@]}" \
    --lora-fusion \
    --lora-load "$CHECKPOINT_LORA" \
    --load "$CHECKPOINT" \
    --task "${TASKS[@]}" \
    --prompt-type qwen \
    --tokenizer-type PretrainedFromHF \
    --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --bf16 \
    --use-fused-rmsnorm \
    --use-fused-swiglu \
    --use-fused-rotary-pos-emb \
    --seq-length 4096 \
    --max-new-tokens 256 \
    --micro-batch-size 1 \
    --seed 42 \
    --exit-on-missing-checkpoint \
    "$@"
