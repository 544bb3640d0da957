#!/usr/bin/env bash
# Step 6. Merge the adapter into Mixtral-8x7B and write a Hugging Face model.
# Variables: ../README.md. Arguments are appended to the command and win.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

merge "$@"
