#!/usr/bin/env bash
# The tests: environment, linter, formatter, types, pytest. From a fresh clone: bash tests/run.sh
#   VENV      virtual environment, is made                    (.venv)
#   PYTHON    interpreter that makes it, 3.10 to 3.12         (python3)
#   SKIP_INSTALL=1 uses $VENV as it is
# Arguments go to pytest: bash tests/run.sh -m full tests/test_layouts.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV="${VENV:-.venv}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

step() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }

if [[ "${SKIP_INSTALL:-0}" != 1 ]]; then
    step "environment in $VENV"
    [[ -x "$VENV/bin/python" ]] || "${PYTHON:-python3}" -m venv "$VENV"
    # torch first and by this exact pin: a looser one brings the newest build with gigabytes of CUDA.
    "$VENV/bin/python" -m pip install --disable-pip-version-check -q torch==2.13.0
    "$VENV/bin/python" -m pip install --disable-pip-version-check -q -e '.[dev]' -c constraints.txt
fi

step "ruff check"
"$VENV/bin/python" -m ruff check .
step "ruff format --check"
"$VENV/bin/python" -m ruff format --check .
step "mypy"
"$VENV/bin/python" -m mypy
step "pytest"
"$VENV/bin/python" -m pytest "$@"
