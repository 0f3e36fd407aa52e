"""Stage 3: reinforcement learning from human feedback with a pluggable regularizer."""
