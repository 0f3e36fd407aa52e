"""Runs that are stopped, killed or bereft of a rank: through the real scripts and launcher."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.launcher

MEASURED = ("seconds", "time/", "memory/")
"""Metrics that differ between equal runs."""
ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {"sft": "step1_sft.sh", "reward": "step2_reward.sh", "ppo": "step3_rlhf.sh"}
EXPORTS = {"sft": ["model"], "reward": ["model"], "ppo": ["actor", "critic"]}
LENGTH = {
    "sft": {"max_steps": 24, "eval_steps": 9},
    "reward": {"max_steps": 24, "eval_steps": 9},
    "ppo": {
        "total_episodes": 64,
        "reward": {"function": "lengths:by_length"},
        "reward_centering": "reference_mean",
    },
}
REWARD = "def by_length(prompts, responses):\n    return [len(text) / 10 for text in responses]\n"
TRIALS_PER_STAGE = 10


@dataclass(frozen=True)
class Result:
    """All that must be the same however often a run was interrupted."""

    metrics: list[dict[str, Any]]
    weights: dict[str, torch.Tensor]

    @classmethod
    def of(cls, output: Path, stage: str) -> "Result":
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        weights = {
            f"{export}.{name}": tensor
            for export in EXPORTS[stage]
            for name, tensor in load_file(output / export / "model.safetensors").items()
        }
        return cls(
            [{k: v for k, v in x.items() if not k.startswith(MEASURED)} for x in lines], weights
        )

    def equals(self, other: "Result") -> bool:
        """Bit for bit."""
        return (
            self.metrics == other.metrics
            and self.weights.keys() == other.weights.keys()
            and all(torch.equal(self.weights[name], other.weights[name]) for name in self.weights)
        )


def heed_all_signals() -> None:
    """Also where the tests were started in the background or by nohup, which have some ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Launched:
    """A stage's script, running."""

    def __init__(self, stage: str, config: Path, processes: int, *overrides: str) -> None:
        variables = {
            "VIRTUAL_ENV": sys.prefix,
            "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
            "NUM_PROCESSES": str(processes),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(config.parent),
        }
        self.log = config.with_suffix(".log")
        with self.log.open("w") as log:
            self.script = subprocess.Popen(
                ["bash", str(ROOT / "scripts" / SCRIPTS[stage]), str(config), *overrides],
                env=os.environ | variables,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=heed_all_signals,
            )

    def everything(self) -> list[psutil.Process]:
        try:
            script = psutil.Process(self.script.pid)
            return [*script.children(recursive=True), script]
        except psutil.NoSuchProcess:
            return []

    def ranks(self) -> list[psutil.Process]:
        return [p for p in self.everything() if any("--local_rank=" in a for a in p.cmdline())]

    def kill_all(self) -> None:
        """What a power cut does to the processes."""
        for process in reversed(self.everything()):  # the launcher first: it would tidy up
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.script.wait(timeout=30)

    def wait_for(self, file: Path) -> None:
        for _ in range(1200):
            if file.is_file() and file.stat().st_size:
                return
            assert self.script.poll() is None, self.log.read_text()[-4000:]
            time.sleep(0.05)
        raise AssertionError(f"{file} was never written: {self.log.read_text()[-4000:]}")

    def end(self, code: int = 0, within: float = 200) -> str:
        returned = self.script.wait(timeout=within)
        printed = self.log.read_text()
        assert returned == code, printed[-6000:]
        return printed


Configured = Callable[..., Path]


@pytest.fixture
def configured(stage_settings: Callable[[str], dict[str, Any]], tmp_path: Path) -> Configured:
    (tmp_path / "lengths.py").write_text(REWARD)

    def config(stage: str, name: str, **changes: Any) -> Path:
        settings = stage_settings(stage) | {"output_dir": str(tmp_path / name)}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(settings | LENGTH[stage] | {"save_steps": 1} | changes))
        return path

    return config


@pytest.fixture(autouse=True)
def nothing_is_left_running(tmp_path: Path) -> Iterator[None]:
    yield
    for process in psutil.process_iter(["cmdline"]):
        if any(str(tmp_path) in argument for argument in process.info["cmdline"] or []):
            process.kill()


@pytest.mark.parametrize(
    ("stage", "number", "processes"), [("sft", signal.SIGTERM, 1), ("ppo", signal.SIGINT, 2)]
)
def test_signal_saves_a_checkpoint_and_the_run_goes_on_from_it(
    configured: Configured, tmp_path: Path, stage: str, number: signal.Signals, processes: int
) -> None:
    # No checkpoints but the one that the signal asks for.
    length = {"max_steps": 60} if stage == "sft" else {"total_episodes": 160}
    whole = configured(stage, "whole", save_steps=0, **length)
    Launched(stage, whole, processes).end()

    config = configured(stage, "stopped", save_steps=0, **length)
    run = Launched(stage, config, processes)
    run.wait_for(tmp_path / "stopped" / "metrics.jsonl")
    run.script.send_signal(number)
    printed = run.end(128 + number, within=60)
    assert f"Stopped by {number.name} after step" in printed
    assert "return code" not in printed  # our message alone, none of the launcher's
    assert printed.rstrip().endswith("resume_from_checkpoint=latest resumes from it")
    (checkpoint,) = (tmp_path / "stopped" / "checkpoints").iterdir()
    assert int(checkpoint.name.removeprefix("step-")) >= 1

    Launched(stage, config, processes, "resume_from_checkpoint=latest").end()
    expected = Result.of(tmp_path / "whole", stage)
    assert Result.of(tmp_path / "stopped", stage).equals(expected)


