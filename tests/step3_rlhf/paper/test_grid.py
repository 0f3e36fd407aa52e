"""A sweep's jobs: cells and commands, what is finished, what resumes, what is refused."""

import json
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from step3_rlhf.config import EvaluationConfig, PPOConfig
from step3_rlhf.evaluation.settings import run_settings
from step3_rlhf.paper.grid import __main__ as sweep
from step3_rlhf.paper.grid.cells import (
    SETTINGS,
    Cell,
    Grid,
    State,
    is_finished,
    regularizer_of,
    state_of,
)
from step3_rlhf.paper.grid.jobs import Job, Sweep, jobs_of
from step3_rlhf.paper.grid.launcher import Launcher
from step3_rlhf.paper.grid.results import cell_label
from step3_rlhf.paper.grid.run import duration, run
from training.config import apply_overrides, check_config, load_config
from training.errors import RunError, UserError
from training.runtime.resume import STATE

GRID = Grid("a/model", (0.1, 0.3), (0.5, 1.0))
NAMES = [
    "reference",
    "beta-0.5/conditional_pm-0.1",
    "beta-0.5/conditional_pm-0.3",
    "beta-0.5/kl",
    "beta-1.0/conditional_pm-0.1",
    "beta-1.0/conditional_pm-0.3",
    "beta-1.0/kl",
    "beta-1.0/pm",
]


@pytest.fixture
def request_of(
    stage_settings: Callable[[str], dict[str, Any]], tmp_path: Path
) -> Callable[..., Sweep]:
    config = tmp_path / "stage3.json"
    config.write_text(json.dumps(stage_settings("ppo")))

    def request(*overrides: str, grid: Grid = GRID) -> Sweep:
        return Sweep(str(config), list(overrides), grid, tmp_path / "sweep")

    return request


def finish(directory: Path, config: Any = None, prompts: int = 2) -> None:
    """What a cell that ended well leaves behind."""
    directory.mkdir(parents=True, exist_ok=True)
    if config is not None:
        name = "config.json" if isinstance(config, PPOConfig) else SETTINGS
        (directory / name).write_text(config.model_dump_json())
    (directory / "evaluation.json").write_text(json.dumps({"prompts": prompts}))
    (directory / "instances.jsonl").write_text('{"prompt": "x"}\n' * prompts)


def stop(directory: Path, config: Any) -> None:
    """What a cell that was stopped after a checkpoint leaves behind."""
    checkpoint = directory / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / STATE).write_text("{}")
    (directory / "config.json").write_text(config.model_dump_json())


# Cells


def test_the_grid_has_the_papers_cells() -> None:
    assert [cell.name for cell in GRID.cells()] == NAMES
    without = Grid("a/model", (0.1, 0.3), (0.5, 1.0), without_pm=True)
    assert [cell.name for cell in without.cells()] == NAMES[:-1]
    whole = Grid("a/model", sweep.ALPHAS, sweep.BETAS)
    assert len(whole.cells()) == 3 * 4 + 2


@pytest.mark.parametrize(("betas", "expected"), [((0.5, 1.0, 2.0), 1.0), ((0.1, 0.5), 0.5)])
def test_figure_1_is_for_beta_1_or_the_largest(betas: tuple[float, ...], expected: float) -> None:
    assert Grid("m", (0.1,), betas).main_beta == expected


