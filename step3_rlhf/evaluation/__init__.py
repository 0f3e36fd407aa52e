"""Measures an aligned policy; scripts/evaluate.sh runs `python -m step3_rlhf.evaluation`."""
