#!/usr/bin/env bash
# Reproduce. Two sizes:
#   bash run.sh            laptop: the built-in tiny model on the toy tasks, minutes on one CPU core
#   bash run.sh paper      Llama-3.1-8B on Alpaca-52K with NTP and SFTMix (its Table 1), Llama-3.2-1B on TÜLU-2 with Full Coverage and
#                          DynamixSFT, Qwen2.5-3B with a fixed mixture and DynaMiCS. Needs the hub; one 80 GB GPU is enough for the
#                          last four, full fine-tuning of 8B needs more (or add --lora_rank). Not run by us, who have neither.
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
  toy=(--model tiny --eval_data toy --template plain --lr 1e-3 --seed 0)
  stage toy-ntp sftmix.py "${toy[@]}" --data toy --mu 0 --ntp_on full
  stage toy-sftmix sftmix.py "${toy[@]}" --data toy
  stage toy-proportional dynamix_sft.py "${toy[@]}" --data toy --batch_size 32 --sampling proportional
  stage toy-dynamix dynamix_sft.py "${toy[@]}" --data toy --batch_size 32 --update_every 5
  # DynaMiCS: a base model that knows three tasks is to learn two more without losing them
  stage toy-base sftmix.py "${toy[@]}" --data toy/describe toy/copy toy/compare --mu 0 --ntp_on full
  constrained=(--model runs/toy-base/final --data toy --eval_data toy --targets add sort --constraints describe copy compare
    --template plain --lr 5e-4 --lora_rank 0 --max_steps 256 --seed 0)
  stage toy-fixed dynamics.py "${constrained[@]}" --mixture uniform --target_mass 0.5
  stage toy-dynamics dynamics.py "${constrained[@]}"
  ;;
paper)
  alpaca=(--model meta-llama/Llama-3.1-8B --data alpaca --template alpaca --gradient_checkpointing)
  stage paper-ntp sftmix.py "${alpaca[@]}" --mu 0 --ntp_on full
  stage paper-sftmix sftmix.py "${alpaca[@]}"
  tulu=(--model meta-llama/Llama-3.2-1B --data tulu2 --gradient_checkpointing)
  stage paper-proportional dynamix_sft.py "${tulu[@]}" --sampling proportional
  stage paper-dynamix dynamix_sft.py "${tulu[@]}"
  constrained=(--model Qwen/Qwen2.5-3B --data numinamath code_feedback "fineweb#20000" --eval_data gsm8k tinymmlu tinyhellaswag
    --targets gsm8k --constraints tinymmlu tinyhellaswag --accuracy tinymmlu tinyhellaswag)
  stage paper-fixed dynamics.py "${constrained[@]}" --mixture uniform
  stage paper-dynamics dynamics.py "${constrained[@]}"
  ;;
*) echo "usage: bash run.sh [laptop|paper]" >&2; exit 2 ;;
esac
