"""Runs the jobs of a sweep one after the other."""

import time
from collections.abc import Callable

from step3_rlhf.config import EvaluationConfig
from step3_rlhf.paper.grid.cells import SETTINGS, State, is_finished
from step3_rlhf.paper.grid.jobs import Job


def run(jobs: list[Job], launch: Callable[[list[str]], int]) -> dict[str, str]:
    """Finish the cells one after the other; one that fails does not keep the others from it.

    Returns:
        What went wrong, by the cell's name.
    """
    failed: dict[str, str] = {}
    seconds: list[float] = []
    remaining = sum(job.state is not State.FINISHED for job in jobs)
    for number, job in enumerate(jobs, start=1):
        heading = f"cell {number} of {len(jobs)}: {job.cell.name}: {job.state.value}"
        print(f"=== {heading} ===", flush=True)
        if job.state is State.FINISHED:
            continue
        started = time.monotonic()
        if isinstance(job.settings, EvaluationConfig):  # does not keep its settings itself
            job.directory.mkdir(parents=True, exist_ok=True)
            (job.directory / SETTINGS).write_text(job.settings.model_dump_json(indent=2) + "\n")
        code = launch(job.command)
        seconds.append(time.monotonic() - started)
        remaining -= 1
        outcome = "done"
        if code or not is_finished(job.directory):
            outcome = f"exit code {code}" if code else "ended without its results"
            failed[job.cell.name] = outcome
        left = duration(remaining * sum(seconds) / len(seconds))
        print(
            f"=== {job.cell.name}: {outcome}, {duration(seconds[-1])}; "
            f"{remaining} more to run, about {left} ===\n",
            flush=True,
        )
    return failed


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
