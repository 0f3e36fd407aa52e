"""The paper's grid of experiments: `python -m step3_rlhf.paper.grid`, through scripts/sweep.sh."""
