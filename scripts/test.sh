#!/usr/bin/env bash
# Set-up, lint and tests: bash scripts/test.sh [--all] [pytest arguments]
#   --all  also the slow proofs that CI leaves out
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

selection=(-m "not slow")
if [[ "${1:-}" == --all ]]; then
    selection=()
    shift
fi
ruff check .
ruff format --check .
python -m pytest "${selection[@]}" "$@"
