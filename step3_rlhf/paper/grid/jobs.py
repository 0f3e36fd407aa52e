"""The job of each cell of a sweep. Every config is checked before the first job runs."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step3_rlhf.config import EvaluationConfig, PPOConfig
from step3_rlhf.paper.grid.cells import (
    SETTINGS,
    Cell,
    Grid,
    State,
    changed_settings,
    regularizer_of,
    state_of,
)
from training.config import apply_overrides, check_config, read_mapping
from training.errors import UserError

ROOT = Path(__file__).resolve().parents[3]

OWN_SETTINGS = (
    "output_dir overwrite_output_dir resume_from_checkpoint regularizer.name regularizer.alpha "
    "regularizer.log_alpha regularizer.alpha_per_token regularizer.beta"
).split()
"""Settings that the sweep gives to each cell itself."""


@dataclass(frozen=True)
class Job:
    """A cell and the command that finishes it, which runs in the user's directory."""

    cell: Cell
    directory: Path
    state: State
    settings: PPOConfig | EvaluationConfig
    command: list[str]


@dataclass(frozen=True)
class Sweep:
    """A sweep as the user asked for it."""

    config: str
    overrides: list[str]
    grid: Grid
    directory: Path

    def settings(self) -> dict[str, Any]:
        """The config with the overrides, plain data."""
        return stage_settings(self.config, self.overrides)


def stage_settings(config: str, overrides: list[str]) -> dict[str, Any]:
    """The config with the overrides as plain data, checked only for what the sweep relies on.

    Raises:
        UserError: for an override that cannot be applied, or that the sweep sets itself.
    """
    data = read_mapping(config)
    faults = apply_overrides(data, overrides)
    for override in overrides:
        name = override.partition("=")[0]
        if name in OWN_SETTINGS:
            faults.append(f"{name}: the sweep sets it; see --output, --alphas and --betas")
    for name, kind in {"model_name_or_path": str, "output_dir": str, "regularizer": dict}.items():
        if not isinstance(data.get(name), kind):
            faults.append(f"{name}: {'an object' if kind is dict else 'a text'} was expected")
    if faults:
        raise UserError(faults, f"{config} cannot be swept:")
    return data


def jobs_of(sweep: Sweep) -> list[Job]:
    """The job of every cell, in the order in which they run; nothing is started or written.

    Raises:
        UserError: for a faulty setting, or cells that were made with other settings.
    """
    grid = sweep.grid
    trained = {cell: training_job(cell, sweep) for cell in grid.cells() if cell != grid.reference}
    one = next(iter(trained.values()))  # they differ in their regularizers only
    jobs = [trained.get(cell) or reference_job(one, sweep) for cell in grid.cells()]
    refuse_changed_settings(jobs, sweep.directory)
    return jobs


def training_job(cell: Cell, sweep: Sweep) -> Job:
    """A run of stage 3. It starts from scratch unless it is finished or has a checkpoint."""
    data, directory = sweep.settings(), sweep.directory / cell.name
    state = state_of(directory)
    own: dict[str, Any] = {
        "output_dir": str(directory),
        "regularizer": regularizer_of(cell, data["regularizer"]),
    }
    if state is State.STOPPED:
        own["resume_from_checkpoint"] = "latest"
    elif directory.is_dir():
        own["overwrite_output_dir"] = True
    settings = check_config(
        PPOConfig, data | own, f"{sweep.config} cannot be used for {cell.name}:"
    )
    arguments = [sweep.config, *sweep.overrides, *as_overrides(own)]
    command = ["bash", script("step3_rlhf.sh"), *arguments]
    if state is State.TRAINED:
        command = ["bash", script("evaluate.sh"), str(directory)]
    return Job(cell, directory, state, settings, command)


def reference_job(trained: Job, sweep: Sweep) -> Job:
    """An evaluation like that of the trained cells, with the reference in the policy's place."""
    config, cell = trained.settings, sweep.grid.reference
    assert isinstance(config, PPOConfig)
    directory = sweep.directory / cell.name
    settings = EvaluationConfig.of(config).model_dump(mode="json") | {
        "model_name_or_path": config.reference_model_name_or_path or config.model_name_or_path,
        "reference_model_name_or_path": None,
        "regularizer": regularizer_of(cell, {}),
        "output_dir": str(directory),
    }
    checked = check_config(
        EvaluationConfig, settings, f"{sweep.config} cannot be used for {cell.name}:"
    )
    arguments = as_overrides(checked.model_dump(mode="json", exclude_defaults=True))
    command = ["bash", script("evaluate.sh"), str(directory), *arguments]
    return Job(cell, directory, state_of(directory), checked, command)


def script(name: str) -> str:
    """The path of one of scripts/, from where the user stands."""
    return os.path.relpath(ROOT / "scripts" / name)


def as_overrides(settings: dict[str, Any]) -> list[str]:
    return [f"{name}={json.dumps(value)}" for name, value in settings.items()]


def refuse_changed_settings(jobs: list[Job], directory: Path) -> None:
    """Cells of one table differ in their regularizer only."""
    faults = []
    for job in jobs:
        if job.state is not State.NEW:
            record = "config.json" if isinstance(job.settings, PPOConfig) else SETTINGS
            changed = changed_settings(job.settings, job.directory / record)
            if changed:
                faults.append(f"{job.cell.name}: made with another {', '.join(changed)}")
    if faults:
        remedy = "remove these cells, choose another --output, or give the settings of before"
        raise UserError([*faults, remedy], f"{directory} holds cells of another sweep:")
