#!/usr/bin/env bash
# All scripts of a family, one after the other, with a small random model on a CPU: about a minute, nothing downloaded.
#   bash examples/mcore/smoke.sh FAMILY [FOLDER]      FOLDER is made, default ./smoke/FAMILY
# SMOKE_TP, SMOKE_PP, SMOKE_EP and NPUS_PER_NODE say at which layout (2 processes; experts: EP 2, else PP 2).
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
FAMILY="${1:-}"
FOLDER="${2:-./smoke/$FAMILY}"
PYTHON="${PYTHON:-python3}"
if [[ ! -f "$HERE/$FAMILY/common.sh" ]]; then
    echo "usage: bash $0 FAMILY [FOLDER], with FAMILY one of $(cd "$HERE" && echo */ | tr -d /)" >&2
    exit 2
fi
if [[ -e "$FOLDER" ]]; then
    echo "$FOLDER is there already: remove it, or name another" >&2
    exit 2
fi

mkdir -p "$FOLDER"
"$PYTHON" "$HERE/smoke_model.py" "$FAMILY" "$FOLDER/model_from_hf/${FAMILY}_hf"
cd "$FOLDER"
ln -s "$HERE/../quickstart/mmlu" mmlu
export SMOKE=1 TASK=
for step in ckpt_convert_*_hf2mcore data_convert_*_instruction tune_*_lora_ptd tune_*_full_ptd generate_*_lora_ptd \
    chat_*_ptd evaluate_*_lora_ptd ckpt_convert_*_mcore2hf_lora; do
    for script in "$HERE/$FAMILY"/$step.sh; do
        [[ -f "$script" ]] || continue # DeepSeek-V3 has no full-parameter script
        echo "==== $(basename "$script")"
        case "$step" in
        data_convert*) DATA_PATH="$HERE/../quickstart/new_facts.json" bash "$script" ;;
        generate*) TASK=greedy bash "$script" ;;
        chat*) printf 'Who lives there?\nq\n' | bash "$script" ;;
        *) bash "$script" ;;
        esac
    done
done
echo "==== all steps of $FAMILY are done; the merged model is in $FOLDER/model_from_hf/${FAMILY}_hf/mg2hg"
