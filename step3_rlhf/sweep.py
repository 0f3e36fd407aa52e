"""The paper's grid of experiments: conditional PM at every α, and KL, at every β.

    bash scripts/sweep.sh STAGE3_CONFIG [--output DIR] [key.path=value ...]
    bash scripts/sweep.sh --report DIR

Each cell is a stage-3 run of its own, through scripts/step3_rlhf.sh. What is finished is skipped,
what was stopped goes on; then the tables (sweep_tables.py) and figures (sweep_figures.py).
"""

import argparse
import importlib.util
import json
import math
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from step3_rlhf.config import EvaluationConfig, PPOConfig
from step3_rlhf.sweep_cells import (
    SETTINGS,
    Cell,
    Grid,
    State,
    changed_settings,
    is_finished,
    regularizer_of,
    state_of,
)
from training.cli import errors_end_cleanly
from training.config import apply_overrides, check_config, read_mapping
from training.errors import RunError, UserError

ROOT = Path(__file__).resolve().parents[1]
ALPHAS, BETAS = (0.1, 0.3, 0.5), (0.1, 0.5, 1.0)
"""The paper's."""
OWN_SETTINGS = (
    "output_dir overwrite_output_dir resume_from_checkpoint regularizer.name regularizer.alpha "
    "regularizer.log_alpha regularizer.alpha_per_token regularizer.beta"
).split()
"""What the sweep itself sets, cell by cell."""


@dataclass(frozen=True)
class Job:
    """A cell, and what is to be done about it."""

    cell: Cell
    directory: Path
    state: State
    settings: PPOConfig | EvaluationConfig
    command: list[str]


def plan(config: str, overrides: list[str], grid: Grid, directory: Path) -> list[Job]:
    """Every cell's job; every config is checked, nothing is started or written.

    Raises:
        UserError: a faulty setting; a finished or stopped cell that was made with other settings.
    """
    faults = [
        f"override {override!r}: the sweep sets {name} itself, cell by cell"
        for override in overrides
        for name in OWN_SETTINGS
        if override.startswith(f"{name}=")
    ]
    if faults:
        raise UserError(faults, "The sweep cannot start:")
    jobs = [job_of(cell, config, overrides, grid, directory / cell.name) for cell in grid.cells()]
    from training.checkpoint import FREE_TO_CHANGE

    for job in jobs:
        record = job.directory / (SETTINGS if job.cell == grid.reference else "config.json")
        if job.state is not State.NEW:
            changed = changed_settings(job.settings, record, tuple(FREE_TO_CHANGE))
            if changed:
                faults.append(f"{job.directory} was made with other {', '.join(changed)}")
    if faults:
        remedy = "remove these directories, choose another --output, or keep the settings"
        raise UserError([*faults, remedy], f"{directory} holds another sweep's cells:")
    return jobs


def job_of(cell: Cell, config: str, overrides: list[str], grid: Grid, directory: Path) -> Job:
    state = state_of(directory)
    data = stage_settings(config, overrides)
    regularizer = regularizer_of(cell, data["regularizer"])
    own: dict[str, Any] = {"output_dir": str(directory)}
    if cell != grid.reference:
        own["regularizer"] = regularizer
        if state is State.STOPPED:
            own["resume_from_checkpoint"] = "latest"
        elif directory.is_dir():
            own["overwrite_output_dir"] = True
    checked = own if state is not State.FINISHED else own | {"overwrite_output_dir": True}
    heading = f"{config} cannot be used for {cell.name}:"
    settings = check_config(PPOConfig, data | checked, heading)
    if cell != grid.reference:
        arguments = [*overrides, *as_overrides(own)]
        command = ["bash", "scripts/step3_rlhf.sh", config, *arguments]
        return Job(cell, directory, state, settings, command)
    measured = reference_settings(settings, regularizer, directory)
    arguments = as_overrides(measured.model_dump(mode="json", exclude_defaults=True))
    command = ["bash", "scripts/evaluate.sh", str(directory), *arguments]
    return Job(cell, directory, state, measured, command)


def stage_settings(config: str, overrides: list[str]) -> dict[str, Any]:
    """The config's own settings with the user's overrides, still plain data."""
    data = read_mapping(config)
    if faults := apply_overrides(data, overrides):
        raise UserError(faults, f"{config} cannot be used:")
    if not isinstance(data.get("regularizer", {}), dict):
        raise UserError(f"{config}: regularizer: an object was expected")
    return {"regularizer": {}} | data


