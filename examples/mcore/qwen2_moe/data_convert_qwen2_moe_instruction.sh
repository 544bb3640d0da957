#!/usr/bin/env bash
# Step 2. Alpaca-style records to token files, in Qwen2-57B-A14B's template.
# Variables: ../README.md. Arguments are appended to the command and win.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

data_convert "$@"
