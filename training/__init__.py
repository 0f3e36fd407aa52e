"""What every stage shares: configs, data, models, engines, checkpoints, tracking.

Nothing in this package imports a stage; the stages never import one another.
"""