def test_conditional_pm_keeps_what_the_config_says_of_it() -> None:
    cell = Cell("conditional_pm", 0.5, 0.3)
    expected = {"name": "conditional_pm", "alpha": 0.3, "beta": 0.5}
    assert regularizer_of(cell, {"name": "kl", "beta": 7.0}) == expected
    given = {"name": "conditional_pm", "level": "sequence", "alpha_per_token": 0.1, "epsilon": 0.2}
    assert regularizer_of(cell, given) == {
        "name": "conditional_pm",
        "level": "sequence",
        "epsilon": 0.2,
        "alpha_per_token": 0.3,
        "beta": 0.5,
    }
    assert regularizer_of(Cell("kl", 0.5), given) == {"name": "kl", "beta": 0.5}
    by_logarithm = {"name": "conditional_pm", "level": "sequence", "log_alpha": -50.0}
    assert regularizer_of(replace(cell, alpha=-60.0), by_logarithm) == {
        "name": "conditional_pm",
        "level": "sequence",
        "log_alpha": -60.0,
        "beta": 0.5,
    }
    with pytest.raises(UserError, match=r"logarithms in nats, below 0, as in --alphas=-60,-30"):
        regularizer_of(cell, by_logarithm)
    assert cell_label(replace(cell, alpha=-60.0)) == "log α = -60"
    assert cell_label(cell) == "α = 0.3"
    of_classes = {"name": "conditional_pm", "level": "class", "classes": {"lengths": [4]}}
    assert regularizer_of(cell, of_classes) == {**of_classes, "alpha": 0.3, "beta": 0.5}


def test_the_grid_survives_its_file(tmp_path: Path) -> None:
    GRID.write(tmp_path / "new")
    assert Grid.read(tmp_path / "new") == GRID
    with pytest.raises(UserError, match=r"holds no sweep\.json, so it is no sweep"):
        Grid.read(tmp_path)
    (tmp_path / "sweep.json").write_text('{"model": "m"}')
    with pytest.raises(UserError, match=r"sweep\.json"):
        Grid.read(tmp_path)


# States


def test_a_cell_is_finished_when_its_last_file_is_whole(tmp_path: Path) -> None:
    assert not is_finished(tmp_path / "nowhere")
    finish(tmp_path)
    assert is_finished(tmp_path)
    instances = tmp_path / "instances.jsonl"
    whole = instances.read_text()
    for cut in (whole[:-5], whole.splitlines()[0], ""):
        instances.write_text(cut)
        assert not is_finished(tmp_path)
    instances.write_text(whole)
    (tmp_path / "evaluation.json").write_text('{"promp')
    assert not is_finished(tmp_path)


def test_line_separators_in_a_response_end_no_line(tmp_path: Path) -> None:
    finish(tmp_path)
    instances = tmp_path / "instances.jsonl"
    odd = {"responses": [{"text": "one\u2028two\x85three"}]}
    line = json.dumps(odd, ensure_ascii=False) + "\n"
    instances.write_text(line * 2, encoding="utf-8")
    assert is_finished(tmp_path)


def test_only_a_complete_checkpoint_is_gone_on_from(tmp_path: Path) -> None:
    assert state_of(tmp_path) is State.NEW
    checkpoint = tmp_path / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    assert state_of(tmp_path) is State.NEW
    (checkpoint / STATE).write_text("{}")
    assert state_of(tmp_path) is State.STOPPED
    (tmp_path / "actor").mkdir()
    assert state_of(tmp_path) is State.STOPPED
    (tmp_path / "critic").mkdir()
    assert state_of(tmp_path) is State.TRAINED
    finish(tmp_path)
    assert state_of(tmp_path) is State.FINISHED


# The jobs


def config_of(job: Job) -> PPOConfig:
    """What stage 3 makes of the job's command."""
    shell, script, path, *overrides = job.command
    assert (shell, script) == ("bash", "scripts/step3_rlhf.sh")
    return load_config(PPOConfig, path, overrides)


def test_every_command_is_one_that_the_stage_accepts(request_of: Callable[..., Sweep]) -> None:
    request = request_of("seed=7", "data.max_eval_samples=6")
    reference, *trained = jobs_of(request)
    for job in trained:
        config = config_of(job)
        assert config == job.settings
        assert config.output_dir == str(request.directory / job.cell.name)
        assert (config.seed, config.data.max_eval_samples) == (7, 6)
        assert config.regularizer.name == job.cell.kind
        assert config.regularizer.beta == job.cell.beta
        assert getattr(config.regularizer, "alpha", None) == job.cell.alpha
        assert config.resume_from_checkpoint is None

    shell, script, run_dir, *overrides = reference.command
    assert (shell, script) == ("bash", "scripts/evaluate.sh")
    Path(run_dir).mkdir(parents=True)
    settings = run_settings(run_dir)
    assert apply_overrides(settings, overrides) == []
    measured = check_config(EvaluationConfig, settings, "reference:")
    assert measured == reference.settings
    config = config_of(trained[0])
    assert measured.model_name_or_path == config.model_name_or_path
    assert measured.regularizer is not None
    assert measured.regularizer.preference_temperature == 1.0
    assert (measured.seed, measured.evaluation) == (7, config.evaluation)
    assert not any(job.directory.exists() for job in trained)


