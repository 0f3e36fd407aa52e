#!/usr/bin/env bash
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch step3_rlhf.direct.config "$@"
