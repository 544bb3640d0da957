# What the scripts of every family share. Sourced by each family's common.sh, which adds the model; not run.
#
# Relative paths are relative to the folder that you call a script from; logs go to ./logs there.
# Arguments given to a script are appended to its command, so that they win over the script's own:
#   bash examples/mcore/qwen3/tune_qwen3_8b_4K_lora_ptd.sh --train-iters 100 --lr 2e-4

set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
PYTHON="${PYTHON:-python3}"

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

TP="${TP:-1}"
PP="${PP:-2}"
NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"
MASTER_ADDR="${MASTER_ADDR:-localhost}"
MASTER_PORT="${MASTER_PORT:-6000}"

PARALLEL_ARGS=(
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
)
if ((TP > 1)); then
    SEQUENCE_PARALLEL_ARGS=(--sequence-parallel)
else
    SEQUENCE_PARALLEL_ARGS=()
fi

LORA_ARGS=(
    --lora-r 16
    --lora-alpha 32
    --lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2
)

# run_logged NAME COMMAND...: shows the command, runs it, copies its output to logs/NAME.log, returns its own exit code.
run_logged() {
    local name="$1" code=0
    shift
    mkdir -p logs
    echo "+ $(printf '%q ' "$@")"
    "$@" 2>&1 | tee "logs/${name}.log" || code="${PIPESTATUS[0]}"
    return "$code"
}

# run_python NAME SCRIPT ARGUMENTS...: one process.
run_python() {
    local name="$1" script="$2"
    shift 2
    run_logged "$name" "$PYTHON" "$ROOT/$script" "$@"
}

# run_distributed NAME SCRIPT ARGUMENTS...: NPUS_PER_NODE processes on each of NNODES machines.
run_distributed() {
    local name="$1" script="$2"
    shift 2
    run_logged "$name" "$PYTHON" -m torch.distributed.run \
        --nproc_per_node "$NPUS_PER_NODE" --nnodes "$NNODES" --node_rank "$NODE_RANK" \
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \
        "$ROOT/$script" "$@"
}
