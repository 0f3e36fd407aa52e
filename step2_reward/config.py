"""Settings of stage 2, the reward model."""

from training.config import Count
from training.stage_config import SupervisedConfig


class RewardConfig(SupervisedConfig):
    """Trains a scalar head on comparisons (Bradley–Terry–Luce) or rankings (Plackett–Luce)."""

    script = "step2_reward"

    early_stopping_patience: Count | None = None
    """Evaluations in a row without a better loss after which training ends; null never stops early.
    The weights with the best evaluation loss are saved either way."""
    calibration_bins: Count = 10
    """Equally wide bins of the reliability diagram and the expected calibration error."""


if __name__ == "__main__":  # what scripts/launch.sh starts
    from training.cli import command

    command(RewardConfig, "step2_reward.main")
