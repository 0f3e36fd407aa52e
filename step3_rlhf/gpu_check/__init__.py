"""The ten-minute check of a new GPU machine: `bash scripts/gpu_check.sh`."""
