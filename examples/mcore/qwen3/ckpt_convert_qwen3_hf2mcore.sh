#!/usr/bin/env bash
# Step 1. Qwen3-8B from Hugging Face safetensors to Megatron (V1) files.
# Variables: ../README.md. Arguments are appended to the command and win.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

convert_hf2mcore "$@"
