"""Settings of stage 2, the reward model."""

from training.config import Count
from training.stage_config import SupervisedConfig


class RewardConfig(SupervisedConfig):
    """Trains a scalar head on comparisons (Bradley–Terry–Luce) or rankings (Plackett–Luce)."""

    early_stopping_patience: Count | None = None
    """Evaluations in a row without a better loss after which training ends; null never stops. The
    best weights are the ones saved either way."""
    calibration_bins: Count = 10
    """Equally wide bins of the expected calibration error and the reliability diagram."""
