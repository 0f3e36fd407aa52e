"""What the model card of an aligned policy says of rewards and optimum."""

from collections.abc import Callable
from typing import Any

import pytest

from step3_rlhf.config import PPOConfig
from step3_rlhf.evaluation.card import policy_card
from training.config import check_config


@pytest.mark.parametrize(
    ("reward", "said", "mixed"),
    [
        ({"model_name_or_path": "o/a"}, "`o/a`", False),
        ({"function": "m:f"}, "the function `m:f`", False),
        (
            {
                "models": [
                    {"model_name_or_path": "o/a"},
                    {"model_name_or_path": "o/b", "weight": -2},
                ]
            },
            "the sum of 1 · `o/a`, -2 · `o/b`",
            False,
        ),
        (
            {
                "mixture": [
                    {"model_name_or_path": "o/a", "share": 0.75},
                    {"model_name_or_path": "o/b", "share": 0.25},
                ]
            },
            "a mixture of groups of people: `o/a` (share 0.75), `o/b` (share 0.25)",
            True,
        ),
    ],
)
def test_rewards_and_optimum(
    stage_settings: Callable[[str], dict[str, Any]],
    reward: dict[str, Any],
    said: str,
    mixed: bool,
) -> None:
    settings = stage_settings("ppo") | {"reward": reward, "num_generations": 4}
    config = check_config(PPOConfig, settings, "config:")
    training = policy_card(config, config.regularizer, "PPO", {"split": "test"}).training
    own = config.regularizer.optimum_formula
    mixture = f"the mixture of the groups' optima, each of which is {own}"
    assert training["rewards"] == said
    assert training["its optimum"] == (mixture if mixed else own)
