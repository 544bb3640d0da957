#!/usr/bin/env bash
# Step 4. Llama-3-8B with its adapter, unmerged, answers prompts.
# Variables: ../README.md. Arguments are appended to the command and win.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

generate_lora "$@"
