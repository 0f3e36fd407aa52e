"""The paper's grid of experiments: conditional PM at every α, and KL, at every β.

    bash scripts/sweep.sh STAGE3_CONFIG [--output DIR] [key.path=value ...]
    bash scripts/sweep.sh --report DIR

Every cell is a run of scripts/step3_rlhf.sh. What is finished is skipped and what was stopped goes
on (sweep_cells.py, sweep_plan.py); then come the tables (sweep_tables.py), the figures
(sweep_figures.py) and a page with samples side by side (sweep_page.py).
"""

import argparse
import importlib.util
import math
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from step3_rlhf.config import EvaluationConfig
from step3_rlhf.sweep_cells import SETTINGS, Grid, State, is_finished
from step3_rlhf.sweep_plan import Job, Request, plan, stage_settings
from training.cli import errors_end_cleanly
from training.errors import RunError, UserError
from training.signals import STOPPING

ROOT = Path(__file__).resolve().parents[1]
ALPHAS, BETAS = (0.1, 0.3, 0.5), (0.1, 0.5, 1.0)
"""The paper's."""


class Launcher:
    """Runs a command; a signal goes to the command, which may save a checkpoint, then ends all."""

    def __init__(self) -> None:
        self._stopped_by = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Launcher":
        numbers = [*STOPPING, signal.SIGHUP]
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup
            numbers.remove(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._stop) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self, command: list[str]) -> int:
        """The exit code. In a session of its own, Ctrl-C reaches the command through `_stop` only.

        Raises:
            SystemExit: the sweep was told to stop.
        """
        code = 0
        if not self._stopped_by:
            self._process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
            if self._stopped_by:  # the signal came while the command was being started
                self._process.send_signal(self._stopped_by)
            code = self._process.wait()
        if self._stopped_by:
            print("\nThe sweep was stopped; the same command goes on with it", file=sys.stderr)
            sys.exit(128 + self._stopped_by)
        return code

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped_by = number
        if self._process is not None:
            self._process.send_signal(number)


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


def sweep(request: Request) -> None:
    """Run what is not finished, then report on everything.

    Raises:
        RunError: with every cell that failed; the others are in the report.
    """
    jobs = plan(request)
    request.grid.write(request.directory)
    with Launcher() as launch:
        failed = run(jobs, launch)
    if len(failed) < len(jobs):
        print(report(request.directory))
    if failed:
        lines = [f"  - {name}: {outcome}" for name, outcome in failed.items()]
        heading = f"{len(failed)} of {len(jobs)} cells failed; the same command runs them again:"
        raise RunError("\n".join([heading, *lines]))


def describe(request: Request) -> str:
    """What `sweep` would do, for --dry-run."""
    lines = []
    for job in plan(request):
        lines.append(f"{job.cell.name}: {job.state.value}")
        if job.state is not State.FINISHED:
            lines.append(f"    {shlex.join(job.command)}")
    return "\n".join(lines)


def report(directory: Path) -> str:
    """Write tables, figures and page from what is finished; returns what the terminal shows."""
    from step3_rlhf import sweep_figures, sweep_page, sweep_tables
    from step3_rlhf.sweep_results import read_results

    results = read_results(directory)
    files = sweep_tables.write_tables(results, directory)
    drawn, left_out = sweep_figures.draw_figures(results, directory)
    page = sweep_page.write_page(results, drawn, directory)
    lines = [sweep_tables.markdown(results), *map(str, [*files, *drawn, page])]
    lines += [f"not drawn: {name}: {reason}" for name, reason in left_out.items()]
    return "\n".join(lines)


def require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("The sweep's figures need matplotlib: pip install -e '.[plots]'")


def positive_numbers(text: str) -> tuple[float, ...]:
    """`0.1,0.3` in rising order, each once."""
    try:
        numbers = sorted({float(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: numbers above 0 were expected, as in 0.1,0.5")
    return tuple(numbers)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sweep.sh", description=__doc__.split("\n")[0])
    parser.add_argument("config", nargs="?", help="stage 3's JSON (or YAML) config")
    parser.add_argument("overrides", nargs="*", help="key.path=value, over the config's own")
    parser.add_argument("--output", type=Path, help="default: sweep, beside its output_dir")
    parser.add_argument("--alphas", type=positive_numbers, default=ALPHAS)
    parser.add_argument("--betas", type=positive_numbers, default=BETAS)
    parser.add_argument("--without-pm", action="store_true", help="leave out Figure 1")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and stop")
    parser.add_argument("--report", type=Path, metavar="DIR", help="only tables and figures of DIR")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    options = parser.parse_intermixed_args(arguments)
    if (options.config is None) == (options.report is None):
        parser.error("give a stage-3 config, or --report and a sweep's directory")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    with errors_end_cleanly(options.debug):
        require_matplotlib()
        if options.report is not None:
            print(report(options.report))
            return
        settings = stage_settings(options.config, options.overrides)
        model = settings["model_name_or_path"]
        grid = Grid(model, options.alphas, options.betas, options.without_pm)
        directory = options.output or Path(settings["output_dir"]).parent / "sweep"
        request = Request(options.config, options.overrides, grid, directory)
        if options.dry_run:
            print(describe(request))
        else:
            sweep(request)


if __name__ == "__main__":
    main()
