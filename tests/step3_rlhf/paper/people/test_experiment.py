"""The whole experiment with a model that knows nothing, through scripts, launcher and stages."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from step3_rlhf.paper.people.data.convert import Sizes
from step3_rlhf.paper.people.report.files import write_report
from step3_rlhf.paper.people.runs import Experiment, aligning, run, steps_of
from training.errors import RunError, UserError

ROOT = Path(__file__).resolve().parents[4]
SIZES = Sizes(
    texts=1, sft_questions=4, reward_questions=4, shared=3, asked=2, held_out=4, measured=2,
    sampled=2, validation=1,
)  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "step1_sft": {"per_device_train_batch_size": 4},
    "step2_reward": {"per_device_train_batch_size": 4},
    "step3_rlhf": {"per_device_train_batch_size": 4, "rollout_batch_size": 4},
}


def questions(count: int) -> str:
    """So many lines in the data set's schema."""
    lines = []
    for number in range(count):
        counts = {"coffee": 50, "tea": 30, f"water {number}": 10}
        clusters = {f"{i}": {"count": c, "answers": [a]} for i, (a, c) in enumerate(counts.items())}
        text = f"name a drink of kind {number}."
        lines.append(
            {
                "metadata": {"id": f"q{number}"},
                "question": {"original": text, "normalized": text},
                "answers": {"clusters": clusters},
            }
        )
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture(scope="module")
def experiment(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    workshop = tmp_path_factory.mktemp("people")
    (workshop / "train.jsonl").write_text(questions(80))
    configs = {}
    for stage, changes in SMALL.items():
        name = "people-direct.json" if stage == "step3_rlhf" else "people.json"
        shipped = json.loads((ROOT / stage / "configs" / name).read_text())
        path = workshop / f"{stage}.json"
        path.write_text(json.dumps(shipped | {"bf16": False} | changes))
        configs[stage] = str(path)
    return Experiment(
        workshop / "runs",
        str(tiny_world / "base"),
        str(workshop / "train.jsonl"),
        sizes=SIZES,
        configs=configs,
    )


def launch(command: list[str]) -> int:
    variables = {
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
        "NUM_PROCESSES": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(command, env=os.environ | variables, timeout=120).returncode


@pytest.fixture(scope="module")
def finished(experiment: Experiment) -> dict[str, int]:
    """When each result was written by the first call."""
    run(experiment, launch)
    return made_at(experiment)


def made_at(experiment: Experiment) -> dict[str, int]:
    results = sorted(experiment.directory.rglob("evaluation.json"))
    return {str(path): path.stat().st_mtime_ns for path in results}


@pytest.mark.launcher
@pytest.mark.long
def test_every_policy_is_measured_on_both_sets(
    experiment: Experiment, finished: dict[str, int]
) -> None:
    write_report(experiment.directory)
    report = json.loads((experiment.directory / "report.json").read_text())
    for group in ("seen", "unseen"):
        for policy in ("sft", "kl", "conditional_pm"):
            figures = report["groups"][group][policy]
            assert figures["tv_to_people"]["count"] == 2
            assert 0 <= figures["tv_to_reward"]["mean"] <= 1
            assert figures["outside_mass"]["mean"] > 0.5  # it knows nothing
    assert report["groups"]["seen"]["kl"]["tv_to_optimum"] is not None
    assert report["groups"]["seen"]["sft"]["tv_to_people"] is not None
    assert (experiment.directory / "report.html").is_file()


@pytest.mark.launcher
@pytest.mark.long
def test_what_is_finished_is_not_run_again(
    experiment: Experiment, finished: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    run(experiment, lambda command: pytest.fail(f"ran {command}"))
    assert made_at(experiment) == finished
    assert capsys.readouterr().out.count("finished earlier") == len(steps_of(experiment))
    with pytest.raises(UserError, match="prior: 'people' there, 'uniform' now"):
        run(replace(experiment, prior="uniform"), launch)
    with pytest.raises(RunError, match="kl, seed 43 ended with exit code 7"):
        run(replace(experiment, seed=43), lambda command: 7)


def test_the_aligned_policies_differ_in_regularizer_and_seed_only(tmp_path: Path) -> None:
    (tmp_path / "alpha.json").write_text('{"alpha": 0.001}')
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "counts.json").write_text('{"direct_proportions": [0.0, 0.9, 0.1]}')
    experiment = Experiment(tmp_path, "model", seed=7)
    kl, pm = (aligning(experiment, policy) for policy in ("kl", "conditional_pm"))
    differing = [(a, b) for a, b in zip(kl, pm, strict=True) if a != b]
    assert [a.partition("=")[0] for a, _ in differing] == ["output_dir", "regularizer"]
    assert '"alpha": 0.001' in differing[1][1]
    assert "seed=7" in kl


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "x"], "--seed x: a whole number was expected"),
        (["--prior", "mine"], "--prior mine: people or uniform was expected"),
        (["--method", "ppo"], "--method ppo: direct or rloo was expected"),
        (["--data", "/nowhere.jsonl"], "--data /nowhere.jsonl: no such file"),
        (["--model"], "--model needs a value"),
        (["--sed", "4"], "unknown argument --sed"),
    ],
)
@pytest.mark.launcher
def test_mistakes_end_with_one_message(arguments: list[str], message: str) -> None:
    script = ["bash", str(ROOT / "scripts" / "people.sh"), *arguments]
    ended = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.startswith(message)


@pytest.mark.launcher
def test_help_names_every_option() -> None:
    script = ["bash", str(ROOT / "scripts" / "people.sh"), "--help"]
    printed = subprocess.run(script, capture_output=True, text=True, timeout=60, check=True).stdout
    for option in ("--data", "--output", "--model", "--seed", "--prior", "--method"):
        assert f"\n  {option}" in printed
