"""Every model and every length that a run may meet, before weights are loaded."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, PreTrainedTokenizerBase

from step3_rlhf.checks import check_lengths, check_models, longest
from step3_rlhf.config import EvaluationConfig, PPOConfig
from step3_rlhf.response_sets import FiniteSet, read_response_sets
from step3_rlhf.roles import roles_of, training_roles_of
from training.config import check_config
from training.errors import UserError
from training.models.pretrained import Pretrained

Settings = Callable[[str], dict[str, Any]]


@pytest.fixture
def short_model(tiny_world: Path, world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> str:
    """A config that knows 64 positions; the world's models know more."""
    directory = tmp_path / "short"
    world_tokenizer.save_pretrained(directory)
    data = json.loads((tiny_world / "base" / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(data | {"max_position_embeddings": 64}))
    return str(directory)


def check(settings: dict[str, Any], kind: Any = PPOConfig) -> None:
    config = check_config(kind, settings, "config:")
    roles = training_roles_of(config) if kind is PPOConfig else roles_of(config)
    check_lengths(config, roles, read_response_sets(config.evaluation.response_sets))


def check_run(config: PPOConfig, **more: Any) -> None:
    check_models(config, training_roles_of(config), **more)


def test_what_fits_passes(
    stage_settings: Settings, short_model: str, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    check(stage_settings("ppo") | {"model_name_or_path": short_model})  # 48 + 16


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"response_length": 17}, "data.max_prompt_length + response_length is 65 tokens"),
        ({"data": {"max_response_length": 17}},
         "data.max_prompt_length + data.max_response_length is 65 tokens"),
        ({"ptx_coef": 0.1,
          "ptx_data": {"sources": ["a/b"], "max_prompt_length": 48, "max_response_length": 17}},
         "ptx_data.max_prompt_length + ptx_data.max_response_length is 65 tokens"),
        ({"evaluation": {"sampling": {"response_length": 17}}},
         "data.max_prompt_length + evaluation.sampling.response_length is 65 tokens"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("model", ["policy", "reference", "critic", "reward"])
def test_every_length_of_every_model(
    stage_settings: Settings,
    short_model: str,
    world_tokenizer: PreTrainedTokenizerBase,
    model: str,
    changes: dict[str, Any],
    named: str,
) -> None:
    settings = stage_settings("ppo")
    for name, value in changes.items():
        both = isinstance(value, dict)
        settings[name] = {**settings.get(name, {}), **value} if both else value
    settings |= {
        "policy": {"model_name_or_path": short_model},
        "reference": {"reference_model_name_or_path": short_model},
        "critic": {"critic_model_name_or_path": short_model},
        "reward": {"reward": {"model_name_or_path": short_model}},
    }[model]
    with pytest.raises(UserError, match="knows 64 positions") as caught:
        check(settings)
    assert named in str(caught.value)


def test_response_sets_and_the_evaluations_own_command(
    stage_settings: Settings, short_model: str, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    settings = stage_settings("ppo")
    known = EvaluationConfig.model_fields
    settings = {name: value for name, value in settings.items() if name in known}
    settings["model_name_or_path"] = short_model
    check(settings, EvaluationConfig)
    sets = Path(settings["evaluation"]["response_sets"])
    line = json.loads(sets.read_text().splitlines()[0])
    line["prompt"] += " please" * 70
    file = sets.with_name("long_sets.jsonl")
    file.write_text(json.dumps(line) + "\n")
    settings["evaluation"] = {"response_sets": str(file)}
    with pytest.raises(UserError, match=r"evaluation\.response_sets is \d+ tokens"):
        check(settings, EvaluationConfig)


def test_the_longest_response_counts(world_tokenizer: PreTrainedTokenizerBase) -> None:
    assert longest([], world_tokenizer) == 0
    short = FiniteSet("tea?", ("yes", "no"), None, None)
    long = FiniteSet("tea?", ("yes", "no no no no no"), None, None)
    assert longest([short, long], world_tokenizer) > longest([short], world_tokenizer)


@pytest.mark.parametrize("setting", ["reference_model_name_or_path", "critic_model_name_or_path"])
def test_models_that_read_the_policys_tokens_must_know_them(
    stage_settings: Settings,
    tiny_world: Path,
    world_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    setting: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = str(tmp_path / "other")
    world_tokenizer.save_pretrained(other)
    shutil.copy(tiny_world / "base" / "config.json", other)
    settings = stage_settings("ppo") | {"reward": {"function": "operator:add"}, setting: other}
    config = check_config(PPOConfig, settings, "config:")
    check_run(config)
    longer = copy.deepcopy(world_tokenizer)
    longer.add_special_tokens(
        {"additional_special_tokens": ["<another>"]}
    )  # it can be made to hold
    policy = Pretrained(config.model_name_or_path, tokenizer=longer)
    check_models(config, replace(training_roles_of(config), policy=policy))
    assert f"{setting}: {other} knows 1 tokens by other names: <another>" in capsys.readouterr().out
    file = Path(other) / "tokenizer.json"
    data = json.loads(file.read_text())
    ids = data["model"]["vocab"]
    first, second = sorted(ids)[-2:]  # two words change places
    ids[first], ids[second] = ids[second], ids[first]
    file.write_text(json.dumps(data))
    with pytest.raises(UserError, match=rf"{setting}: .*another vocabulary"):
        check_run(config)


def test_a_critic_has_a_value_after_each_token(
    stage_settings: Settings, world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    critic = str(tmp_path / "bert")
    world_tokenizer.save_pretrained(critic)
    BertConfig(
        num_labels=1, num_hidden_layers=1, architectures=["BertForSequenceClassification"]
    ).save_pretrained(critic)
    settings = stage_settings("ppo") | {"reward": {"function": "operator:add"}}
    config = check_config(PPOConfig, settings | {"critic_model_name_or_path": critic}, "config:")
    with pytest.raises(
        UserError, match=r"critic_model_name_or_path: .*bert has no value after each"
    ):
        check_run(config)


def test_a_reward_model_with_a_format_of_its_own_cuts_texts_itself(
    stage_settings: Settings,
    short_model: str,
    world_tokenizer: PreTrainedTokenizerBase,
) -> None:
    settings = stage_settings("ppo") | {"reward": {"model_name_or_path": short_model}}
    settings["response_length"] = 17
    with pytest.raises(UserError, match="knows 64 positions"):
        check(settings)
    own = copy.deepcopy(world_tokenizer)
    own.chat_template = "{{ messages[0].content }}"
    own.save_pretrained(short_model)
    check(settings)


def test_a_language_model_is_no_reward_model_unless_it_stands_for_one(
    stage_settings: Settings, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    config = check_config(PPOConfig, stage_settings("ppo"), "config:")
    with pytest.raises(UserError, match="is not a sequence-classification model"):
        check_run(config)
    check_run(config, stand_in=config.model_name_or_path)
