#!/usr/bin/env bash
# DPO with LoRA of Qwen3-8B at sequence length 4096; the base with the adapter switched off is the reference.
#   CKPT_LOAD_DIR   Megatron or Hugging Face folder  (./model_weights/qwen3_mcore)
#   CKPT_SAVE_DIR   where checkpoints go             (./ckpt/qwen3-8b-dpo)
#   DATA_PATH       what data_convert_qwen3_pairwise.sh wrote  (./finetune_dataset/pairs)
#   TOKENIZER_PATH  folder with the tokenizer        (./model_from_hf/qwen3_hf)
#   TP, PP          layout of the run                (1, 2; the rest of the processes is data parallel)
#   NPUS_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   (8, 1, 0, localhost, 6000)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

CKPT_LOAD_DIR="${CKPT_LOAD_DIR:-./model_weights/qwen3_mcore}"
CKPT_SAVE_DIR="${CKPT_SAVE_DIR:-./ckpt/qwen3-8b-dpo}"
DATA_PATH="${DATA_PATH:-./finetune_dataset/pairs}"
TOKENIZER_PATH="${TOKENIZER_PATH:-./model_from_hf/qwen3_hf}"
NPUS_PER_NODE="${NPUS_PER_NODE:-8}"

run_distributed dpo_qwen3_8b_4K_lora_ptd posttrain_gpt.py \
    "${MODEL_ARGS[@]}" \
    "${PARALLEL_ARGS[@]}" \
    "${SEQUENCE_PARALLEL_ARGS[@]}" \
    "${LORA_ARGS[@]}" \
    --lora-fusion \
    --stage dpo \
    --is-pairwise-dataset \
    --dpo-loss-type sigmoid \
    --dpo-beta 0.1 \
    --finetune \
    --prompt-type qwen3 \
    --load "$CKPT_LOAD_DIR" \
    --save "$CKPT_SAVE_DIR" \
    --data-path "$DATA_PATH" \
    --split 100,0,0 \
    --tokenizer-type PretrainedFromHF \
    --tokenizer-name-or-path "$TOKENIZER_PATH" \
    --bf16 \
    --use-flash-attn \
    --use-fused-rmsnorm \
    --use-fused-swiglu \
    --use-fused-rotary-pos-emb \
    --use-distributed-optimizer \
    --seq-length 4096 \
    --no-pad-to-seq-lengths \
    --micro-batch-size 1 \
    --global-batch-size 32 \
    --train-iters 500 \
    --lr 5e-6 \
    --min-lr 5e-7 \
    --lr-decay-style cosine \
    --lr-warmup-fraction 0.1 \
    --weight-decay 1e-2 \
    --adam-beta1 0.9 \
    --adam-beta2 0.95 \
    --clip-grad 1.0 \
    --seed 42 \
    --log-interval 1 \
    --log-throughput \
    --save-interval 250 \
    --eval-interval 250 \
    --eval-iters 0 \
    --no-load-optim \
    --no-load-rng \
    --exit-on-missing-checkpoint \
    --distributed-backend nccl \
    "$@"
