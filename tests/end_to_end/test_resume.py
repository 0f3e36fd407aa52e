"""A run that was killed and resumed ends as the one that was not: bit for bit, every stage."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from step1_sft import main as sft
from step1_sft.config import SFTConfig
from step2_reward import main as reward
from step2_reward.config import RewardConfig
from step3_rlhf import main as ppo
from step3_rlhf.config import PPOConfig
from step3_rlhf.direct import main as direct
from step3_rlhf.direct.config import DirectConfig
from step3_rlhf.evaluation import __main__ as evaluate
from step3_rlhf.evaluation import measure
from step3_rlhf.evaluation.settings import settings_of_run
from training.config import check_config
from training.errors import RunError, UserError
from training.runtime.checkpoint import Checkpoints
from training.runtime.resume import STATE, complete_checkpoints

pytestmark = [pytest.mark.usefixtures("process_group"), pytest.mark.long]

MEASURED = ("seconds", "time/", "memory/")
"""Metrics that differ between equal runs."""

STAGES: dict[str, tuple[Any, Any, list[str]]] = {
    "sft": (SFTConfig, sft, ["model"]),
    "reward": (RewardConfig, reward, ["model"]),
    "ppo": (PPOConfig, ppo, ["actor", "critic"]),
    "rloo": (PPOConfig, ppo, ["actor", "actor_ema"]),
    "direct": (DirectConfig, direct, ["actor"]),
}
RLOO: dict[str, Any] = {
    "advantage_estimator": "rloo",
    "critic": None,
    "num_generations": 2,
    "ema_decay": 0.9,
    "ptx_coef": 0.5,
}
REWARD_FUNCTION = (
    "def by_length(prompts, responses):\n    return [len(r) / 10 for r in responses]\n"
)

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all tests run their stages: a run that is copied back has the same paths."""
    directory = tmp_path_factory.mktemp("resume")
    (directory / "lengths.py").write_text(REWARD_FUNCTION)
    return directory


