#!/usr/bin/env bash
# Reproduce. Two sizes:
#   bash run.sh            laptop: the built-in tiny model on the toy tasks, 2 CPU cores, about 5 minutes
#   bash run.sh paper      SFTMix's Table 1 on Alpaca-52K: NTP and SFTMix with Llama-3.1-8B (hub access and one 80 GB GPU per
#                          run with --lora_rank, more for full fine-tuning; not run by us, who have neither)
# Each stage writes runs/<stage>/ and is skipped when that is finished; an interrupted stage is resumed.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python}

stage() {  # stage NAME SCRIPT FLAGS...
  local folder=runs/$1 script=$2
  shift 2
  if [ -f "$folder/summary.json" ]; then echo "$folder is finished"; return; fi
  if [ -f "$folder/config.json" ]; then set -- "$@" --resume; fi
  "$PYTHON" "$script" --output_dir "$folder" "$@"
}

case ${1:-laptop} in
laptop)
  toy=(--model tiny --data toy --eval_data toy --template plain --epochs 3 --lr 1e-3 --seed 0)
  stage toy-ntp sftmix.py "${toy[@]}" --mu 0 --ntp_on full
  stage toy-sftmix sftmix.py "${toy[@]}"
  ;;
paper)
  paper=(--model meta-llama/Llama-3.1-8B --data alpaca --template alpaca --gradient_checkpointing)
  stage paper-ntp sftmix.py "${paper[@]}" --mu 0 --ntp_on full
  stage paper-sftmix sftmix.py "${paper[@]}"
  ;;
*) echo "usage: bash run.sh [laptop|paper]" >&2; exit 2 ;;
esac
