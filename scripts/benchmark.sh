#!/usr/bin/env bash
# Measures stage 3, against the arithmetic floor and, if asked, against TRL's PPO:
#   bash scripts/benchmark.sh [--shape NAME | --config STAGE3.json] [--against trl] [options]
#   --shape NAME     random weights: tiny, small (the default), base or gpu
#   --config FILE    a stage-3 config with its own models and data
#   --against trl    run TRL's PPO in turn with ours, in an environment of its own
#   --pairs N        runs of each (3)
#   --iterations N   iterations that count in each run (3)
#   --scaling        how the cost grows with responses and with length, and a figure of it
#   --bf16           run ours in bfloat16 too
#   --output DIR     folder for the models, logs and benchmark.json (runs/benchmark)
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
python -m step3_rlhf.benchmark "$@"