@pytest.fixture
def run(
    settings_in: Callable[[str, Path], dict[str, Any]],
    workshop: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Six steps of a stage with a checkpoint every two, in its output directory.

    Without changes, a stage is run once and copied by the other tests.
    """
    monkeypatch.syspath_prepend(workshop)
    runs, finished = workshop / "runs", workshop / "finished"
    shutil.rmtree(runs, ignore_errors=True)

    def run_stage(stage: str, **changes: Any) -> Path:
        config_class, module, _ = STAGES[stage]
        settings = settings_in("ppo" if stage == "rloo" else stage, runs) | {"save_steps": 2}
        if stage == "rloo":
            settings |= RLOO | {"ptx_data": settings_in("sft", runs)["data"]}
        if stage in ("ppo", "rloo"):
            settings |= {
                "total_episodes": 24,
                "reward": {"function": "lengths:by_length"},
                "reward_centering": "reference_mean",
                "reward_centering_samples": 8,
            }
        else:
            settings |= {"max_steps": 6, "eval_steps": 3}
        config = check_config(config_class, settings | changes, "test:")
        output = Path(config.output_dir)
        if not changes and (finished / stage).is_dir():
            return Path(shutil.copytree(finished / stage, output))
        # The state at the start differs, as between two processes; what matters is restored.
        torch.manual_seed(torch.seed() if config.resume_from_checkpoint else config.seed)
        module.main(config)
        if not changes:
            shutil.copytree(output, finished / stage)
        return output

    return run_stage


def kill_after(output: Path, step: int, exports: list[str]) -> None:
    """What a kill after `step` would have left: later lines half-written, no results."""
    for checkpoint in complete_checkpoints(output / "checkpoints"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            (checkpoint / STATE).unlink()
    for name in [*exports, "evaluation.json", "instances.jsonl"]:
        if (output / name).is_dir():
            shutil.rmtree(output / name)
        else:
            (output / name).unlink(missing_ok=True)
    metrics = output / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])


def metrics_of(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if not k.startswith(MEASURED)} for x in lines]


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_equals_uninterrupted(stage: str, run: Run) -> None:
    exports = STAGES[stage][2]
    output = run(stage)
    whole = {name: load_file(output / name / "model.safetensors") for name in exports}
    metrics = metrics_of(output)
    assert len(metrics) == 6

    for name in exports:
        if name in ("model", "actor"):
            assert "| figure | mean |" in ModelCard.load(output / name / "README.md").text

    kill_after(output, 2, exports)
    run(stage, resume_from_checkpoint="latest")
    assert metrics_of(output) == metrics
    for name, weights in whole.items():
        resumed = load_file(output / name / "model.safetensors")
        assert all(torch.equal(weights[key], resumed[key]) for key in weights)

    # The negative control: a run of another seed does not end there.
    other = run(stage, seed=7, output_dir=str(output.with_name("other")))
    assert metrics_of(other) != metrics


class Killed(Exception):
    pass


@pytest.mark.parametrize("by", ["stage 3, resumed", "the evaluation's own command"])
def test_an_evaluation_that_was_stopped_goes_on(
    run: Run, by: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run("ppo")
    expected = {
        name: (output / name).read_text() for name in ("evaluation.json", "instances.jsonl")
    }

    def killed(*arguments: object) -> None:
        raise Killed

    output = output.with_name("stopped")
    with monkeypatch.context() as patch:
        patch.setattr(measure, "held_out_perplexity", killed)
        with pytest.raises(Killed):
            run("ppo", output_dir=str(output))
    assert not (output / "evaluation.json").exists()
    written = {path: path.stat().st_mtime_ns for path in output.glob("*/model.safetensors")}
    assert len(written) == 2
    capsys.readouterr()
    if by == "stage 3, resumed":
        run("ppo", output_dir=str(output), resume_from_checkpoint="latest")
    else:
        evaluate.run(settings_of_run(str(output)))
    assert "goes on after 4 finished blocks" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in written} == written
    for name, text in expected.items():
        assert (output / name).read_text() == text


def test_half_written_checkpoints_are_not_found(tmp_path: Path) -> None:
    for name in ("step-00000002", "step-00000004", "step-00000006.unfinished"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000002" / STATE).write_text("{}")
    (tmp_path / "step-00000006.unfinished" / STATE).write_text("{}")
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000002"]


def test_limit_keeps_the_newest(run: Run) -> None:
    output = run("sft", save_total_limit=2)
    kept = [path.name for path in complete_checkpoints(output / "checkpoints")]
    assert kept == ["step-00000004", "step-00000006"]


def test_another_runs_checkpoint_names_what_differs(run: Run) -> None:
    run("sft")
    with pytest.raises(UserError, match=r"learning_rate: 0\.001 in the checkpoint, 0\.01 now"):
        run("sft", resume_from_checkpoint="latest", learning_rate=0.01)


REGROUPED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
OTHERWISE: dict[str, dict[str, Any]] = {
    "sft": REGROUPED | {"packing": True, "logging_steps": 1, "per_device_eval_batch_size": 3},
    "reward": REGROUPED | {"gradient_checkpointing": True},
    "ppo": REGROUPED | {"rollout_batch_size": 2, "gradient_checkpointing": True},
    "rloo": REGROUPED | {"gradient_checkpointing": True},
    "direct": REGROUPED | {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("stage", STAGES)
def test_other_batches_and_less_memory_end_with_the_same_weights(
    stage: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the out-of-memory message advises; up to rounding, and the difference is said."""
    exports = STAGES[stage][2]
    output = run(stage)
    whole = {name: load_file(output / name / "model.safetensors") for name in exports}
    kill_after(output, 2, exports)
    capsys.readouterr()
    run(stage, resume_from_checkpoint="latest", **OTHERWISE[stage])
    printed = capsys.readouterr().out
    assert "The run resumes with other settings than before:" in printed
    assert "gradient_accumulation_steps: 1 in the checkpoint, 2 now" in printed
    for name, weights in whole.items():
        resumed = load_file(output / name / "model.safetensors")
        for key, value in weights.items():
            assert torch.allclose(resumed[key], value, rtol=0, atol=2e-4), key
    assert len(metrics_of(output)) == 6


def test_a_run_may_become_longer_and_not_shorter(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run("sft")
    run("sft", resume_from_checkpoint="latest", max_steps=8)
    assert [line["step"] for line in metrics_of(output)] == [1, 2, 3, 4, 5, 6, 7, 8]
    printed = capsys.readouterr().out
    assert "max_steps: 6 in the checkpoint, 8 now" in printed
    assert "the learning rate follows the schedule of the longer run" in printed
    with pytest.raises(UserError, match="max_steps: 8 in the checkpoint, 7 now"):
        run("sft", resume_from_checkpoint="latest", max_steps=7)
    with pytest.raises(UserError, match="per_device_train_batch_size: 4 in the checkpoint, 2 now"):
        run("sft", resume_from_checkpoint="latest", max_steps=8, per_device_train_batch_size=2)


def test_another_number_of_processes_is_refused(run: Run) -> None:
    output = run("sft")
    state = complete_checkpoints(output / "checkpoints")[-1] / STATE
    record = json.loads(state.read_text())
    state.write_text(json.dumps(record | {"processes": 3}))
    with pytest.raises(UserError, match="made by 3 processes, and there are 1 now; start as many"):
        run("sft", resume_from_checkpoint="latest")


def test_going_on_from_an_earlier_step_takes_the_later_ones_anew(run: Run) -> None:
    output = run("sft")
    earlier, *later = complete_checkpoints(output / "checkpoints")
    seen = []

    def killed(self: Checkpoints, step: int, state: dict[str, Any]) -> None:
        seen.append([path.name for path in complete_checkpoints(self.directory)])
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed)
        with pytest.raises(Killed):
            run("sft", resume_from_checkpoint=str(earlier))
    assert seen == [[earlier.name]]
    assert complete_checkpoints(output / "checkpoints") == [earlier]  # "latest" is of this run
    run("sft", resume_from_checkpoint="latest")
    assert complete_checkpoints(output / "checkpoints") == [earlier, *later]


def test_a_checkpoint_elsewhere_is_refused(run: Run, tmp_path: Path) -> None:
    """Its metrics, and stage 2's best weights, would be missing."""
    (source, *_) = complete_checkpoints(run("sft") / "checkpoints")
    with pytest.raises(UserError, match=r"is another run's; .* set output_dir="):
        run("sft", output_dir=str(tmp_path / "new"), resume_from_checkpoint=str(source))


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"step": "2"}', "x"])
def test_a_checkpoint_that_says_nothing_is_refused(run: Run, content: str) -> None:
    output = run("sft")
    (complete_checkpoints(output / "checkpoints")[-1] / STATE).write_text(content)
    with pytest.raises(UserError, match=r"state\.json is not what a checkpoint holds"):
        run("sft", resume_from_checkpoint="latest")


@pytest.mark.parametrize("part", ["*model_states.pt", "random-0.pt"])
def test_a_damaged_checkpoint_is_named(run: Run, part: str) -> None:
    output = run("sft")
    checkpoint = complete_checkpoints(output / "checkpoints")[-1]
    (file,) = checkpoint.rglob(part)
    file.unlink()
    with pytest.raises(
        RunError, match=rf"{checkpoint.name} is damaged(.|\n)*an earlier checkpoint"
    ):
        run("sft", resume_from_checkpoint="latest")


def test_missing_checkpoint_is_refused_before_anything_starts(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a complete checkpoint"):
        run("sft", resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_latest_without_a_checkpoint_starts_at_the_beginning(run: Run) -> None:
    output = run("sft", resume_from_checkpoint="latest")
    assert len(metrics_of(output)) == 6
