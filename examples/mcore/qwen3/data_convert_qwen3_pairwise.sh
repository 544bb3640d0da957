#!/usr/bin/env bash
# Preference pairs (columns instruction, input, chosen, rejected) to token files, for dpo_qwen3_8b_4K_lora_ptd.sh.
# Variables: ../README.md. Arguments are appended to the command and win.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

data_convert_pairwise "$@"
