"""A user's mistake ends before any model is loaded: exit code 2, one message, every fault in it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from step1_sft import main as sft
from step1_sft.config import SFTConfig
from step2_reward import main as reward
from step2_reward.config import RewardConfig
from step3_rlhf import main as ppo
from step3_rlhf.config import PPOConfig
from step3_rlhf.evaluation import __main__ as evaluate
from training.cli import run_stage
from training.models import loading
from training.runtime import ranks

ROOT = Path(__file__).resolve().parents[2]
STAGES = {"sft": (SFTConfig, sft), "reward": (RewardConfig, reward), "ppo": (PPOConfig, ppo)}

Settings = Callable[[str], dict[str, Any]]
Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def without_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads a model fails; processes are not joined."""

    def forbidden(*arguments: object, **named: object) -> None:
        pytest.fail("a model was loaded before the mistake was found")

    monkeypatch.setattr(loading, "_load", forbidden)
    monkeypatch.setattr(ranks, "connect", lambda: None)
    monkeypatch.setattr(ranks, "disconnect", lambda: None)
    monkeypatch.setenv("RANK", "0")


@pytest.fixture
def refused(
    stage_settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """Runs a stage's own main with changed settings; gives the message that it ends with."""

    def run(stage: str, *overrides: str, **changes: Any) -> str:
        config_class, module = STAGES[stage]
        settings = stage_settings(stage)
        data = settings["data"] | changes.pop("data", {})
        file = tmp_path / "bad.json"
        file.write_text(json.dumps(settings | changes | {"data": data}))
        with pytest.raises(SystemExit) as caught:
            run_stage(config_class, module.main, [str(file), *overrides])
        assert caught.value.code == 2
        assert not (Path(settings["output_dir"]) / "config.json").exists()
        return capsys.readouterr().err

    return run


every_stage = pytest.mark.parametrize("stage", STAGES)


@every_stage
def test_an_unknown_or_misspelt_key(refused: Refused, stage: str) -> None:
    message = refused(stage, "data.max_promt_length=3", per_device_trian_batch_size=8)
    assert "per_device_trian_batch_size: unknown key" in message
    assert "did you mean 'per_device_train_batch_size'?" in message
    assert "data.max_promt_length: unknown key; did you mean 'max_prompt_length'?" in message


@every_stage
def test_a_wrong_type(refused: Refused, stage: str) -> None:
    message = refused(stage, seed="42", data={"max_prompt_length": 8.5}, bf16="yes")
    for place in ("seed", "data.max_prompt_length", "bf16"):
        assert f"  - {place}: Input should be a valid" in message


@every_stage
def test_a_missing_file(refused: Refused, stage: str) -> None:
    message = refused(
        stage,
        data={"sources": ["./none.jsonl", "./neither.json"], "eval_sources": ["./nor_this.jsonl"]},
        model_name_or_path="./no_model",
    )
    for name in ("./none.jsonl", "./neither.json", "./nor_this.jsonl", "./no_model"):
        assert f"{name} does not exist" in message


def test_a_missing_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_stage(SFTConfig, sft.main, [str(tmp_path / "none.json")])
    assert caught.value.code == 2
    assert "none.json: no such config file" in capsys.readouterr().err


def faulty_file(directory: Path) -> Path:
    sound = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    lines = [
        json.dumps(sound),
        '{"prompt": "Hi", "chosen": ',
        json.dumps({"prompt": "Hi", "chosen": "a", "rejectd": "b"}),
        json.dumps({"chosen": "a", "rejected": "b"} | {"promt": "Hi"}),
        "[1, 2]",
    ]
    file = directory / "faulty.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_malformed_lines_and_missing_fields_are_all_named(
    refused: Refused, stage: str, tmp_path: Path
) -> None:
    file = faulty_file(tmp_path)
    message = refused(stage, data={"sources": [str(file)], "stage_proportions": [0.5, 0.5, 0]})
    assert message.count(str(file)) == 4
    assert f"{file}:2: malformed JSON" in message
    assert f"{file}:3: no 'rejected'; did you mean 'rejectd'?" in message
    assert f"{file}:4: " in message
    assert f"{file}:5: an object was expected, not list" in message
    assert f"{file}:1:" not in message


def test_stage_3_names_faulty_prompts_and_response_sets(refused: Refused, tmp_path: Path) -> None:
    file = faulty_file(tmp_path)
    message = refused("ppo", data={"sources": [str(file)]})
    for number in (2, 4, 5):
        assert f"{file}:{number}: " in message
    message = refused("ppo", evaluation={"response_sets": str(file)})
    for number in (2, 3, 4, 5):
        assert f"{file}:{number}: " in message


