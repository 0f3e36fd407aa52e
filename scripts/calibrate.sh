#!/usr/bin/env bash
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch step2_reward.calibrate.settings "$@"
