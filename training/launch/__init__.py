"""What happens before torch is imported: GPUs, the launcher, one run per output directory."""
