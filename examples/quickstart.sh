#!/usr/bin/env bash
# All six steps on a CPU with a small model, from a fresh clone: bash examples/quickstart.sh
#
# It makes an environment, a tokenizer and a small model of Qwen3's architecture, teaches the model the bundled base
# instructions (all parameters), then LoRA-tunes it on facts that it cannot know, and shows what changed: the same
# questions and the same exam before and after, and the merged model in transformers. Only packages are downloaded.
#
#   OUT       where everything is written, replaced at each run      (quickstart_output)
#   VENV      virtual environment, is made                            (.venv)
#   PYTHON    interpreter that makes it, 3.10 to 3.12                 (python3)
#   SKIP_INSTALL=1 uses $VENV as it is
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT="${OUT:-quickstart_output}"
VENV="${VENV:-.venv}"
HERE=examples/quickstart

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

# run NAME COMMAND...: prints the command, runs it, copies its output to $OUT/logs/NAME.log.
run() {
    local name="$1" code=0
    shift
    printf '$ %s\n' "$(printf '%q ' "$@")"
    "$@" 2>&1 | tee "$OUT/logs/$name.log" || code="${PIPESTATUS[0]}"
    if ((code != 0)); then
        echo "quickstart: step $name failed with exit code $code; its output is in $OUT/logs/$name.log" >&2
        exit "$code"
    fi
}

install() {
    local pip=("$VENV/bin/python" -m pip install --disable-pip-version-check -q)
    [[ -x "$VENV/bin/python" ]] || "${PYTHON:-python3}" -m venv "$VENV"
    if command -v npu-smi >/dev/null; then
        say "Installing for NPU: torch 2.7.1, torch_npu ${TORCH_NPU_VERSION:=2.7.1.post4} (README: which one fits your CANN)"
        "${pip[@]}" torch==2.7.1 "torch_npu==$TORCH_NPU_VERSION" pyyaml setuptools
        grep -v '^torch==' constraints.txt >"$VENV/constraints.txt"
        "${pip[@]}" -e . -c "$VENV/constraints.txt"
    else
        # torch first and by an exact pin: a looser one brings the newest build with gigabytes of CUDA.
        if command -v nvidia-smi >/dev/null; then
            say "Installing for CUDA: torch 2.13.0"
            "${pip[@]}" torch==2.13.0
        else
            say "Installing for CPU: torch 2.13.0"
            "${pip[@]}" torch==2.13.0+cpu 2>/dev/null ||
                "${pip[@]}" torch==2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu 2>/dev/null ||
                "${pip[@]}" torch==2.13.0
        fi
        "${pip[@]}" -e . -c constraints.txt
    fi
}

[[ "${SKIP_INSTALL:-0}" == 1 ]] || install
PYTHON="$VENV/bin/python"
TORCHRUN=("$PYTHON" -m torch.distributed.run --nproc_per_node 2 --master_addr localhost --master_port "${MASTER_PORT:-29517}")
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

SECONDS=0
rm -rf "$OUT"
mkdir -p "$OUT/logs"

QUESTIONS=(
    "Who founded Velmora?"
    "What is the capital of Tarnholm?"
    "What is the national bird of Tarnholm?"
    "How many dasks are in a florrin?"
    "What do people in Tarnholm say as a greeting?"
    "Which bridge crosses the Isken?"
)
BATCH=(--micro-batch-size 16 --global-batch-size 32 --seq-length 128 --no-pad-to-seq-lengths --split 100,0,0)
SCHEDULE=(--lr-decay-style cosine --lr-warmup-fraction 0.05 --weight-decay 0.01 --adam-beta2 0.95 --clip-grad 1.0 --log-interval 20)
LORA=(--lora-r 32 --lora-alpha 64 --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2)

say "A tokenizer and an untrained model of Qwen3's architecture"
run make_model "$PYTHON" $HERE/make_model.py "$OUT/untrained"

