#!/usr/bin/env bash
# DPO with LoRA of Qwen3-8B at sequence length 4096; the base with the adapter switched off is the reference.
# Variables: ../README.md. Arguments are appended to the command and win.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

dpo_lora "$@"
