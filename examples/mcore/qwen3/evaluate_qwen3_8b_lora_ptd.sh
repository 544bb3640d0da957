#!/usr/bin/env bash
# Step 5. Qwen3-8B with its adapter, unmerged, on MMLU, 5-shot, or other benchmarks. Beside the base: --compare-base.
# Variables: ../README.md. Arguments are appended to the command and win.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

evaluate_lora "$@"
