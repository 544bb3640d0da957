#!/usr/bin/env bash
# Step 4. DeepSeek-V3 with its adapter, unmerged, answers prompts.
# Variables: ../README.md. Arguments are appended to the command and win.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

generate_lora "$@"
