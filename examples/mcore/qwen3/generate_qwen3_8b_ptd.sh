#!/usr/bin/env bash
# Step 4 without LoRA. Qwen3-8B answers prompts.
# Variables: ../README.md. Arguments are appended to the command and win.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

generate "$@"
