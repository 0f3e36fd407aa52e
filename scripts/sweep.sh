#!/usr/bin/env bash
# The paper's Tables 2 and 3 and Figures 1 and 3 to 8: conditional PM at every alpha, and KL, at
# every beta, each a run of stage 3:
#   bash scripts/sweep.sh STAGE3_CONFIG [options] [key.path=value ...]
#   bash scripts/sweep.sh --report DIR [DIR ...]   only write tables and figures anew; of several
#                        sweeps also figure1_perplexity_models, Figure 1 with a panel for each
#   --output DIR         where everything goes (sweep, beside the config's output_dir); with several
#                        to report on, where their joint Figure 1 goes (the first of them)
#   --model-name NAME    for captions, once for each sweep (what SFT started from, as the config.json
#                        of its directory says); with the word OPT in it tables and figures have the
#                        paper's numbers for OPT-1.3B, otherwise those for Llama-2-7B
#   --alphas 0.1,0.3,0.5 thresholds of conditional PM
#   --betas 0.1,0.5,1.0
#   --without-pm         leave out unconditional PM, and with it Figure 1
#   --dry-run            check every cell's settings, say what would run, and stop
# Finished cells are not run again; one that was stopped goes on from its latest checkpoint
# (save_steps=100 writes one every 100 iterations).
# SLURM, one node: sbatch scripts/slurm.sh sweep.sh CONFIG save_steps=100, again until it is done.
# Several nodes: start it once, on one of them, with HOSTFILE and without NODE_RANK; every cell then
# runs on all of them through pdsh and ssh. Or give the cells that --dry-run prints to SLURM, all but
# the reference: sbatch --nodes 2 scripts/slurm.sh step3_rlhf.sh ..., with what follows the script's
# name there; the same command without --dry-run then skips them, measures the reference and
# writes tables and figures. scripts/slurm.sh with sweep.sh on several nodes is refused.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
    --help | -h) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' scripts/sweep.sh; exit ;;
esac

source scripts/setup.sh
exec python -m step3_rlhf.paper.grid "$@"