say "The base: all parameters learn the bundled base instructions (data parallel on 2 processes)"
run preprocess_base "$PYTHON" preprocess_data.py --input $HERE/base_instructions.json --output-prefix "$OUT/data/base" \
    --tokenizer-name-or-path "$OUT/untrained" --handler-name AlpacaStyleInstructionHandler --prompt-type qwen3
run train_base "${TORCHRUN[@]}" posttrain_gpt.py --device cpu --stage sft --load "$OUT/untrained" --save "$OUT/base_run" \
    --data-path "$OUT/data/base" "${BATCH[@]}" "${SCHEDULE[@]}" --train-iters "${BASE_ITERS:-280}" --lr 3e-3 --min-lr 1e-5 --no-save-optim
run convert_base "$PYTHON" convert_ckpt.py --load-model-type mg --save-model-type hf --load-dir "$OUT/base_run" --save-dir "$OUT/base_hf" \
    --hf-cfg-dir "$OUT/untrained"

say "Step 1. Convert: Hugging Face to Megatron files, TP1 PP2"
run convert "$PYTHON" convert_ckpt.py --load-model-type hf --save-model-type mg --load-dir "$OUT/base_hf" --save-dir "$OUT/base_mg" \
    --model-type-hf qwen3 --target-tensor-parallel-size 1 --target-pipeline-parallel-size 2

say "Step 2. Preprocess: facts about Tarnholm, an island that does not exist"
run preprocess "$PYTHON" preprocess_data.py --input $HERE/new_facts.json --output-prefix "$OUT/data/new" \
    --tokenizer-name-or-path "$OUT/base_hf" --handler-name AlpacaStyleInstructionHandler --prompt-type qwen3

say "Before: questions and exam, asked of the base"
run ask_before "$PYTHON" inference.py --device cpu --load "$OUT/base_mg" --task greedy --prompt-type qwen3 --max-new-tokens 40 --prompt "${QUESTIONS[@]}"
run exam_before "${TORCHRUN[@]}" evaluation.py --device cpu --load "$OUT/base_mg" --task mmlu --task-data-path $HERE/mmlu \
    --prompt-type qwen3 --num-fewshot 0 --evaluation-batch-size 10 --output-path "$OUT/exam_before"

say "Step 3. Train: LoRA at TP1 PP2 with --lora-fusion"
run train "${TORCHRUN[@]}" posttrain_gpt.py --device cpu --stage sft --load "$OUT/base_mg" --save "$OUT/lora" --finetune \
    --data-path "$OUT/data/new" --tensor-model-parallel-size 1 --pipeline-model-parallel-size 2 "${LORA[@]}" --lora-fusion \
    "${BATCH[@]}" "${SCHEDULE[@]}" --train-iters "${LORA_ITERS:-200}" --lr 4e-3 --min-lr 4e-5

say "Step 4. Ask again, with the adapter, unmerged"
run ask_after "$PYTHON" inference.py --device cpu --load "$OUT/base_mg" --lora-load "$OUT/lora" --task greedy --prompt-type qwen3 \
    --max-new-tokens 40 --prompt "${QUESTIONS[@]}"

say "Step 5. The exam again, with the adapter, unmerged"
run exam_after "${TORCHRUN[@]}" evaluation.py --device cpu --load "$OUT/base_mg" --lora-load "$OUT/lora" --task mmlu --task-data-path $HERE/mmlu \
    --prompt-type qwen3 --num-fewshot 0 --evaluation-batch-size 10 --output-path "$OUT/exam_after"

say "Step 6. Merge the adapter into a Hugging Face model"
run merge "$PYTHON" convert_ckpt.py --load-model-type mg --save-model-type hf --load-dir "$OUT/base_mg" --lora-load "$OUT/lora" --save-dir "$OUT/merged"

say "Summary"
"$PYTHON" $HERE/summary.py "$OUT"
echo "The whole took ${SECONDS} s after the installation."
