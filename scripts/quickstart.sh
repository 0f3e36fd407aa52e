#!/usr/bin/env bash
# Sets up the environment, then runs the bundled world, all three stages, evaluation and the report:
#   bash scripts/quickstart.sh [--full] [--seed N] [--output DIR] [--overwrite] [--only PHASE]
#   bash scripts/quickstart.sh --seeds N,N,... [--output DIR]
#   --full        also maximum entropy and three f-divergences, for the report's Table 1; and further
#                 methods: RLOO, opinions instead of strings, g(r)/Σg, texts beside the rewards,
#                 averaged weights, DPO, direct conditional PM, and two groups of people
#   --seed N      seed of the world and of every stage (42)
#   --seeds N,... everything that --full does, once for each seed, in DIR/seed-N, and a table of all
#                 methods over the seeds; seeds that have a report are not run again
#   --output DIR  folder for everything (runs/quickstart)
#   --overwrite   replace what an earlier quickstart left in DIR
#   --only PHASE  run this phase again, on what the others left in DIR; PHASE is one of
#                 world sft reward calibration kl pm conditional_pm sft_evaluation report
#                 maximum_entropy js_divergence forward_kl chi_squared rloo classes reward_luce
#                 luce ptx ema ema_average dpo direct two_groups reward_group1 reward_group2
#                 reward_pooled weighted_sum pooled mixture
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

PHASES=(world sft reward kl pm conditional_pm)
FURTHER=(maximum_entropy js_divergence forward_kl chi_squared
    rloo classes reward_luce luce ptx ema ema_average dpo direct
    two_groups reward_group1 reward_group2 reward_pooled weighted_sum pooled mixture)
directory=runs/quickstart seed=42 seeds="" full=false overwrite=false only=""

while (($#)); do
    case "$1" in
        --full) full=true ;;
        --overwrite) overwrite=true ;;
        --help | -h) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' scripts/quickstart.sh; exit ;;
        --seed | --seeds | --output | --only)
            (($# > 1)) || usage "$1 needs a value"
            case "$1" in
                --seed) seed="$2" ;;
                --seeds) seeds="$2" ;;
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
if [[ -n "$seeds" ]]; then
    [[ "$seeds" =~ ^[0-9]+(,[0-9]+)*$ ]] || usage "--seeds $seeds: numbers like 42,43 were expected"
    [[ -z "$only" && "$overwrite" == false ]] || usage "--seeds goes with --output alone"
    folders=()
    for seed in ${seeds//,/ }; do
        folders+=("$directory/seed-$seed")
        [[ -e "${folders[-1]}/report.json" ]] ||
            bash scripts/quickstart.sh --full --overwrite --seed "$seed" --output "${folders[-1]}"
    done
    source scripts/setup.sh
    exec python -m step3_rlhf.paper.quickstart.seeds "$directory" "${folders[@]}"
fi
if [[ -n "$only" ]]; then
    known=" ${PHASES[*]} ${FURTHER[*]} calibration sft_evaluation report "
    [[ "$known" == *" $only "* ]] || usage "--only $only: no such phase"
    earlier=("$only")
else
    if [[ "$overwrite" == false && -n "$(ls -A "$directory" 2>/dev/null)" ]]; then
        usage "$directory exists and is not empty; pass --overwrite or another --output DIR"
    fi
    # Nothing else is deleted: DIR may be any folder, with further runs in it.
    earlier=("${PHASES[@]}" "${FURTHER[@]}" token_ids phases.json report.json report.html shares.png
        groups.png)
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

# RUN MODEL DATA: prints where a stage reads and writes. The shipped configs say runs/quickstart,
# and the data of its world.
places() {
    printf '%s\n' "seed=$seed" "output_dir=$directory/$1"
    [[ "$directory" == runs/quickstart && "$3" == world/* ]] || printf '%s\n' \
        "model_name_or_path=$directory/$2" \
        "data.sources=[\"$directory/$3.jsonl\"]" \
        "data.eval_sources=[\"$directory/$3_eval.jsonl\"]" \
        "data.cache_dir=$directory/token_ids"
}

# RUN [WORLD]: the same for stage 3 and its evaluation.
ppo_places() {
    local world="${2:-world}"
    places "$1" sft/model "$world/comparisons"
    [[ "$directory" == runs/quickstart ]] ||
        printf '%s\n' "evaluation.response_sets=$directory/$world/response_sets.jsonl"
    [[ "$directory" == runs/quickstart || "$world" == two_groups ]] ||
        printf '%s\n' "reward.model_name_or_path=$directory/reward/model"
}

# RUN DATA [OVERRIDE...]: trains a reward model.
reward_model() {
    local overrides
    mapfile -t overrides < <(places "$1" sft/model "$2")
    phase "$1" bash scripts/step2_reward.sh step2_reward/configs/quickstart.json \
        "${overrides[@]}" "${@:3}"
}

# RUN CONFIG [OVERRIDE...]: aligns the policy as the config and the overrides say.
align() {
    local overrides script=step3_rlhf.sh world=world
    [[ "$2" != *-direct ]] || script=step3_direct.sh
    [[ "$2" != *-mixture ]] || world=two_groups
    mapfile -t overrides < <(ppo_places "$1" "$world")
    phase "$1" bash "scripts/$script" "step3_rlhf/configs/$2.json" "${overrides[@]}" "${@:3}"
}

# KIND WEIGHT: prints the reward that both groups' models have a half in.
both_groups() {
    local model='{"model_name_or_path": "%s", "%s": 0.5}'
    printf "reward={\"%s\": [$model, $model]}" "$1" \
        "$directory/reward_group1/model" "$2" "$directory/reward_group2/model" "$2"
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
mapfile -t overrides < <(places sft world/base world/texts)
phase sft bash scripts/step1_sft.sh step1_sft/configs/quickstart.json "${overrides[@]}"
reward_model reward world/comparisons
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
    reward_model reward_luce world/comparisons link=softplus
    align luce quickstart "reward.model_name_or_path=$directory/reward_luce/model" \
        'regularizer={"name": "generalized_pl", "g": "softplus", "target": "luce"}'
    align ptx quickstart ptx_coef=0.5 "ptx_data={\"sources\": [\"$directory/world/texts.jsonl\"]}"
    align ema quickstart ema_decay=0.9
    phase ema_average bash scripts/evaluate.sh "$directory/ema" \
        "model_name_or_path=$directory/ema/actor_ema" "output_dir=$directory/ema_average"
    measured="reward.model_name_or_path=$directory/reward/model" # it learns from comparisons alone
    align dpo quickstart-direct "$measured" anchor=null 'regularizer={"name": "kl", "beta": 1.0}'
    align direct quickstart-direct "$measured"
    # The two groups' texts are those of the world, so that its SFT model serves them too.
    phase two_groups python -m training.world --output_dir "$directory/two_groups" --seed "$seed" \
        --groups 2
    reward_model reward_group1 two_groups/comparisons_group1
    reward_model reward_group2 two_groups/comparisons_group2
    reward_model reward_pooled two_groups/comparisons
    align weighted_sum quickstart-mixture "$(both_groups models weight)"
    align pooled quickstart-mixture \
        "reward={\"model_name_or_path\": \"$directory/reward_pooled/model\"}"
    align mixture quickstart-mixture "$(both_groups mixture share)"
fi
evaluate_sft
phase report python -m step3_rlhf.paper.quickstart "$directory"
