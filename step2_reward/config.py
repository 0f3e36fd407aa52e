"""Settings of stage 2, the reward model."""

from training.config import Count
from training.preferences.links import LinkName
from training.stage_config import SupervisedConfig


class RewardConfig(SupervisedConfig):
    """Trains a scalar head on comparisons (Bradley–Terry–Luce) or rankings (Plackett–Luce)."""

    script = "step2_reward"

    link: LinkName = "exponential"
    """Link g of the preference probabilities g(r)/(g(r) + g(r')): "exponential" is Bradley-Terry,
    the others are section 3.4's generalized models, of which stage 3's generalized_pl must name the
    same g. The power link is not among them, because it needs positive rewards."""
    early_stopping_patience: Count | None = None
    """Evaluations in a row without a better loss after which training ends; null never stops early.
    The weights with the best evaluation loss are saved either way."""
    calibration_bins: Count = 10
    """Equally wide bins of the reliability diagram and the expected calibration error."""


if __name__ == "__main__":  # what scripts/launch.sh starts
    from training.cli import command

    command(RewardConfig, "step2_reward.main")
