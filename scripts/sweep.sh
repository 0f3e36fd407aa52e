#!/usr/bin/env bash
# The paper's Tables 2 and 3 and Figures 1 and 3 to 8: conditional PM at every alpha, and KL, at
# every beta, each a run of stage 3:
#   bash scripts/sweep.sh STAGE3_CONFIG [options] [key.path=value ...]
#   bash scripts/sweep.sh --report DIR   only write tables and figures anew
#   --output DIR         where everything goes (sweep, beside the config's output_dir)
#   --alphas 0.1,0.3,0.5 thresholds of conditional PM
#   --betas 0.1,0.5,1.0
#   --without-pm         leave out unconditional PM, and with it Figure 1
#   --dry-run            check every cell's settings, say what would run, and stop
# Finished cells are not run again; one that was stopped goes on from its latest checkpoint
# (save_steps=100 writes one every 100 iterations).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
    --help | -h) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' scripts/sweep.sh; exit ;;
esac

source scripts/setup.sh
exec python -m step3_rlhf.sweep "$@"
