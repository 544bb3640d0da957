#!/usr/bin/env bash
# Step 3. Full-parameter fine-tuning of Qwen3-30B-A3B at sequence length 4096.
# Variables: ../README.md. Arguments are appended to the command and win.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

tune_full "$@"
