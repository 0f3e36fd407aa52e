"""A reward model's link, from stage 2's config to the check of stage 3."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from step2_reward.config import RewardConfig
from step2_reward.main import main as train_reward
from step3_rlhf.regularizers.links import LINKS
from step3_rlhf.regularizers.registry import parse_regularizer
from step3_rlhf.rewards.links import check_links
from training.config import check_config
from training.errors import UserError
from training.models.pretrained import LINK, Pretrained
from training.preferences.links import LOG_LINKS

LUCE = {"name": "generalized_pl", "g": "softplus", "target": "luce"}


@pytest.fixture
def model(tiny_world: Path, tmp_path: Path) -> Callable[..., Pretrained]:
    """A directory whose config.json has more keys."""

    def with_keys(**keys: str) -> Pretrained:
        content = json.loads((tiny_world / "base" / "config.json").read_text())
        directory = tmp_path / "-".join(["model", *keys.values()])
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(content | keys))
        return Pretrained(str(directory))

    return with_keys


@pytest.mark.usefixtures("process_group")
def test_stage_2_stores_its_link_and_stage_3_reads_it(
    stage_settings: Callable[[str], dict[str, Any]],
) -> None:
    settings = stage_settings("reward") | {"link": "softplus", "max_steps": 1}
    config = check_config(RewardConfig, settings, "config:")
    train_reward(config)
    output = Path(config.output_dir)
    assert json.loads((output / "model" / "config.json").read_text())[LINK] == "softplus"
    assert json.loads((output / "evaluation.json").read_text())["link"] == "softplus"
    trained = Pretrained(str(output / "model"))
    assert trained.learned_link == "softplus"
    check_links(parse_regularizer(LUCE), [trained])
    with pytest.raises(UserError, match="learned preferences under the link softplus, and pm"):
        check_links(parse_regularizer({"name": "pm"}), [trained])


def test_every_other_link_is_refused_with_the_remedy(model: Callable[..., Pretrained]) -> None:
    softplus = model(preference_link="softplus", response_end="eos")
    old = model(response_end="eos")  # of stage 2 before it had links
    assert (softplus.learned_link, old.learned_link) == ("softplus", "exponential")
    pm, luce = parse_regularizer({"name": "pm"}), parse_regularizer(LUCE)
    power = parse_regularizer({"name": "generalized_pl", "g": "power", "exponent": 2.0})
    check_links(luce, [softplus, softplus])
    check_links(pm, [old])
    check_links(parse_regularizer({"name": "generalized_pl", "g": "exponential"}), [old])
    for regularizer, remedy in (
        (pm, r'regularizer to {"name": "generalized_pl", "g": "softplus", "target": "luce"}'),
        (None, r"or train the reward model with link=exponential"),
        (power, r"the power link needs positive rewards, which stage 2 does not train"),
    ):
        with pytest.raises(UserError) as refusal:
            check_links(regularizer, [old, softplus])
        assert remedy in str(refusal.value)
    with pytest.raises(UserError, match=r"set regularizer to pm, or train .* link=softplus"):
        check_links(luce, [softplus, old])


def test_a_model_of_unknown_training_is_taken_at_its_word_and_said_to_be(
    model: Callable[..., Pretrained], capsys: pytest.CaptureFixture[str]
) -> None:
    stranger = model()
    assert stranger.learned_link is None
    check_links(parse_regularizer({"name": "kl"}), [stranger])
    assert capsys.readouterr().out == ""
    check_links(parse_regularizer(LUCE), [stranger])
    assert "generalized_pl takes its rewards under g = softplus" in capsys.readouterr().out


def test_stage_2_has_the_links_of_stage_3_that_any_reward_allows() -> None:
    assert set(LOG_LINKS) == set(LINKS) - {"power"}
