#!/usr/bin/env bash
# The paper's Tables 2 and 3 and Figures 1 and 3 to 8: conditional PM at every alpha, and KL, at
# every beta, each of them a run of stage 3:
#   bash scripts/sweep.sh STAGE3_CONFIG [options] [key.path=value ...]
#   bash scripts/sweep.sh --report DIR [DIR ...]   only write the tables and figures again; several
#                        sweeps also get figure1_perplexity_models, Figure 1 with a panel for each
#   --output DIR         folder for everything (sweep, beside the config's output_dir); with several
#                        sweeps to report on, folder of their joint Figure 1 (the first sweep's)
#   --model-name NAME    name of the model in captions, once for each sweep (what SFT started from, as
#                        the config.json in its directory says)
#   --paper-model MODEL  number tables and figures as the paper does for llama-2-7b (the default) or
#                        opt-1.3b; once for each sweep
#   --alphas 0.1,0.3,0.5 thresholds of conditional PM; of a config with log_alpha their logarithms, as
#                        in --alphas=-60,-30
#   --betas 0.1,0.5,1.0
#   --without-pm         leave out unconditional PM, and with it Figure 1
#   --dry-run            check every cell's settings, say what would run, and stop
# Finished cells are not run again; a cell that was stopped resumes from its latest checkpoint
# (save_steps=100 writes one every 100 iterations).
# SLURM, one node: sbatch scripts/slurm.sh sweep.sh CONFIG save_steps=100; repeat it until it is done.
# Several nodes: start the sweep once, on one of them, with HOSTFILE and without NODE_RANK; every cell
# then runs on all nodes through pdsh and ssh. Or submit each training command that --dry-run prints
# (all but the reference) to SLURM: sbatch --nodes 2 scripts/slurm.sh step3_rlhf.sh ARGUMENTS. The
# same sweep without --dry-run then skips these cells, measures the reference and writes tables and
# figures. scripts/slurm.sh with sweep.sh on several nodes is refused.
set -euo pipefail
case "${1:-}" in
    --help | -h) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; exit ;;
esac

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python -m step3_rlhf.paper.grid "$@"
