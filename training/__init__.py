"""What all stages share: configs, data, models, engines, checkpoints, tracking.

This package imports no stage, and no stage imports another.
"""
