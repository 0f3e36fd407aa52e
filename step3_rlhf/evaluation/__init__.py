"""Measures an aligned policy: `python -m step3_rlhf.evaluation`, through scripts/evaluate.sh."""
