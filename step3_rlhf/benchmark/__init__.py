"""How fast stage 3 is, and how far from what the machine could do: `bash scripts/benchmark.sh`."""
