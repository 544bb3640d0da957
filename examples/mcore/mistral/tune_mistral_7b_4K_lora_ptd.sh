#!/usr/bin/env bash
# Step 3. LoRA fine-tuning of Mistral-7B at sequence length 4096.
# Variables: ../README.md. Arguments are appended to the command and win.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

tune_lora "$@"