def test_a_second_signal_ends_at_once(configured: Configured, tmp_path: Path) -> None:
    # A step that takes long: the first signal alone would wait for its end.
    slow = {"per_device_train_batch_size": 512, "gradient_accumulation_steps": 64}
    run = Launched("sft", configured("sft", "slow", **slow), 1)
    run.wait_for(tmp_path / "slow" / "config.json")
    time.sleep(3)
    run.script.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert run.script.poll() is None
    run.script.send_signal(signal.SIGTERM)
    run.end(143, within=5)
    assert not run.ranks()


def test_when_a_rank_dies_the_others_end(configured: Configured, tmp_path: Path) -> None:
    run = Launched("sft", configured("sft", "bereft", max_steps=5000), 2)
    run.wait_for(tmp_path / "bereft" / "metrics.jsonl")
    run.ranks()[1].kill()
    assert run.script.wait(timeout=60) not in (0, 2)
    assert "A process of the run was ended by SIGKILL" in run.log.read_text()
    assert not run.ranks()


BROKEN = """
import os
from step3_rlhf.regularizers.log_linear import KL

class Broken(KL):
    name: str = "broken"
    def marginal(self, *given):
        if os.environ["RANK"] == "1":
            raise ZeroDivisionError("only here")
        return super().marginal(*given)
"""


def test_a_rank_that_fails_says_why_before_the_others_notice(
    configured: Configured, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    config = configured("ppo", "broken", regularizer={"class": "broken:Broken"})
    run = Launched("ppo", config, 2)
    code = run.script.wait(timeout=120)
    printed = run.log.read_text()
    assert code not in (0, 2), printed[-4000:]
    assert "ZeroDivisionError: only here" in printed
    after = printed[: printed.index("ZeroDivisionError: only here")]
    assert "Connection" not in after, after[-3000:]
    assert not run.ranks()


def test_a_mistake_that_rank_0_finds_first_ends_with_its_message(configured: Configured) -> None:
    data = json.loads(configured("sft", "sound").read_text())["data"]
    settings = data | {"max_prompt_length": 1, "overlong_prompts": "drop"}
    run = Launched("sft", configured("sft", "dropped", data=settings), 2)
    printed = run.end(2, within=120)
    assert "No training records are left for the stage 'sft' in" in printed
    assert "Traceback" not in printed
    assert "return code" not in printed
    assert not run.ranks()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_closed_terminal_and_a_queues_signal(
    configured: Configured, tmp_path: Path, number: signal.Signals
) -> None:
    """SIGUSR1 reaches every process of a SLURM job, DeepSpeed's launcher as well."""
    run = Launched("sft", configured("sft", "stopped", save_steps=0, max_steps=4000), 1)
    run.wait_for(tmp_path / "stopped" / "metrics.jsonl")
    receivers = run.everything() if number is signal.SIGUSR1 else [psutil.Process(run.script.pid)]
    for process in receivers:
        process.send_signal(number)
    printed = run.end(143 if number is signal.SIGHUP else 138, within=60)
    assert "with a checkpoint" in printed
    assert len(list((tmp_path / "stopped" / "checkpoints").iterdir())) == 1
    assert not run.ranks()


def survives_kills(
    stage: str, configured: Configured, trials: int, generator: random.Random
) -> None:
    """Each trial kills a run once or twice, anywhere between its start and its end."""
    whole = configured(stage, "whole")
    started = time.monotonic()
    Launched(stage, whole, 1).end()
    duration = time.monotonic() - started
    expected = Result.of(whole.with_suffix(""), stage)
    for trial in range(trials):
        config, resume = configured(stage, f"trial-{trial}"), []
        moments = []
        for _ in range(generator.choice([1, 2])):
            run = Launched(stage, config, 1, *resume)
            moments.append(generator.uniform(0, duration))
            time.sleep(moments[-1])
            run.kill_all()
            resume = ["resume_from_checkpoint=latest"]
        Launched(stage, config, 1, *resume).end()
        assert Result.of(config.with_suffix(""), stage).equals(expected), moments
        print(f"{stage}: trial {trial} survived kills after {[round(m, 1) for m in moments]} s")


def test_killed_ppo_ends_as_if_nothing_had_happened(configured: Configured) -> None:
    survives_kills("ppo", configured, 1, random.Random(0))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", SCRIPTS)
def test_random_kills(configured: Configured, stage: str) -> None:
    survives_kills(stage, configured, TRIALS_PER_STAGE, random.Random(stage))
