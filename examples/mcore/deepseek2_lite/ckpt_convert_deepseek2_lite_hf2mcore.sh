#!/usr/bin/env bash
# Step 1. DeepSeek-V2-Lite from Hugging Face safetensors to Megatron (V1) files.
# Variables: ../README.md. Arguments are appended to the command and win.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

convert_hf2mcore "$@"
