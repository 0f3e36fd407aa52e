""" "beta": "calibrated", from scripts/calibrate.sh to the config of stage 3."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from step2_reward.calibrate.__main__ import main as calibrate
from step2_reward.config import RewardConfig
from step2_reward.main import main as train_reward
from step3_rlhf.config import EvaluationConfig, PPOConfig
from step3_rlhf.evaluation.settings import run_settings
from training.config import check_config
from training.errors import UserError
from training.runtime import ranks

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def trained(
    settings_in: Callable[[str, Path], dict[str, Any]],
    process_group: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A stage-2 run that several tests copy."""
    settings = settings_in("reward", tmp_path_factory.mktemp("trained"))
    settings |= {"max_steps": 60, "learning_rate": 2e-3, "per_device_train_batch_size": 16}
    settings["data"]["max_eval_samples"] = 60
    config = check_config(RewardConfig, settings, "config:")
    train_reward(config)
    return Path(config.output_dir)


@pytest.fixture
def reward_run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run to calibrate; the test's process group stands in for the launcher's."""
    monkeypatch.setattr(ranks, "connect", lambda: None)
    monkeypatch.setattr(ranks, "disconnect", lambda: None)
    return shutil.copytree(trained, tmp_path / "reward")


@pytest.mark.launcher
@pytest.mark.long
def test_the_script_launches_it(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "reward")
    variables = {
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
        "NUM_PROCESSES": "2",
    }
    command = ["bash", str(ROOT / "scripts" / "calibrate.sh"), str(run)]
    ended = subprocess.run(
        command, env=os.environ | variables, timeout=300, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "calibrated at beta = " in ended.stdout
    assert json.loads((run / "calibration.json").read_text())["split"] == "test"


def settings_with(stage_settings, reward: Any, **regularizer: Any) -> dict[str, Any]:
    chosen = {"name": "pm", "beta": "calibrated"} | regularizer
    return stage_settings("ppo") | {"reward": reward, "regularizer": chosen}


def test_from_the_command_to_the_config(
    reward_run: Path, stage_settings, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    calibrate([str(reward_run)])
    shown = capsys.readouterr().out
    found = json.loads((reward_run / "calibration.json").read_text())
    assert f"calibrated at beta = {found['beta']['mean']:.3f}" in shown
    assert found["split"] == "test"
    report = json.loads((reward_run / "evaluation.json").read_text())
    assert found["before"]["pairs"] == report["pairs"]  # the same test pairs, the same model
    assert found["before"]["log_loss"] == pytest.approx(report["log_loss"], abs=1e-6)
    assert (reward_run / "reliability_after.png").is_file()

    reward = {"model_name_or_path": str(reward_run / "model")}
    others = {
        "pm": {},
        "kl": {},
        "conditional_pm": {"alpha": 0.1},
        "f_divergence": {"divergence": "forward_kl"},
        "generalized_pl": {"g": "exponential"},
    }
    for name, parameters in others.items():
        settings = settings_with(stage_settings, reward, name=name, **parameters)
        config = check_config(PPOConfig, settings, "config:")
        assert config.regularizer.beta == found["beta"]["mean"]
    settings = settings_with(stage_settings, reward, name="generalized_pl", g="softplus")
    with pytest.raises(UserError, match="is of the link exponential, and the regularizer takes"):
        check_config(PPOConfig, settings, "config:")
    source = config.beta_calibration
    assert source is not None
    assert (source.low, source.high) == (found["beta"]["low"], found["beta"]["high"])
    assert (source.split, source.file) == ("test", str(reward_run / "calibration.json"))

    # What is written can be read back, without the file.
    resolved = config.model_dump(mode="json")
    assert resolved["regularizer"]["beta"] == found["beta"]["mean"]
    (reward_run / "calibration.json").unlink()
    assert check_config(PPOConfig, resolved, "config:") == config
    (tmp_path / "run" / "actor").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps(resolved))
    assert run_settings(str(tmp_path / "run"))["beta_calibration"] == resolved["beta_calibration"]
    assert "beta_calibration" in EvaluationConfig.model_fields


def test_what_has_no_calibration_is_refused_with_the_remedy(
    reward_run: Path, stage_settings
) -> None:
    def refused(reward: Any, **changes: Any) -> str:
        settings = settings_with(stage_settings, reward) | changes
        with pytest.raises(UserError) as refusal:
            check_config(PPOConfig, settings, "config:")
        return str(refusal.value)

    model = {"model_name_or_path": str(reward_run / "model")}
    message = refused(model, total_episodes=-1, seed="x")
    assert f"regularizer.beta: {reward_run / 'model'} has no calibration.json" in message
    assert f"`bash scripts/calibrate.sh {reward_run}` makes one" in message
    assert "total_episodes" in message  # the other faults are named too
    assert "seed" in message
    several = {"models": [model, model]}
    for source in ({"function": "operator:add"}, several):
        assert 'regularizer.beta: "calibrated" needs a single reward model' in refused(source)

    calibrate([str(reward_run)])
    weights = reward_run / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert "is of other weights" in refused(model)
    (reward_run / "calibration.json").write_text("{}")
    assert "is no calibration" in refused(model)


@pytest.mark.parametrize("parameter", ["beta", "tau"])
def test_maximum_entropy_is_not_calibrated(stage_settings, parameter: str) -> None:
    """With τ the calibrated temperature, softmax(r/τ) is what pm ends at."""
    settings = stage_settings("ppo") | {
        "reward": {"model_name_or_path": "anything"},
        "regularizer": {"name": "maximum_entropy", parameter: "calibrated"},
    }
    with pytest.raises(UserError) as refusal:
        check_config(PPOConfig, settings, "config:")
    assert "regularizer.beta: maximum_entropy has none" in str(refusal.value)
    assert '{"name": "pm", "beta": "calibrated"}' in str(refusal.value)


def test_a_directory_that_is_no_run_needs_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        calibrate([str(tmp_path)])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "pass model_name_or_path=MODEL" in message
    assert "pass data.sources" in message
