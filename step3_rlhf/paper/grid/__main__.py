"""The paper's grid of experiments: conditional PM at every α, and KL, at every β.

    bash scripts/sweep.sh STAGE3_CONFIG [--output DIR] [key.path=value ...]
    bash scripts/sweep.sh --report DIR [DIR ...]

Every cell is a run of scripts/step3_rlhf.sh. Finished cells are skipped and stopped ones resumed
(cells.py, jobs.py, run.py); then the tables, the figures and a page with samples side by side are
written (report.py).
"""

import argparse
import math
import os
import shlex
from pathlib import Path

from step3_rlhf.paper.grid.cells import Grid, State
from step3_rlhf.paper.grid.jobs import Sweep, jobs_of, stage_settings
from step3_rlhf.paper.grid.launcher import Launcher
from step3_rlhf.paper.grid.paper_models import DEFAULT, PAPER_MODELS, model_name
from step3_rlhf.paper.grid.run import run
from training.cli import errors_end_cleanly
from training.errors import RunError, UserError
from training.plotting import require_matplotlib

ALPHAS, BETAS = (0.1, 0.3, 0.5), (0.1, 0.5, 1.0)
"""The paper's."""


def run_sweep(sweep: Sweep) -> None:
    """Run what is not finished, then report on everything.

    Raises:
        RunError: with every cell that failed; the others are in the report.
    """
    jobs = jobs_of(sweep)
    sweep.grid.write(sweep.directory)
    with Launcher() as launch:
        failed = run(jobs, launch)
    if len(failed) < len(jobs):
        from step3_rlhf.paper.grid.report import report

        print(report([sweep.directory]))
    if failed:
        lines = [f"  - {name}: {outcome}" for name, outcome in failed.items()]
        heading = f"{len(failed)} of {len(jobs)} cells failed; the same command runs them again:"
        raise RunError("\n".join([heading, *lines]))


def describe(sweep: Sweep) -> str:
    """What `sweep` would do, for --dry-run."""
    lines = []
    for job in jobs_of(sweep):
        lines.append(f"{job.cell.name}: {job.state.value}")
        if job.state is not State.FINISHED:
            lines.append(f"    {shlex.join(job.command)}")
    return "\n".join(lines)


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


def write_report(options: argparse.Namespace) -> str:
    from step3_rlhf.paper.grid.report import report  # needs matplotlib

    return report(options.report, options.model_name, options.paper_model, options.output)


def thresholds(text: str) -> tuple[float, ...]:
    """As `positive_numbers`; or all below 0, which are logarithms in nats."""
    try:
        numbers = sorted({float(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if numbers and all(-math.inf < number < 0 for number in numbers):
        return tuple(numbers)
    return positive_numbers(text)


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
    parser.add_argument(
        "--alphas",
        type=thresholds,
        default=ALPHAS,
        help="thresholds of conditional PM: probabilities, or logarithms as in --alphas=-60,-30",
    )
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
        help="of the model in captions; once for each DIR",
    )
    parser.add_argument(
        "--paper-model",
        action="append",
        choices=list(PAPER_MODELS),
        help="whose numbers tables and figures have in the paper; once for each DIR",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    options = parser.parse_intermixed_args(arguments)
    if (options.config is None) == (options.report is None):
        parser.error("give a stage-3 config, or --report and a sweep's directory")
    sweeps = len(options.report or [options.config])
    for option, given in (
        ("--model-name", options.model_name),
        ("--paper-model", options.paper_model),
    ):
        if given and len(given) != sweeps:
            parser.error(f"{option}: {sweeps} expected, one for each sweep in their order")
    if options.report and sweeps == 1 and options.output:
        parser.error("--output: a single sweep's report is written into its own directory")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    with errors_end_cleanly(options.debug):
        require_matplotlib()
        if options.report is not None:
            print(write_report(options))
            return
        settings = stage_settings(options.config, options.overrides)
        model = settings["model_name_or_path"]
        name = options.model_name[0] if options.model_name else model_name(model)
        paper_model = options.paper_model[0] if options.paper_model else DEFAULT
        grid = Grid(model, options.alphas, options.betas, options.without_pm, name, paper_model)
        directory = options.output or Path(settings["output_dir"]).parent / "sweep"
        sweep = Sweep(options.config, options.overrides, grid, directory)
        if options.dry_run:
            print(describe(sweep))
        else:
            require_one_start()
            run_sweep(sweep)


if __name__ == "__main__":
    main()