def reference_settings(
    config: PPOConfig, regularizer: dict[str, Any], directory: Path
) -> EvaluationConfig:
    """How the cells are measured, with the reference in the policy's place."""
    settings = EvaluationConfig.of(config).model_dump(mode="json")
    own = {
        "model_name_or_path": config.reference_model_name_or_path or config.model_name_or_path,
        "reference_model_name_or_path": None,
        "regularizer": regularizer,
        "output_dir": str(directory),
    }
    return check_config(EvaluationConfig, settings | own, f"{directory} cannot be measured:")


def as_overrides(settings: dict[str, Any]) -> list[str]:
    return [f"{name}={json.dumps(value)}" for name, value in settings.items()]


class Launcher:
    """Runs one command at a time; a signal goes to the command, which may save a checkpoint."""

    def __init__(self) -> None:
        self.stopped_by = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Launcher":
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __call__(self, command: list[str]) -> int:
        """The command's exit code. In a session of its own, so that Ctrl-C reaches it once."""
        if self.stopped_by:
            return 128 + self.stopped_by
        self._process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        if self.stopped_by:  # the signal came while the command was being started
            self._process.send_signal(self.stopped_by)
        return self._process.wait()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = number
        if self._process is not None:
            self._process.send_signal(number)


def run(jobs: list[Job], launch: Callable[[list[str]], int]) -> dict[str, int]:
    """Run what is not finished, one cell after the other; a failure does not stop the others.

    Returns:
        The exit code of every cell that failed; 0 where it ended well but left no results.
    """
    failed: dict[str, int] = {}
    remaining = sum(job.state is not State.FINISHED for job in jobs)
    seconds: list[float] = []
    for number, job in enumerate(jobs, start=1):
        print(f"\n=== cell {number} of {len(jobs)}: {job.cell.name} {job.state.value} ===")
        if job.state is State.FINISHED:
            continue
        sys.stdout.flush()
        started = time.monotonic()
        prepare(job)
        code = launch(job.command)
        seconds.append(time.monotonic() - started)
        remaining -= 1
        if code or not is_finished(job.directory):
            failed[job.cell.name] = code
        outcome = f"failed with exit code {code}" if job.cell.name in failed else "done"
        estimate = remaining * sum(seconds) / len(seconds)
        print(
            f"=== {job.cell.name}: {outcome} after {duration(seconds[-1])}; "
            f"{remaining} to go, about {duration(estimate)} ===",
            flush=True,
        )
    return failed


def prepare(job: Job) -> None:
    """Evaluation writes into a directory that is there, and does not say what it was told."""
    if isinstance(job.settings, EvaluationConfig):
        shutil.rmtree(job.directory, ignore_errors=True)
        job.directory.mkdir(parents=True)
        (job.directory / SETTINGS).write_text(job.settings.model_dump_json(indent=2) + "\n")


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def sweep(options: argparse.Namespace) -> None:
    """Plan, run, report."""
    data = stage_settings(options.config, options.overrides)
    grid = Grid(
        str(data.get("model_name_or_path")), options.alphas, options.betas, options.grid_only
    )
    directory = Path(options.output or Path(str(data.get("output_dir"))).parent / "sweep")
    jobs = plan(options.config, options.overrides, grid, directory)
    if options.dry_run:
        for job in jobs:
            command = "" if job.state is State.FINISHED else f"\n  {shlex.join(job.command)}"
            print(f"{job.cell.name}: {job.state.value}{command}")
        return
    grid.write(directory)
    with Launcher() as launcher:
        failed: dict[str, int] = {}
        for_each = run_until_stopped(jobs, launcher, failed)
    if for_each:
        sys.exit(for_each)
    print("\n" + write_report(directory, grid))
    if failed:
        lines = [f"{name}: exit code {code}" for name, code in failed.items()]
        raise RunError(
            "\n".join(
                [f"{len(failed)} of {len(jobs)} cells failed:", *(f"  - {line}" for line in lines)]
                + ["The others are finished; the same command runs only the failed ones again."]
            )
        )


def write_report(directory: Path, grid: Grid) -> str:
    raise NotImplementedError
