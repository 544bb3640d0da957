#!/usr/bin/env bash
# Every measure that needs a GPU, within about 10 minutes, from a bare checkout; results go to RESULTS.md and results/.
#   bash benchmarks/gpu_all.sh            on a machine with a GPU
#   bash benchmarks/gpu_all.sh --dry-run  on a CPU: that the scripts run
# On a lent device machine: bash benchmarks/gpu_all.sh; cp -r benchmarks/results benchmarks/RESULTS.md "$OUT"
set -uo pipefail
cd "$(dirname "$0")/.."
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
failed=0
run() { echo "== $*"; timeout 200 python "$@" || { echo "FAILED: $*"; failed=1; }; }
if [ "${1:-}" = --dry-run ]; then
  run benchmarks/memory_estimate.py --dry-run
  run benchmarks/memory_estimate.py --experts --dry-run
  run benchmarks/experts_grouped.py --dry-run
  run benchmarks/train_step_gpu.py --dry-run
  run benchmarks/train_step_gpu.py --dry-run --recompute full
  run benchmarks/train_step_scaling.py --dry-run
  run benchmarks/lora_layer.py --dry-run
  run benchmarks/decode_bandwidth.py --dry-run
  exit $failed
fi
run benchmarks/train_step_gpu.py
run benchmarks/train_step_gpu.py --recompute full
run benchmarks/memory_estimate.py --device cuda
run benchmarks/train_step_gpu.py --length 1024 --rows 4 --rounds 3
run benchmarks/train_step_gpu.py --rank 64 --rounds 3
run benchmarks/train_step_scaling.py --device cuda --rounds 3
run benchmarks/lora_layer.py --device cuda
run benchmarks/experts_grouped.py --device cuda
run benchmarks/memory_estimate.py --experts --device cuda
run benchmarks/decode_bandwidth.py --output benchmarks/results/decode_bandwidth.json
exit $failed
