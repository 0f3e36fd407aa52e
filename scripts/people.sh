#!/usr/bin/env bash
# Real people's answers as the population: SFT, a reward model, KL and conditional preference
# matching on ProtoQA's questions, each answered by about 100 people, and a report.
#   bash scripts/people.sh [--data PATH] [--output DIR] [--model NAME] [--seed N] [--prior PRIOR]
#                          [--form FORM] [--method METHOD] [--only-report]
#   --data PATH    train.jsonl, also .gz, in ProtoQA's own schema; without it, the Hub's proto_qa
#   --output DIR   folder for everything (runs/people); what is finished there is not run again
#   --model NAME   Hub name or directory of a language model; without it, SmolLM2-135M-Instruct
#                  from a package of PyPI, which runs on a CPU
#   --seed N       seed of the two aligned policies (42); the report is over all seeds in DIR
#   --prior PRIOR  what SFT learns: people (answers in people's proportions) or uniform
#   --form FORM    listed (a question is asked with the board's answers, in a random order) or open
#   --method METHOD  how policies are aligned: direct (from people's rankings themselves) or rloo
#                  (from draws and the reward model's rewards)
#   --only-report  write the report again from what is there
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

directory=runs/people data="" model="" seed=42 prior=people form=listed method=direct more=()

while (($#)); do
    case "$1" in
        --help | -h) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' scripts/people.sh; exit ;;
        --only-report) more+=("$1") ;;
        --data | --output | --model | --seed | --prior | --form | --method)
            (($# > 1)) || usage "$1 needs a value"
            case "$1" in
                --data) data="$(from_there "$2")" ;;
                --output) directory="$(from_there "${2%/}")" ;;
                --model) model="$2" ;;
                --seed) seed="$2" ;;
                --prior) prior="$2" ;;
                --form) form="$2" ;;
                --method) method="$2" ;;
            esac
            shift ;;
        *) usage "unknown argument $1" ;;
    esac
    shift
done
[[ "$seed" =~ ^[0-9]+$ ]] || usage "--seed $seed: a whole number was expected"
[[ "$prior" == people || "$prior" == uniform ]] || usage "--prior $prior: people or uniform was expected"
[[ "$form" == listed || "$form" == open ]] || usage "--form $form: listed or open was expected"
[[ "$method" == direct || "$method" == rloo ]] || usage "--method $method: direct or rloo was expected"
[[ -n "$directory" ]] || usage "--output: a directory was expected"
[[ -z "$data" || -f "$data" ]] || usage "--data $data: no such file"
# A model is a Hub name, unless a directory or file lies there.
[[ -z "$model" || ! -e "$(from_there "$model")" ]] || model="$(from_there "$model")"

source scripts/setup.sh
export NUM_PROCESSES="${NUM_PROCESSES:-1}" # the settings are for one process, also on a GPU
if [[ -z "$model" ]]; then
    model="$directory/SmolLM2-135M-Instruct.gguf"
    source scripts/smollm2_model.sh
    [[ -f "$model" || " ${more[*]} " == *" --only-report "* ]] || fetch_smollm2 "$model"
fi
python -m step3_rlhf.paper.people --output "$directory" --model "$model" --seed "$seed" \
    --prior "$prior" --form "$form" --method "$method" ${data:+--data "$data"} "${more[@]}"
