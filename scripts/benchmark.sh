#!/usr/bin/env bash
# Measures stage 3, against TRL's PPO if asked: bash scripts/benchmark.sh --help
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
python -m step3_rlhf.benchmark "$@"
