#!/usr/bin/env bash
# Checks a new GPU machine in about ten minutes: what works, how fast, and what does not;
# the options and rows are in step3_rlhf/gpu_check/__main__.py.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python -m step3_rlhf.gpu_check "$@"
