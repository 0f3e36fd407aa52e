"""What every stage's config checks: precision, paths, output directories."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_rlhf.config import PPOConfig
from training.config import check_config
from training.errors import UserError
from training.stage_config import model_path_faults

Settings = Callable[[str], dict[str, Any]]
CLASSES = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}


def faults_of(stage: str, data: dict[str, Any]) -> list[str]:
    with pytest.raises(UserError) as caught:
        check_config(CLASSES[stage], data, "config:")
    return caught.value.faults


@pytest.mark.parametrize("stage", CLASSES)
def test_the_sound_config_is_sound_and_survives_its_own_dump(
    stage: str, stage_settings: Settings
) -> None:
    config = check_config(CLASSES[stage], stage_settings(stage), "config:")
    again = check_config(CLASSES[stage], config.model_dump(mode="json"), "config:")
    assert again == config


@pytest.mark.parametrize("stage", CLASSES)
def test_every_stage_finds_all_faults_at_once(
    stage: str, stage_settings: Settings, tmp_path: Path
) -> None:
    data = stage_settings(stage)
    data |= {"modle_name": "x", "seed": "1", "bf16": True, "fp16": True}
    data["data"] |= {"sources": [str(tmp_path / "none.jsonl")], "stage_proportions": [1, 1, 1]}
    data["deepspeed"] = {"zero_optimisation": {}}
    data["model_name_or_path"] = str(tmp_path / "no_model")
    faults = "\n".join(faults_of(stage, data))
    for expected in (
        "modle_name: unknown key; did you mean 'model_name_or_path'?",
        "seed: Input should be a valid integer",
        "fp16: contradicts bf16=true",
        "data.sources.0.path: ",
        "data.stage_proportions: they sum to 3, not to 1",
        "deepspeed.zero_optimisation: unknown key; did you mean 'zero_optimization'?",
        f"model_name_or_path: {tmp_path / 'no_model'} does not exist",
    ):
        assert expected in faults


# output_dir


def test_a_run_is_not_overwritten(stage_settings: Settings) -> None:
    data = stage_settings("sft")
    output = Path(data["output_dir"])
    output.mkdir()
    check_config(SFTConfig, data, "config:")  # empty: nothing is lost
    (output / "config.json").write_text("{}")
    (fault,) = faults_of("sft", data)
    assert "exists and is not empty" in fault
    assert "overwrite_output_dir=true" in fault
    check_config(SFTConfig, data | {"overwrite_output_dir": True}, "config:")


def test_what_is_not_a_run_is_never_deleted(stage_settings: Settings) -> None:
    data = stage_settings("sft") | {"overwrite_output_dir": True}
    output = Path(data["output_dir"])
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    (fault,) = faults_of("sft", data)
    assert "not an earlier run" in fault
    (fault,) = faults_of("sft", data | {"output_dir": str(output / "thesis.tex")})
    assert "is a file" in fault


# Models


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "does not exist"),
        ("/nowhere/at/all", "does not exist"),
        ("runs/quickstart/nothing", "does not exist"),
    ],
)
def test_a_path_must_exist(name: str, message: str, stage_settings: Settings) -> None:
    (fault,) = faults_of("sft", stage_settings("sft") | {"model_name_or_path": name})
    assert fault == f"model_name_or_path: {name} {message}"


def test_a_hub_name_may_be_anything(stage_settings: Settings) -> None:
    check_config(SFTConfig, stage_settings("sft") | {"model_name_or_path": "owner/name"}, "config:")


def test_a_directory_without_a_model(stage_settings: Settings, tmp_path: Path) -> None:
    (fault,) = faults_of("sft", stage_settings("sft") | {"model_name_or_path": str(tmp_path)})
    assert "has no config.json" in fault


# Stage 3


def test_a_parameter_of_another_regularizer(stage_settings: Settings) -> None:
    data = stage_settings("ppo") | {"regularizer": {"name": "kl", "alpha": 0.3}}
    (fault,) = faults_of("ppo", data)
    assert fault.startswith("regularizer.alpha: unknown key")


def test_a_misspelt_regularizer(stage_settings: Settings) -> None:
    data = stage_settings("ppo") | {"regularizer": {"name": "conditional_mp", "alpha": 0.3}}
    (fault,) = faults_of("ppo", data)
    assert "did you mean 'conditional_pm'?" in fault


@pytest.mark.parametrize("regularizer", [None, "pm", {}, {"beta": 1.0}])
def test_no_regularizer_named(regularizer: Any, stage_settings: Settings) -> None:
    (fault,) = faults_of("ppo", stage_settings("ppo") | {"regularizer": regularizer})
    assert fault.startswith("regularizer: ")


@pytest.mark.parametrize(
    "reward",
    [
        {},
        {"function": "a:b", "model_name_or_path": "owner/name"},
        {"models": [], "function": None},
        {"models": [{"model_name_or_path": "owner/name"}], "function": "a:b"},
    ],
)
def test_exactly_one_source_of_rewards(reward: dict, stage_settings: Settings) -> None:
    (fault,) = faults_of("ppo", stage_settings("ppo") | {"reward": reward})
    assert "give exactly one of model_name_or_path, models, mixture, function, url" in fault


def test_paths_of_stage_3(stage_settings: Settings) -> None:
    data = stage_settings("ppo")
    data |= {
        "reward": {"models": [{"model_name_or_path": "./nowhere", "weight": 0.5}]},
        "reference_model_name_or_path": "./no_reference",
        "critic_model_name_or_path": "./no_critic",
        "evaluation": {"response_sets": "./no_sets.jsonl"},
        "frozen_deepspeed": {"optimizer": {}},
    }
    faults = faults_of("ppo", data)
    places = {fault.split(": ")[0] for fault in faults}
    assert places == {
        "reward.models.0.model_name_or_path",
        "reference_model_name_or_path",
        "critic_model_name_or_path",
        "evaluation.response_sets",
        "frozen_deepspeed.optimizer",
    }


def test_rollout_batches_that_do_not_divide(stage_settings: Settings) -> None:
    data = stage_settings("ppo") | {"gradient_accumulation_steps": 3, "rollout_batch_size": 8}
    (fault,) = faults_of("ppo", data)
    assert fault.startswith("rollout_batch_size: 8 does not divide the 12 responses")
    for sound in (4, 6, 12, 64):
        check_config(PPOConfig, data | {"rollout_batch_size": sound}, "config:")


def test_every_trap_that_is_on_is_said(stage_settings: Settings) -> None:
    plain = check_config(PPOConfig, stage_settings("ppo"), "config:")
    assert plain.warnings() == []
    traps = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 50,
        "gamma": 0.99,
        "reward_clip": 5.0,
        "missing_eos_penalty": 1.0,
        "advantage_normalization": "full",
    }
    warned = check_config(PPOConfig, stage_settings("ppo") | traps, "config:").warnings()
    assert len(warned) == len(traps)
    for name, text in zip(traps, warned, strict=True):
        assert text.startswith(name)


def test_a_quantized_model_is_refused_from_its_config(tmp_path: Path) -> None:
    saved = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    (fault,) = model_path_faults("model_name_or_path", str(tmp_path))
    assert f"{tmp_path} is quantized (bitsandbytes); name the model that it was made from" in fault
    (tmp_path / "config.json").write_text("{}")
    assert model_path_faults("model_name_or_path", str(tmp_path)) == []
