#!/usr/bin/env bash
# Set-up, lint, types and tests: bash scripts/test.sh [--fast | --all] [pytest arguments]
#   --fast   only the tests that start no process and take a few seconds at most
#   --all    also the slow proofs that CI leaves out (about half an hour)
#   Without either: what CI runs, in 15 to 20 minutes on two cores.
# Further arguments go to pytest, for example: bash scripts/test.sh tests/step3_rlhf -k kl
# Tests are spread over all cores (WORKERS=1 turns that off, for example for --pdb).
for argument in "$@"; do
    if [[ "$argument" == --help || "$argument" == -h ]]; then
        sed -n '2,/^for /{/^for /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"
        exit
    fi
done
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"

selection=(-m "not slow")
case "${1:-}" in
    --fast)
        selection=(-m "not slow and not launcher and not long")
        export FUZZ_EXAMPLES="${FUZZ_EXAMPLES:-50}" # of 500 damaged configs and records of each kind
        shift
        ;;
    --all)
        selection=()
        export FUZZ_EXAMPLES="${FUZZ_EXAMPLES:-1500}"
        shift
        ;;
esac
workers="${WORKERS:-$(nproc)}"
# A file's tests stay together: they share what is expensive to make. tests/conftest.py puts the files
# that take longest first, so that the cores are done at the same time.
((workers == 1)) || selection+=(--numprocesses "$workers" --dist loadfile --no-loadscope-reorder)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the workers share the cores

ruff check .
ruff format --check .
mypy
python -m pytest "${selection[@]}" "$@"
