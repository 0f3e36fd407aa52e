#!/usr/bin/env bash
# Talk to policies; the options are in step3_rlhf/chat/arguments.py.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python -m step3_rlhf.chat "$@"
