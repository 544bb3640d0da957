#!/usr/bin/env bash
# Step 4. Talk with Mistral-7B, with or without an adapter. q, quit, exit or Ctrl-D ends it; new or clear begins again.
# Variables: ../README.md. Arguments are appended to the command and win.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

chat "$@"