@every_stage
def test_an_empty_split(refused: Refused, stage: str) -> None:
    others = {"sft": [0, 0.5, 0.5], "reward": [0.5, 0, 0.5], "ppo": [0.5, 0.5, 0]}
    message = refused(stage, data={"stage_proportions": others[stage]})
    assert f"No training records are left for the stage {stage!r}" in message
    assert "belong to the other stages" in message


@every_stage
def test_empty_evaluation_data(refused: Refused, stage: str, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    message = refused(stage, data={"eval_sources": [str(tmp_path / "empty.jsonl")]})
    assert f"No evaluation records are left for the stage {stage!r}" in message


def test_batch_sizes_that_do_not_divide(refused: Refused) -> None:
    message = refused("ppo", total_episodes=10, reward={"function": "json:dumps"})
    assert "total_episodes: 10 is not a multiple of the 4 responses of one iteration" in message
    message = refused("ppo", gradient_accumulation_steps=3, rollout_batch_size=8)
    assert "rollout_batch_size: 8 does not divide the 12 responses" in message


def test_a_parameter_that_does_not_belong_to_the_regularizer(refused: Refused) -> None:
    message = refused("ppo", regularizer={"name": "kl", "alpha": 0.3, "tau": 1.0})
    assert "regularizer.alpha: unknown key" in message
    assert "regularizer.tau: unknown key" in message
    message = refused("ppo", "regularizer.name=conditional_pm", "regularizer.alhpa=0.3")
    assert "regularizer.alhpa: unknown key" in message


@every_stage
def test_the_deepspeed_section(refused: Refused, stage: str) -> None:
    section = {
        "train_batch_size": 8,
        "optimizer": {"type": "Adam"},
        "bf16": {"enabled": True},
        "zero_optimisation": {"stage": 2},
        "zero_optimization": {"stagee": 2},
    }
    message = refused(stage, deepspeed=section)
    for key in ("train_batch_size", "optimizer", "bf16"):
        assert f"deepspeed.{key}: set by the stage's own " in message
    assert "deepspeed.zero_optimisation: unknown key; did you mean 'zero_optimization'?" in message
    assert "deepspeed.zero_optimization.stagee: " in message


@every_stage
def test_an_existing_run_is_not_overwritten(
    stage_settings: Settings, stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_class, module = STAGES[stage]
    settings = stage_settings(stage)
    output = Path(settings["output_dir"])
    output.mkdir()
    (output / "metrics.jsonl").write_text("precious")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit) as caught:
        run_stage(config_class, module.main, [str(tmp_path / "config.json")])
    assert caught.value.code == 2
    assert "overwrite_output_dir=true to" in capsys.readouterr().err
    assert (output / "metrics.jsonl").read_text() == "precious"


def test_a_reward_function_that_is_not_there(refused: Refused) -> None:
    message = refused("ppo", reward={"function": "no_such_module:reward"})
    assert "reward.function: no_such_module:reward cannot be imported" in message


def test_every_fault_of_every_kind_in_one_message(refused: Refused) -> None:
    message = refused(
        "ppo",
        "nonsense",
        sede=1,
        seed="1",
        model_name_or_path="./no_model",
        regularizer={"name": "pm", "alpha": 1.0},
        deepspeed={"scheduler": {}},
        data={"stage_proportions": [0.5, 0.5, 0.5], "sources": ["./none.jsonl"]},
        reward={},
        gradient_accumulation_steps=3,
        rollout_batch_size=8,
        bf16=True,
        fp16=True,
    )
    for place in (
        "override 'nonsense'",
        "sede",
        "seed",
        "model_name_or_path",
        "regularizer.alpha",
        "deepspeed.scheduler",
        "data.stage_proportions",
        "data.sources.0.path",
        "reward",
        "rollout_batch_size",
        "fp16",
    ):
        assert f"  - {place}" in message, place


def test_the_evaluation_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in {
        (str(tmp_path / "nowhere"),): "nowhere does not exist",
        (str(tmp_path),): "the command has to name the models",
        (str(tmp_path), "seed=x"): "pass model_name_or_path=POLICY",
    }.items():
        with pytest.raises(SystemExit) as caught:
            evaluate.main(list(arguments))
        assert caught.value.code == 2
        assert expected in capsys.readouterr().err


@pytest.mark.launcher
def test_through_the_real_script_with_two_processes(
    stage_settings: Settings, tmp_path: Path
) -> None:
    """Exit code 2 survives the launcher, and of two processes one speaks."""
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(stage_settings("sft") | {"learning_rte": 1e-3}))
    variables = {
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
        "NUM_PROCESSES": "2",
    }
    ended = subprocess.run(
        ["bash", str(ROOT / "scripts" / "step1_sft.sh"), str(file), "seed=1.5"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("learning_rte: unknown key; did you mean 'learning_rate'?") == 1
    assert ended.stderr.count("seed: Input should be a valid integer") == 1
    assert "Traceback" not in ended.stderr