def test_finished_cells_are_skipped_and_stopped_ones_go_on(
    request_of: Callable[..., Sweep],
) -> None:
    jobs = jobs_of(request_of("save_steps=2"))
    finish(jobs[0].directory, jobs[0].settings)
    finish(jobs[1].directory, jobs[1].settings)
    stop(jobs[2].directory, jobs[2].settings)
    jobs[3].directory.mkdir(parents=True)  # it ended before its first checkpoint
    (jobs[3].directory / "config.json").write_text("{}")
    for name in ("actor", "critic"):
        (jobs[4].directory / name).mkdir(parents=True)
    (jobs[4].directory / "config.json").write_text(jobs[4].settings.model_dump_json())
    again = jobs_of(request_of("save_steps=1"))  # which does not change what a run computes
    states = [State.FINISHED, State.FINISHED, State.STOPPED, State.NEW, State.TRAINED]
    assert [job.state for job in again] == [*states, *[State.NEW] * 3]
    assert config_of(again[2]).resume_from_checkpoint == "latest"
    assert config_of(again[3]).overwrite_output_dir
    assert again[4].command == ["bash", "scripts/evaluate.sh", str(jobs[4].directory)]
    assert not config_of(again[5]).overwrite_output_dir


def test_cells_of_other_settings_are_refused(request_of: Callable[..., Sweep]) -> None:
    jobs = jobs_of(request_of())
    for job in jobs[:2]:
        finish(job.directory, job.settings)
    stop(jobs[2].directory, jobs[2].settings)
    jobs_of(request_of())
    with pytest.raises(UserError) as caught:
        jobs_of(request_of("seed=7", "total_episodes=16"))
    message = str(caught.value)
    assert "reference: made with another seed\n" in message
    assert "beta-0.5/conditional_pm-0.1: made with another seed, total_episodes\n" in message
    assert "beta-0.5/conditional_pm-0.3: made with another seed, total_episodes\n" in message
    assert "beta-0.5/kl" not in message
    assert "choose another --output" in message


def test_mistakes_are_found_before_the_first_cell(request_of: Callable[..., Sweep]) -> None:
    with pytest.raises(UserError) as caught:
        jobs_of(request_of("output_dir=x", "regularizer.alpha=0.1", "nonsense"))
    message = str(caught.value)
    assert "output_dir: the sweep sets it; see --output" in message
    assert "regularizer.alpha: the sweep sets it" in message
    assert "'nonsense': write it as key.path=value" in message
    with pytest.raises(UserError, match="total_episode: unknown key; did you mean 'total_epi"):
        jobs_of(request_of("total_episode=4"))
    with pytest.raises(UserError, match="regularizer: an object was expected"):
        jobs_of(request_of("regularizer=kl"))


# Running


def test_a_failed_cell_is_named_and_the_others_are_run(
    request_of: Callable[..., Sweep], capsys: pytest.CaptureFixture[str]
) -> None:
    first = jobs_of(request_of())[1]
    finish(first.directory, first.settings)
    jobs = jobs_of(request_of())
    commands: list[list[str]] = []

    def launch(command: list[str]) -> int:
        job = next(job for job in jobs if job.command == command)
        commands.append(command)
        if job.cell == Cell("kl", 0.5):
            return 3
        if job.cell != Cell("pm", 1.0):  # which says that all is well, and leaves nothing
            finish(job.directory)
        return 0

    failed = run(jobs, launch)
    assert failed == {"beta-0.5/kl": "exit code 3", "beta-1.0/pm": "ended without its results"}
    assert commands == [job.command for job in jobs if job is not jobs[1]]
    printed = capsys.readouterr().out
    assert "=== cell 2 of 8: beta-0.5/conditional_pm-0.1: finished earlier ===" in printed
    assert "=== cell 8 of 8: beta-1.0/pm: starts ===" in printed
    assert "=== reference: done, 0 s; 6 more to run, about 0 s ===" in printed


