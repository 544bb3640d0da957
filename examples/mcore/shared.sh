# What the scripts of every family do. Sourced by each family's common.sh, which first says what the family is; not run.
#
#   FAMILY         folders: ./model_from_hf/FAMILY_hf, ./model_weights/FAMILY_mcore
#   MODEL          results: ./ckpt/MODEL-lora
#   MODEL_TYPE_HF  convert_ckpt.py's word for the family
#   PROMPT_TYPE    template of its chat model
#   MODEL_ARGS     its sizes, as MindSpeed-LLM's scripts give them; what all families have is added here
#   LORA_TARGETS   what the adapter adapts, if not attention and MLPs
#   TP, PP, EP     layout, if not 1, 2, 1; ETP: expert tensor parallel size, if not TP's
#   FULL_ARGS      what full-parameter training needs beside all that
#
# README.md beside this file has the variables of a call. Relative paths are relative to the folder that you call a script from;
# logs go to ./logs there. With SMOKE=1 a step takes seconds on a CPU: see smoke.sh.

set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
PYTHON="${PYTHON:-python3}"
NAME="$(basename "$0" .sh)"

# CANN's environment, where there is one (CANN 9 installs under cann/, older ones under ascend-toolkit/).
for toolkit in cann ascend-toolkit; do
    if [[ -f "/usr/local/Ascend/${toolkit}/set_env.sh" ]]; then
        set +eu # CANN's script reads unset variables
        # shellcheck disable=SC1090
        source "/usr/local/Ascend/${toolkit}/set_env.sh"
        set -eu
        break
    fi
done

HF_DIR="./model_from_hf/${FAMILY}_hf"
MCORE_DIR="./model_weights/${FAMILY}_mcore"
TOKENIZER_PATH="${TOKENIZER_PATH:-$HF_DIR}"
LORA_ARGS=(--lora-r 16 --lora-alpha 32 --lora-target-modules ${LORA_TARGETS:-linear_qkv linear_proj linear_fc1 linear_fc2})

if [[ -n "${SMOKE:-}" ]]; then # a small model of the family lies where the real one would; its sizes are in its config.json
    MODEL_ARGS=(--use-mcore-models --device cpu)
    NPUS_PER_NODE="${NPUS_PER_NODE:-2}"
    NNODES=1
    if ((${EP:-1} > 1)); then
        EP=2 PP=1
    else
        EP=1 PP=2
    fi
    TP="${SMOKE_TP:-1}" PP="${SMOKE_PP:-$PP}" EP="${SMOKE_EP:-$EP}" ETP=
    PROMPT_TYPE=qwen3 # its tokenizer is the quickstart's
    WORKERS=1
    LENGTH_ARGS=(--seq-length 128 --train-iters 3 --global-batch-size 4 --save-interval 3)
    ANSWER_ARGS=(--seq-length 128 --max-new-tokens 4)
    SCORE_ARGS=(--seq-length 512 --max-eval-samples 2 --num-fewshot 1)
else
    MODEL_ARGS=(
        --use-mcore-models
        "${MODEL_ARGS[@]}"
        --untie-embeddings-and-output-weights
        --position-embedding-type rope
        --normalization RMSNorm
        --swiglu
        --disable-bias-linear
    )
    LENGTH_ARGS=(--seq-length 4096 --train-iters 2000 --global-batch-size 32 --save-interval 1000)
    ANSWER_ARGS=(--seq-length 4096 --max-new-tokens 256)
    SCORE_ARGS=(--seq-length 4096)
fi
TP="${TP:-1}" PP="${PP:-2}" EP="${EP:-1}"
PARALLEL_ARGS=(--tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --expert-model-parallel-size "$EP")
TARGET_ARGS=(--target-tensor-parallel-size "$TP" --target-pipeline-parallel-size "$PP" --target-expert-parallel-size "$EP")
if [[ -n "${ETP:-}" ]]; then
    PARALLEL_ARGS+=(--expert-tensor-parallel-size "$ETP")
    TARGET_ARGS+=(--expert-tensor-parallel-size "$ETP")
fi

# run_logged COMMAND...: shows the command, runs it, copies its output to logs/, returns its own exit code.
run_logged() {
    local code=0
    mkdir -p logs
    echo "+ $(printf '%q ' "$@")"
    "$@" 2>&1 | tee "logs/${NAME}.log" || code="${PIPESTATUS[0]}"
    return "$code"
}

