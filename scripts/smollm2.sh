#!/usr/bin/env bash
# Table 2 on a real model and real human preferences, small enough for a CPU: SmolLM2-135M-Instruct
# on Anthropic's harmlessness comparisons, KL against conditional PM (alpha 0.1, 0.3, 0.5), beta 1.
#   bash scripts/smollm2.sh [--data PATH] [--output DIR] [--seed N]
#   --data PATH   harmless-base/test.jsonl.gz of Anthropic/hh-rlhf; without it, the Hub's own
#   --output DIR  folder for everything (runs/smollm2); what is finished there is not run again
#   --seed N      seed of every stage (42)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

directory=runs/smollm2 data="" seed=42

while (($#)); do
    case "$1" in
        --help | -h) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' scripts/smollm2.sh; exit ;;
        --data | --output | --seed)
            (($# > 1)) || usage "$1 needs a value"
            case "$1" in
                --data) data="$(from_there "$2")" ;;
                --output) directory="$(from_there "${2%/}")" ;;
                --seed) seed="$2" ;;
            esac
            shift ;;
        *) usage "unknown argument $1" ;;
    esac
    shift
done
[[ "$seed" =~ ^[0-9]+$ ]] || usage "--seed $seed: a whole number was expected"
[[ -n "$directory" ]] || usage "--output: a directory was expected"
[[ -z "$data" || -f "$data" ]] || usage "--data $data: no such file"

source scripts/setup.sh
source scripts/smollm2_model.sh
model="$directory/SmolLM2-135M-Instruct.gguf"
common=("seed=$seed" "data.cache_dir=$directory/token_ids")
[[ -z "$data" ]] || common+=("data.sources=[\"$data\"]")

# STAGE MODEL: trains from MODEL, unless an earlier call with this seed and data has finished that.
stage() {
    [[ "$(cat "$directory/$1.finished" 2>/dev/null)" != "${common[*]}" ]] || return 0
    bash "scripts/step$1.sh" "step$1/configs/smollm2.json" "${common[@]}" overwrite_output_dir=true \
        "model_name_or_path=$2" "output_dir=$directory/${1#?_}"
    echo "${common[*]}" >"$directory/$1.finished"
}

[[ -f "$model" ]] || fetch_smollm2 "$model"
stage 1_sft "$model"
stage 2_reward "$directory/sft/model"
bash scripts/sweep.sh step3_rlhf/configs/smollm2.json --output "$directory/sweep" \
    --without-pm --alphas 0.1,0.3,0.5 --betas 1.0 "${common[@]}" \
    "model_name_or_path=$directory/sft/model" "reward.model_name_or_path=$directory/reward/model"