def test_the_sweep_fails_with_its_cells_names(
    request_of: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Launcher, "__call__", lambda self, command: 3)
    with pytest.raises(RunError) as caught:
        sweep.run_sweep(request_of())
    assert "8 of 8 cells failed" in str(caught.value)
    assert "  - beta-1.0/pm: exit code 3" in str(caught.value)


def test_the_launcher_returns_the_exit_code() -> None:
    with Launcher() as launch:
        assert launch([sys.executable, "-c", "raise SystemExit(7)"]) == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_reaches_the_command_and_ends_the_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """The command interrupts its parent, waits to be told to stop itself, and saves first."""
    saved = tmp_path / "saved"
    program = (
        "import os, pathlib, signal, sys, time\n"
        "def save(*_):\n"
        f"    pathlib.Path({str(saved)!r}).touch()\n"
        "    sys.exit(0)\n"
        f"signal.signal({number}, save)\n"
        f"os.kill(os.getppid(), {number})\n"
        "time.sleep(60)\n"
    )
    outside = signal.signal(number, signal.SIG_DFL)  # the tests may be run by nohup
    with Launcher() as launch, pytest.raises(SystemExit) as caught:
        launch([sys.executable, "-c", program])
    assert caught.value.code == 128 + number
    assert saved.is_file()
    assert "the same command goes on" in capsys.readouterr().err
    assert signal.signal(number, outside) is signal.SIG_DFL


def test_slurms_signal_reaches_the_command_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM gives it to every process of a step; scripts/launch.sh takes a second one for haste."""
    program = (
        "import os, pathlib, signal, time\n"
        "received = []\n"
        "signal.signal(signal.SIGUSR1, lambda *_: received.append(1))\n"
        "for process in (os.getpid(), os.getppid()):\n"
        "    os.kill(process, signal.SIGUSR1)\n"
        "time.sleep(0.5)\n"
        f"pathlib.Path({str(tmp_path / 'received')!r}).write_text(str(len(received)))\n"
    )
    for variables, expected in (({"SLURM_STEP_ID": "0"}, "1"), ({}, "2")):
        monkeypatch.delenv("SLURM_STEP_ID", raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with Launcher() as launch, pytest.raises(SystemExit) as caught:
            launch([sys.executable, "-c", program])
        assert caught.value.code == 128 + signal.SIGUSR1
        assert (tmp_path / "received").read_text() == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.4, "0 s"), (119, "119 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_durations(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


# The command line


def test_options_may_stand_anywhere() -> None:
    options = sweep.parsed(["c.json", "--betas", "1,0.5,1", "seed=7", "--alphas", "0.3", "a.b=c"])
    assert (options.betas, options.alphas) == ((0.5, 1.0), (0.3,))
    assert sweep.parsed(["c.json", "--alphas=-30,-60"]).alphas == (-60.0, -30.0)
    assert (options.config, options.overrides) == ("c.json", ["seed=7", "a.b=c"])
    defaults = sweep.parsed(["c.json"])
    assert (defaults.alphas, defaults.betas) == ((0.1, 0.3, 0.5), (0.1, 0.5, 1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a stage-3 config, or --report"),
        (["c.json", "--report", "d"], "give a stage-3 config, or --report"),
        (["c.json", "--alphas", "0.1,x"], "numbers above 0 were expected"),
        (["c.json", "--betas", "0"], "numbers above 0 were expected"),
        (["c.json", "--betas", "inf"], "numbers above 0 were expected"),
        (["c.json", "--alphas", ""], "numbers above 0 were expected"),
        (["c.json", "--alphas=-60,0.3"], "numbers above 0 were expected"),
        (["c.json", "--model-name", "a", "--model-name", "b"], "--model-name: 1 expected"),
        (["--report", "d", "e", "--model-name", "a"], "--model-name: 2 expected"),
        (["--report", "d", "--output", "o"], "a single sweep's report is written into its own"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        sweep.main(arguments)
    assert message in capsys.readouterr().err


def test_dry_run_starts_and_writes_nothing(
    request_of: Callable[..., Sweep], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = request_of()
    sweep.main([request.config, "--dry-run", "--alphas", "0.3", "--betas", "1"])
    printed = capsys.readouterr().out
    default = Path(request.settings()["output_dir"]).parent / "sweep"
    assert f'output_dir="{default / "beta-1.0/kl"}"' in printed
    assert printed.count("starts\n") == 4
    assert not default.exists()


def test_a_report_needs_a_finished_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    GRID.write(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        sweep.main(["--report", str(tmp_path)])
    assert "no cell of this sweep is finished" in capsys.readouterr().err


def test_the_model_is_named(
    request_of: Callable[..., Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what SFT started from, which --model-name overrides, and so in sweep.json."""
    monkeypatch.setattr(Launcher, "__call__", lambda self, command: 3)
    config = json.loads(Path(request_of().config).read_text())
    sft = tmp_path / "opt" / "sft"
    shutil.copytree(config["model_name_or_path"], sft / "model")
    (sft / "config.json").write_text('{"model_name_or_path": "facebook/opt-1.3b"}')
    arguments = [request_of().config, f"model_name_or_path={sft / 'model'}", "--alphas", "0.3"]
    for further, expected in (([], "facebook/opt-1.3b"), (["--model-name", "Mine"], "Mine")):
        with pytest.raises(SystemExit):  # every cell fails
            sweep.main([*arguments, *further, "--output", str(tmp_path / "named")])
        assert Grid.read(tmp_path / "named").name == expected


