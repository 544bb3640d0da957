#!/usr/bin/env bash
# Step 4. Qwen3-8B with its adapter, unmerged, answers prompts.
# Variables: ../README.md. Arguments are appended to the command and win.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

generate_lora "$@"
