"""What direct optimization refuses, and what its config needs."""

from collections.abc import Callable
from typing import Any

import pytest

from step3_rlhf.config import EvaluationConfig
from step3_rlhf.direct.config import DirectConfig
from training.config import check_config
from training.errors import UserError

Settings = Callable[[str], dict[str, Any]]


@pytest.fixture
def config(stage_settings: Settings) -> Callable[..., DirectConfig]:
    def checked(**changes: Any) -> DirectConfig:
        return check_config(DirectConfig, stage_settings("direct") | changes, "config:")

    return checked


@pytest.mark.parametrize(
    ("regularizer", "named"),
    [
        ({"name": "none"}, "none"),
        ({"name": "f_divergence", "divergence": "total_variation"}, "total_variation"),
        ({"name": "f_divergence", "divergence": "total_variation", "level": "token"}, "total_"),
    ],
)
def test_a_flat_marginal_is_refused(
    config: Callable[..., DirectConfig], regularizer: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match=f"regularizer: the marginal of {named}.* no gradient"):
        config(regularizer=regularizer)


def test_classes_are_refused(config: Callable[..., DirectConfig]) -> None:
    classes = {"name": "conditional_pm", "level": "class", "classes": {"lengths": [4, 8]}}
    with pytest.raises(UserError, match=r"regularizer\.classes: a class's share"):
        config(regularizer=classes)


@pytest.mark.parametrize("reward", [None, {"function": "operator:add"}])
def test_a_calibrated_beta_is_refused_with_its_reason(
    config: Callable[..., DirectConfig], reward: dict[str, Any] | None
) -> None:
    with pytest.raises(UserError, match=r"regularizer\.beta: .* give beta as a number") as caught:
        config(regularizer={"name": "pm", "beta": "calibrated"}, reward=reward, sed=1)
    assert "sed: unknown key" in str(caught.value)  # together with all other faults


def test_dropout_and_weights_of_anchors(config: Callable[..., DirectConfig]) -> None:
    with pytest.raises(UserError, match=r"lora\.lora_dropout"):
        config(lora={"lora_dropout": 0.1})
    with pytest.raises(UserError, match=r"anchor\.weight: Input should be greater than 0"):
        config(anchor={"weight": 0.0})
    assert config().anchor is None


def test_a_reward_is_optional_here_and_in_the_evaluation(
    config: Callable[..., DirectConfig],
) -> None:
    evaluation = EvaluationConfig.of(config())
    assert evaluation.reward is None
    assert evaluation.response_length == 6
    with_one = EvaluationConfig.of(config(reward={"function": "operator:add"}))
    assert with_one.reward is not None