# run_python SCRIPT ARGUMENTS...: one process.
run_python() {
    local script="$1"
    shift
    run_logged "$PYTHON" "$ROOT/$script" "$@"
}

# run_distributed SCRIPT ARGUMENTS...: NPUS_PER_NODE processes on each of NNODES machines.
run_distributed() {
    local script="$1"
    shift
    run_logged "$PYTHON" -m torch.distributed.run \
        --nproc_per_node "$NPUS_PER_NODE" --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" \
        --master_addr "${MASTER_ADDR:-localhost}" --master_port "${MASTER_PORT:-6000}" \
        "$ROOT/$script" "$@"
}

# ---- Step 1 and step 6: convert, merge

convert_hf2mcore() {
    run_python convert_ckpt.py \
        --use-mcore-models \
        --model-type GPT \
        --load-model-type hf \
        --save-model-type mg \
        --model-type-hf "$MODEL_TYPE_HF" \
        "${TARGET_ARGS[@]}" \
        --load-dir "${CKPT_LOAD_DIR:-$HF_DIR}" \
        --save-dir "${CKPT_SAVE_DIR:-$MCORE_DIR}" \
        "$@"
}

merge() {
    run_python convert_ckpt.py \
        --use-mcore-models \
        --model-type GPT \
        --load-model-type mg \
        --save-model-type hf \
        --model-type-hf "$MODEL_TYPE_HF" \
        --target-tensor-parallel-size 1 \
        --target-pipeline-parallel-size 1 \
        --load-dir "${CKPT_LOAD_DIR:-$MCORE_DIR}" \
        --lora-load "${CHECKPOINT_LORA:-./ckpt/${MODEL}-lora}" \
        "${LORA_ARGS[@]}" \
        --save-dir "${CKPT_SAVE_DIR:-$HF_DIR}" \
        "$@"
}

# ---- Step 2: preprocess

preprocess() { # INPUT OUTPUT_PREFIX HANDLER ARGUMENTS...
    local input="$1" output="$2" handler="$3"
    shift 3
    run_python preprocess_data.py \
        --input "$input" \
        --output-prefix "$output" \
        --tokenizer-type PretrainedFromHF \
        --tokenizer-name-or-path "$TOKENIZER_PATH" \
        --handler-name "$handler" \
        --prompt-type "$PROMPT_TYPE" \
        --enable-thinking none \
        --workers "${WORKERS:-4}" \
        --log-interval 1000 \
        "$@"
}

data_convert() {
    preprocess "${DATA_PATH:-./dataset/train-00000-of-00001-a09b74b3ef9c3b56.parquet}" \
        "${OUTPUT_PREFIX:-./finetune_dataset/alpaca}" AlpacaStyleInstructionHandler "$@"
}

data_convert_pairwise() {
    preprocess "${DATA_PATH:-./dataset/pairs.json}" "${OUTPUT_PREFIX:-./finetune_dataset/pairs}" AlpacaStylePairwiseHandler "$@"
}

# ---- Step 3: train

train() { # what every kind of training shares, then ARGUMENTS...
    NPUS_PER_NODE="${NPUS_PER_NODE:-8}"
    if ((TP > 1)); then
        PARALLEL_ARGS+=(--sequence-parallel)
    fi
    run_distributed posttrain_gpt.py \
        "${MODEL_ARGS[@]}" \
        "${PARALLEL_ARGS[@]}" \
        "${LENGTH_ARGS[@]}" \
        --finetune \
        --prompt-type "$PROMPT_TYPE" \
        --load "${CKPT_LOAD_DIR:-$MCORE_DIR}" \
        --split 100,0,0 \
        --tokenizer-type PretrainedFromHF \
        --tokenizer-name-or-path "$TOKENIZER_PATH" \
        --bf16 \
        --use-flash-attn \
        --use-fused-rmsnorm \
        --use-fused-swiglu \
        --use-fused-rotary-pos-emb \
        --use-distributed-optimizer \
        --no-pad-to-seq-lengths \
        --micro-batch-size 1 \
        --lr-decay-style cosine \
        --weight-decay 1e-2 \
        --adam-beta1 0.9 \
        --adam-beta2 0.95 \
        --clip-grad 1.0 \
        --seed 42 \
        --log-interval 1 \
        --log-throughput \
        --eval-interval 1000 \
        --eval-iters 0 \
        --no-load-optim \
        --no-load-rng \
        --exit-on-missing-checkpoint \
        --distributed-backend nccl \
        "$@"
}

