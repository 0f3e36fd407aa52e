"""One table of all methods over several seeds of the quickstart.

    python -m step3_rlhf.paper.quickstart.seeds OUT_DIR DIRECTORY DIRECTORY ...

reads the finished quickstarts in those folders, each of another seed, and writes methods.json and
methods.md into OUT_DIR: of each run the mean over the seeds and their standard deviation.
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

from step3_rlhf.paper.quickstart.findings import Findings, Run, read_findings
from step3_rlhf.paper.quickstart.metrics import DISTANCES, number
from step3_rlhf.paper.quickstart.page import policy_of
from training.cli import errors_end_cleanly
from training.errors import UserError
from training.runtime.json_text import json_text

COLUMNS = {metric.name: metric.title for metric in DISTANCES} | {
    "training_seconds": "Seconds of training",
    "peak_gib": "Peak memory, GiB",
}
"""The table's columns; all are the better the lower they are."""


def over_seeds(found: list[Findings]) -> dict[str, Any]:
    """The table for programs: of every run in all of the quickstarts its figures over the seeds.

    Raises:
        UserError: two quickstarts have the same seed.
    """
    seeds = [findings.seed for findings in found]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"the quickstarts have the seeds {seeds}; each must have another one")
    everywhere = [name for name in found[0].runs if all(name in f.runs for f in found)]
    runs = {
        name: {"label": policy_of(found[0].runs[name]).label}
        | {column: spread([value_of(f.runs[name], column) for f in found]) for column in COLUMNS}
        for name in everywhere
    }
    return {"seeds": seeds, "runs": runs}


def value_of(run: Run, column: str) -> float | None:
    own = {"training_seconds": run.seconds, "peak_gib": run.peak_gib}
    return own[column] if column in own else run.mean(column)


def spread(values: list[float | None]) -> dict[str, Any] | None:
    """Mean and standard deviation (n − 1), None for one seed; None where a seed has no value."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if len(known) < len(values):
        return None
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "sd": deviation, "values": known}


def markdown(table: dict[str, Any]) -> str:
    """The same for people."""
    head = ["run", *COLUMNS.values()]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for run in table["runs"].values():
        lines.append(" | ".join([run["label"], *(cell(run[column]) for column in COLUMNS)]))
    seeds = ", ".join(map(str, table["seeds"]))
    note = f"Means ± standard deviations over the seeds {seeds}."
    return "\n".join([f"| {line} |" for line in lines] + ["", note, ""])


def cell(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return number(None)
    deviation = "" if figure["sd"] is None else f" ± {number(figure['sd'])}"
    return number(figure["mean"]) + deviation


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m step3_rlhf.paper.quickstart.seeds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out_dir", help="where the table goes")
    parser.add_argument("directories", nargs="+", help="finished quickstarts, one of each seed")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    options = parser.parse_args(arguments)
    with errors_end_cleanly(options.debug):
        table = over_seeds([read_findings(Path(directory)) for directory in options.directories])
        output = Path(options.out_dir)
        output.mkdir(parents=True, exist_ok=True)
        (output / "methods.json").write_text(json_text(table))
        (output / "methods.md").write_text(markdown(table), encoding="utf-8")
        print(f"{markdown(table)}\ntable: {output / 'methods.md'}")


if __name__ == "__main__":
    main()
