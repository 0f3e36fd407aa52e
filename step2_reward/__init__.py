"""Stage 2: a reward model from comparisons."""
