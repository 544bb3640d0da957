#!/usr/bin/env bash
# Step 5 without LoRA. Qwen2.5-7B on MMLU, 5-shot, or other benchmarks.
# Variables: ../README.md. Arguments are appended to the command and win.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

evaluate "$@"
