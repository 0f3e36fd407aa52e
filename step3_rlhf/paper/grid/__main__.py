"""The paper's grid of experiments: conditional PM at every α, and KL, at every β.

    bash scripts/sweep.sh STAGE3_CONFIG [--output DIR] [key.path=value ...]
    bash scripts/sweep.sh --report DIR [DIR ...]

Every cell is a run of scripts/step3_rlhf.sh. What is finished is skipped and what was stopped goes
on (cells.py, jobs.py); then come the tables (tables.py), the figures
(figures.py) and a page with samples side by side (page.py).
"""

import argparse
import importlib.util
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from step3_rlhf.config import EvaluationConfig
from step3_rlhf.paper.grid.cells import SETTINGS, Grid, State, is_finished
from step3_rlhf.paper.grid.jobs import Job, Request, plan, stage_settings
from step3_rlhf.paper.grid.paper_models import model_name
from training.cli import errors_end_cleanly
from training.errors import RunError, UserError
from training.runtime.signals import STOPPING

ROOT = Path(__file__).resolve().parents[3]


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
        # SLURM gives this signal to every process of a step; a second one would end the command
        # before its checkpoint is written.
        told = number == signal.SIGUSR1 and "SLURM_STEP_ID" in os.environ
        if self._process is not None and not told:
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
        print(report([request.directory]))
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


def report(
    directories: list[Path], names: Sequence[str] | None = None, joint: Path | None = None
) -> str:
    """Write tables, figures and page from what is finished; returns what the terminal shows.

    Args:
        directories: sweeps, each of which gets its own; several have a Figure 1 together too.
        names: the models', where they are not to be the sweeps' own.
        joint: where that Figure 1 goes; the first of the directories.
    """
    from step3_rlhf.paper.grid import figures, page, tables
    from step3_rlhf.paper.grid.results import read_results

    given: Sequence[str | None] = names or [None] * len(directories)
    sweeps = [read_results(*pair) for pair in zip(directories, given, strict=True)]
    lines = []
    for directory, results in zip(directories, sweeps, strict=True):
        files = tables.write_tables(results, directory)
        drawn, left_out = figures.draw_figures(results, directory)
        written = page.write_page(results, drawn, directory)
        lines += [tables.markdown(results), *map(str, [*files, *drawn, written])]
        lines += [f"not drawn: {name}: {reason}" for name, reason in left_out.items()]
        lines.append("")
    if len(sweeps) > 1:
        drawn, left_out = figures.draw_joint(sweeps, joint or directories[0])
        lines.append("Figure 1 with a panel for each model:")
        lines += map(str, drawn)
        lines += [f"not drawn: {name}: {reason}" for name, reason in left_out.items()]
    return "\n".join(lines).rstrip("\n")


def require_one_start() -> None:
    """A sweep on several nodes is started on one of them.

    Raises:
        UserError: this is one of several starts, which would plan and write the same at once.
    """
    hostfile = os.environ.get("HOSTFILE")
    if not hostfile or "NODE_RANK" not in os.environ:
        return
    try:
        lines = Path(hostfile).read_text().splitlines()
    except OSError:
        return  # scripts/launch.sh says so
    if sum("slots=" in line and not line.lstrip().startswith("#") for line in lines) > 1:
        raise UserError(
            "NODE_RANK is set and HOSTFILE names several nodes: a sweep is started once, not on "
            "each node; bash scripts/sweep.sh --help names two ways"
        )


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
    parser.add_argument(
        "--output",
        type=Path,
        help="default: sweep, beside its output_dir; with --report the joint Figure 1's directory, "
        "by default the first",
    )
    parser.add_argument("--alphas", type=positive_numbers, default=ALPHAS)
    parser.add_argument("--betas", type=positive_numbers, default=BETAS)
    parser.add_argument("--without-pm", action="store_true", help="leave out Figure 1")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and stop")
    parser.add_argument(
        "--report",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="only tables and figures of DIR; of several also a Figure 1 with a panel for each",
    )
    parser.add_argument(
        "--model-name",
        action="append",
        metavar="NAME",
        help="for captions, and the paper's numbers for OPT or Llama; once for each DIR",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    options = parser.parse_intermixed_args(arguments)
    if (options.config is None) == (options.report is None):
        parser.error("give a stage-3 config, or --report and a sweep's directory")
    sweeps = len(options.report or [options.config])
    if options.model_name and len(options.model_name) != sweeps:
        parser.error(f"--model-name: {sweeps} expected, one for each sweep in their order")
    if options.report and sweeps == 1 and options.output:
        parser.error("--output: a single sweep's report is written into its own directory")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    with errors_end_cleanly(options.debug):
        require_matplotlib()
        if options.report is not None:
            print(report(options.report, options.model_name, options.output))
            return
        settings = stage_settings(options.config, options.overrides)
        model = settings["model_name_or_path"]
        name = options.model_name[0] if options.model_name else model_name(model)
        grid = Grid(model, options.alphas, options.betas, options.without_pm, name)
        directory = options.output or Path(settings["output_dir"]).parent / "sweep"
        request = Request(options.config, options.overrides, grid, directory)
        if options.dry_run:
            print(describe(request))
        else:
            require_one_start()
            sweep(request)


if __name__ == "__main__":
    main()
