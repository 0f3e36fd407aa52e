#!/usr/bin/env bash
# A stage on several nodes of a SLURM cluster: an example to copy. From the repository's root, which
# all nodes see:
#   sbatch --nodes 2 scripts/slurm.sh step3_rlhf.sh step3_rlhf/configs/opt-1.3b.json save_steps=100
#SBATCH --job-name=preference-matching
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --signal=USR1@300
# Five minutes before its time is over, every process of the job gets SIGUSR1. The ranks save a
# checkpoint; DeepSpeed's launcher, which would kill them on SIGTERM, ignores it. Submit the job
# again with resume_from_checkpoint=latest to resume it.
set -euo pipefail
if (($# == 0)) || [[ "$1" == --help || "$1" == -h ]]; then
    sed -n '2,/^set /{/^#SBATCH/d; /^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"
    exit
fi
cd "${SLURM_SUBMIT_DIR:?start this with sbatch, from the root of the repository}"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${nodes[0]}"
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export HOSTFILE="$PWD/runs/hosts-$SLURM_JOB_ID"
mkdir -p runs
printf "%s slots=${SLURM_GPUS_ON_NODE:-1}\n" "${nodes[@]}" >"$HOSTFILE"
trap 'rm -f "$HOSTFILE"' EXIT

# One launcher on each node; each starts its own processes, and they meet at MASTER_ADDR.
bash scripts/setup.sh
# shellcheck disable=SC2016
srun --ntasks "${#nodes[@]}" --ntasks-per-node 1 --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}" \
    bash -c 'NODE_RANK="$SLURM_NODEID" exec bash "scripts/$0" "$@"' "$@"