def measured(directory: Path, grid: Grid, perplexity: float) -> None:
    """A sweep whose cells hold what the tables and figures need."""
    grid.write(directory)
    names = "pm_divergence pm_divergence_reference length perplexity".split()
    names += ["entropy_per_token", "kl_per_token"]
    report: dict[str, Any] = {name: {"mean": perplexity, "ci95": 0.5, "count": 1} for name in names}
    interval = {"perplexity_ci95": None, "perplexity_low": None, "perplexity_high": None}
    report["held_out_text"] = {"texts": 1, "clusters": 1, "perplexity": perplexity, **interval}
    sides = [{"text": t, "logp": 0.5, "ref_logp": 0.5, "reward": 1.0, "ended": True} for t in "ab"]
    for cell in grid.cells():
        finish(directory / cell.name, prompts=1)
        more = {"prompts": 1, "pairs_per_prompt": 1, "preference_temperature": cell.beta}
        (directory / cell.name / "evaluation.json").write_text(json.dumps(report | more))
        instance = json.dumps({"prompt": "p", "responses": sides})
        (directory / cell.name / "instances.jsonl").write_text(instance + "\n")


@pytest.mark.long
def test_a_report_on_several_sweeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other, joint = tmp_path / "one", tmp_path / "other", tmp_path / "together"
    opt = Grid("facebook/opt-1.3b", (0.3,), (1.0,), paper_model="opt-1.3b")
    measured(one, opt, 9.0)
    measured(other, Grid("x/sft/model", (0.3,), (1.0,), name="Llama-2-7B"), 7.0)
    sweep.main(["--report", str(one), str(other)])
    printed = capsys.readouterr().out
    assert "**Table 3: " in printed
    assert "**Table 2: " in printed
    last = [f"{one / 'figure1_perplexity_models'}.{suffix}" for suffix in ("png", "pdf")]
    assert printed.splitlines()[-3:] == ["Figure 1 with a panel for each model:", *last]
    for path in map(Path, last):
        assert path.stat().st_size > 5_000
    assert (one / "figure7_pm_divergence.png").is_file()
    assert (other / "figure5_pm_divergence.png").is_file()
    assert not (other / "figure1_perplexity_models.png").exists()
    for directory, name in ((one, "facebook/opt-1.3b"), (other, "Llama-2-7B")):
        assert f"fine-tuning {name}. " in (directory / "table.md").read_text()

    numbers = ["--paper-model", "llama-2-7b", "--paper-model", "opt-1.3b"]
    sweep.main(["--report", str(one), str(other), "--output", str(joint), *numbers])
    assert (joint / "figure1_perplexity_models.png").is_file()
    assert (one / "figure5_pm_divergence.png").is_file()
    assert not (one / "figure7_pm_divergence.png").exists()
    assert (other / "table.md").read_text().startswith("**Table 3: ")
    assert Grid.read(other).paper_model == "llama-2-7b"  # a report leaves sweep.json alone


