#!/usr/bin/env bash
# Sets up the environment, then runs the bundled world, all three stages, evaluation and the report:
#   bash scripts/quickstart.sh [--full] [--seed N] [--output DIR] [--overwrite] [--only PHASE]
#   --full        also maximum entropy and three f-divergences, for the report's Table 1; and other
#                 methods: RLOO, opinions instead of strings, DPO and direct conditional PM
#   --seed N      seed of the world and of every stage (42)
#   --output DIR  folder for everything (runs/quickstart)
#   --overwrite   replace what an earlier quickstart left in DIR
#   --only PHASE  run this phase again, on what the others left in DIR; PHASE is one of
#                 world sft reward calibration kl pm conditional_pm sft_evaluation report
#                 maximum_entropy js_divergence forward_kl chi_squared rloo classes dpo direct
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

PHASES=(world sft reward kl pm conditional_pm)
FURTHER=(maximum_entropy js_divergence forward_kl chi_squared rloo classes dpo direct)
directory=runs/quickstart seed=42 full=false overwrite=false only=""

while (($#)); do
    case "$1" in
        --full) full=true ;;
        --overwrite) overwrite=true ;;
        --help | -h) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' scripts/quickstart.sh; exit ;;
        --seed | --output | --only)
            (($# > 1)) || usage "$1 needs a value"
            case "$1" in
                --seed) seed="$2" ;;
                --output) directory="$(from_there "${2%/}")" ;;
                --only) only="$2" ;;
            esac
            shift ;;
        *) usage "unknown argument $1" ;;
    esac
    shift
done
[[ "$seed" =~ ^[0-9]+$ ]] || usage "--seed $seed: a whole number was expected"
[[ -n "$directory" ]] || usage "--output: a directory was expected"
if [[ -n "$only" ]]; then
    known=" ${PHASES[*]} ${FURTHER[*]} calibration sft_evaluation report "
    [[ "$known" == *" $only "* ]] || usage "--only $only: no such phase"
    earlier=("$only")
else
    if [[ "$overwrite" == false && -n "$(ls -A "$directory" 2>/dev/null)" ]]; then
        usage "$directory exists and is not empty; pass --overwrite or another --output DIR"
    fi
    # Nothing else is deleted: DIR may be any folder, with further runs in it.
    earlier=("${PHASES[@]}" "${FURTHER[@]}" token_ids phases.json report.json report.html shares.png)
fi

source scripts/setup.sh
export NUM_PROCESSES="${NUM_PROCESSES:-1}" # the settings are for one process, also on a GPU
mkdir -p "$directory"
(cd "$directory" && rm -rf -- "${earlier[@]}")

# PHASE COMMAND...: runs it, prints how long it took, and adds that to phases.json.
phase() {
    local name="$1" code=0 start
    shift
    [[ -z "$only" || "$only" == "$name" ]] || return 0
    printf '\n=== %s ===\n' "$name"
    start="$(date +%s.%N)"
    "$@" || code=$?
    if ((code)); then
        echo "The quickstart stopped: phase $name failed" >&2
        exit "$code"
    fi
    python - "$directory/phases.json" "$name" "$start" "$@" <<'EOF'
import json, pathlib, shlex, sys, time

path, name, start, *command = sys.argv[1:]
path = pathlib.Path(path)
record = json.loads(path.read_text()) if path.exists() else {"seconds": {}, "commands": {}}
seconds = {**record["seconds"], name: round(time.time() - float(start), 1)}
seconds.pop("total", None)
record["seconds"] = {**seconds, "total": round(sum(seconds.values()), 1)}
record["commands"][name] = shlex.join(command)
path.write_text(json.dumps(record, indent=2) + "\n")
print(f"=== {name}: {seconds[name]:.0f} s, {record['seconds']['total']:.0f} s in all ===")
EOF
}

# RUN MODEL DATA: prints where a stage reads and writes. The shipped configs say runs/quickstart.
places() {
    printf '%s\n' "seed=$seed" "output_dir=$directory/$1"
    [[ "$directory" == runs/quickstart ]] || printf '%s\n' \
        "model_name_or_path=$directory/$2" \
        "data.sources=[\"$directory/world/$3.jsonl\"]" \
        "data.eval_sources=[\"$directory/world/$3_eval.jsonl\"]" \
        "data.cache_dir=$directory/token_ids"
}

# RUN: the same for stage 3 and its evaluation.
ppo_places() {
    places "$1" sft/model comparisons
    [[ "$directory" == runs/quickstart ]] || printf '%s\n' \
        "reward.model_name_or_path=$directory/reward/model" \
        "evaluation.response_sets=$directory/world/response_sets.jsonl"
}

# RUN CONFIG [OVERRIDE...]: aligns the policy as the config and the overrides say.
align() {
    local overrides script=step3_rlhf.sh
    [[ "$2" != *-direct ]] || script=step3_direct.sh
    mapfile -t overrides < <(ppo_places "$1")
    phase "$1" bash "scripts/$script" "step3_rlhf/configs/$2.json" "${overrides[@]}" "${@:3}"
}

# Measures SFT on the same prompts and with the same settings as the aligned policies.
evaluate_sft() {
    local overrides
    mapfile -t overrides < <(
        python - <<'EOF'
import json

config = json.load(open("step3_rlhf/configs/quickstart.json"))
shared = "reward data evaluation response_length rollout_batch_size per_device_eval_batch_size"
print("\n".join(f"{name}={json.dumps(config[name])}" for name in shared.split()))
EOF
        ppo_places sft
    )
    phase sft_evaluation bash scripts/evaluate.sh "$directory/sft" --overwrite "${overrides[@]}"
}

phase world python -m training.world --output_dir "$directory/world" --seed "$seed"
mapfile -t overrides < <(places sft world/base texts)
phase sft bash scripts/step1_sft.sh step1_sft/configs/quickstart.json "${overrides[@]}"
mapfile -t overrides < <(places reward sft/model comparisons)
phase reward bash scripts/step2_reward.sh step2_reward/configs/quickstart.json "${overrides[@]}"
phase calibration bash scripts/calibrate.sh "$directory/reward"
align kl quickstart 'regularizer={"name": "kl", "beta": 1.0}'
align pm quickstart 'regularizer={"name": "pm", "beta": 1.0}'
align conditional_pm quickstart
if [[ "$full" == true || " ${FURTHER[*]} " == *" $only "* ]]; then
    align maximum_entropy quickstart 'regularizer={"name": "maximum_entropy", "tau": 0.5}'
    for name in js_divergence forward_kl chi_squared; do
        align "$name" quickstart \
            "regularizer={\"name\": \"f_divergence\", \"divergence\": \"$name\"}"
    done
    align rloo quickstart-rloo
    align classes quickstart-classes \
        "regularizer.classes.answer_key=$directory/world/answer_key.jsonl"
    measured="reward.model_name_or_path=$directory/reward/model" # it learns from comparisons alone
    align dpo quickstart-direct "$measured" anchor=null 'regularizer={"name": "kl", "beta": 1.0}'
    align direct quickstart-direct "$measured"
fi
evaluate_sft
phase report python -m step3_rlhf.paper.quickstart "$directory"