tune_lora() {
    train "${LORA_ARGS[@]}" \
        --lora-fusion \
        --stage sft \
        --is-instruction-dataset \
        --save "${CKPT_SAVE_DIR:-./ckpt/${MODEL}-lora}" \
        --data-path "${DATA_PATH:-./finetune_dataset/alpaca}" \
        --lr 1e-4 --min-lr 1e-5 --lr-warmup-fraction 0.01 \
        "$@"
}

tune_full() {
    train --stage sft \
        --is-instruction-dataset \
        --save "${CKPT_SAVE_DIR:-./ckpt/${MODEL}-full}" \
        --data-path "${DATA_PATH:-./finetune_dataset/alpaca}" \
        --lr 1.25e-6 --min-lr 1.25e-7 --lr-warmup-fraction 0.01 \
        ${FULL_ARGS[@]+"${FULL_ARGS[@]}"} \
        "$@"
}

dpo_lora() {
    train "${LORA_ARGS[@]}" \
        --lora-fusion \
        --stage dpo \
        --is-pairwise-dataset \
        --dpo-loss-type sigmoid \
        --dpo-beta 0.1 \
        --save "${CKPT_SAVE_DIR:-./ckpt/${MODEL}-dpo}" \
        --data-path "${DATA_PATH:-./finetune_dataset/pairs}" \
        --lr 5e-6 --min-lr 5e-7 --lr-warmup-fraction 0.1 \
        "$@"
}

# ---- Step 4: ask

ask() { # ARGUMENTS...
    local replica=$((TP * PP > EP * ${ETP:-$TP} * PP ? TP * PP : EP * ${ETP:-$TP} * PP)) # one copy of the model
    NPUS_PER_NODE="${NPUS_PER_NODE:-$((replica < 8 ? replica : 8))}"
    run_distributed inference.py \
        "${MODEL_ARGS[@]}" \
        "${PARALLEL_ARGS[@]}" \
        "${ANSWER_ARGS[@]}" \
        --load "${CHECKPOINT:-$MCORE_DIR}" \
        --prompt-type "$PROMPT_TYPE" \
        --tokenizer-type PretrainedFromHF \
        --tokenizer-name-or-path "$TOKENIZER_PATH" \
        --bf16 \
        --use-fused-rmsnorm \
        --use-fused-swiglu \
        --use-fused-rotary-pos-emb \
        --micro-batch-size 1 \
        --seed 42 \
        --exit-on-missing-checkpoint \
        "$@"
}

generate() {
    # shellcheck disable=SC2086 # TASK: one or several words
    ask --task ${TASK:-greedy do_sample} "$@"
}

generate_lora() {
    generate --lora-load "${CHECKPOINT_LORA:-./ckpt/${MODEL}-lora}" "${LORA_ARGS[@]}" --lora-fusion "$@"
}

chat() {
    if [[ -n "${CHECKPOINT_LORA:-}" ]]; then
        set -- --lora-load "$CHECKPOINT_LORA" --lora-fusion "$@"
    fi
    ask --task chat --history-turns 3 "$@"
}

# ---- Step 5: score

evaluate() {
    NPUS_PER_NODE="${NPUS_PER_NODE:-8}"
    # shellcheck disable=SC2086 # TASK: one or several words
    run_distributed evaluation.py \
        "${MODEL_ARGS[@]}" \
        "${PARALLEL_ARGS[@]}" \
        "${SCORE_ARGS[@]}" \
        --load "${CHECKPOINT:-$MCORE_DIR}" \
        --task ${TASK:-mmlu} \
        --task-data-path "${DATA_PATH:-./mmlu/test}" \
        --no-chat-template \
        --max-new-tokens 1 \
        --tokenizer-type PretrainedFromHF \
        --tokenizer-name-or-path "$TOKENIZER_PATH" \
        --bf16 \
        --use-flash-attn \
        --micro-batch-size 1 \
        --seed 42 \
        --no-load-optim \
        --no-load-rng \
        --exit-on-missing-checkpoint \
        "$@"
}

evaluate_lora() {
    evaluate --lora-load "${CHECKPOINT_LORA:-./ckpt/${MODEL}-lora}" "${LORA_ARGS[@]}" --lora-fusion "$@"
}