def test_the_papers_model_is_recorded_and_checked(tmp_path: Path) -> None:
    Grid("m", (0.3,), (1.0,), paper_model="opt-1.3b").write(tmp_path)
    assert Grid.read(tmp_path).paper_model == "opt-1.3b"
    record = json.loads((tmp_path / "sweep.json").read_text())
    del record["paper_model"]  # a sweep of an earlier version
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    assert Grid.read(tmp_path).paper_model == "llama-2-7b"
    (tmp_path / "sweep.json").write_text(json.dumps(record | {"paper_model": "gpt"}))
    with pytest.raises(UserError, match="'gpt' is not a model of the paper"):
        Grid.read(tmp_path)
    with pytest.raises(SystemExit):
        sweep.parsed(["c.json", "--paper-model", "gpt"])


def test_a_report_on_one_sweep_has_no_joint_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(tmp_path, Grid("m", (0.3,), (1.0,)), 9.0)
    sweep.main(["--report", str(tmp_path)])
    assert (tmp_path / "figure1_perplexity.png").is_file()
    assert "figure1_perplexity_models" not in capsys.readouterr().out


def test_nothing_is_written_where_one_of_several_is_no_sweep(tmp_path: Path) -> None:
    measured(tmp_path / "one", Grid("m", (0.3,), (1.0,)), 9.0)
    with pytest.raises(SystemExit, match="2"):
        sweep.main(["--report", str(tmp_path / "one"), str(tmp_path / "none")])
    assert not (tmp_path / "one" / "table.md").exists()


# Several nodes


def test_a_sweep_is_not_started_on_every_node(
    request_of: Callable[..., Sweep],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What scripts/slurm.sh would do on two nodes; on one node it may, or without NODE_RANK."""
    started: list[list[str]] = []

    def launch(self: Launcher, command: list[str]) -> int:
        started.append(command)
        return 3

    monkeypatch.setattr(Launcher, "__call__", launch)
    hosts = tmp_path / "hosts"
    monkeypatch.setenv("HOSTFILE", str(hosts))
    for text, node, refused in (
        ("a slots=4\nb slots=4\n", "1", True),
        ("a slots=4\nb slots=4\n", None, False),
        ("a slots=4\n# b slots=4\n", "0", False),
    ):
        started.clear()
        hosts.write_text(text)
        monkeypatch.delenv("NODE_RANK", raising=False)
        if node is not None:
            monkeypatch.setenv("NODE_RANK", node)
        with pytest.raises(SystemExit):
            sweep.main([request_of().config, "--alphas", "0.3", "--betas", "1"])
        assert ("a sweep is started once" in capsys.readouterr().err) == refused
        assert len(started) == (0 if refused else 4)


def test_cells_that_were_run_one_by_one_are_skipped(
    request_of: Callable[..., Sweep], capsys: pytest.CaptureFixture[str]
) -> None:
    """--help's way for SLURM: each training command of --dry-run a job, then the sweep itself."""
    request = request_of("seed=7")
    arguments = [request.config, "seed=7", "--alphas", "0.3", "--betas", "1"]
    arguments += ["--output", str(request.directory)]
    sweep.main([*arguments, "--dry-run"])
    printed = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line) for line in printed if line.startswith("    ")]
    for _, script, path, *overrides in commands[1:]:
        assert script == "scripts/step3_rlhf.sh"
        config = load_config(PPOConfig, path, overrides)
        finish(Path(config.output_dir), config)
    sweep.main([*arguments, "--dry-run"])
    states = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    finished = ["beta-1.0/conditional_pm-0.3", "beta-1.0/kl", "beta-1.0/pm"]
    assert states == ["reference: starts", *(f"{name}: finished earlier" for name in finished)]
