"""The quickstart's report: what its runs measured, as a file, a page, a picture and a table.

    python -m step3_rlhf.paper.quickstart runs/quickstart

reads the finished runs below that folder (world, reward, sft, kl, pm, conditional_pm and any other
stage-3 run) and writes report.json, report.html (self-contained) and shares.png into it.
"""

import argparse
import importlib.util
import json
import time
from pathlib import Path

from step3_rlhf.paper.quickstart.findings import METRICS, Run, number, read_findings, report_of
from training.cli import errors_end_cleanly
from training.errors import UserError


def write_report(directory: Path) -> str:
    """Write the report's files; returns what the terminal is to show."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("The report's figures need matplotlib: pip install -e '.[plots]'")
    from step3_rlhf.paper.quickstart import pictures as drawn
    from step3_rlhf.paper.quickstart.page import page

    started = time.perf_counter()
    findings = read_findings(directory)
    sets = {name: run.sets for name, run in findings.runs.items()}
    shares = drawn.draw_shares(drawn.topic_shares(sets))
    shares.savefig(directory / "shares.png", dpi=150)
    pictures = {
        "shares": drawn.embedded(shares),
        "reliability": drawn.embedded(drawn.draw_reliability(findings.reward)),
        **drawn.paper_figures(),
    }
    report = report_of(findings, time.perf_counter() - started)
    (directory / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    (directory / "report.html").write_text(page(findings, report, pictures), encoding="utf-8")
    return f"{metrics_table(findings.runs)}\n\nreport: {directory / 'report.html'}"


def metrics_table(runs: dict[str, Run]) -> str:
    """The metrics of all runs in aligned columns, at most 100 characters wide."""
    widest = max(len("run"), *(len(name) for name in runs))
    width = min(widest, 18)
    arrows = [metric.heading + ("↓" if metric.lower_is_better else "") for metric in METRICS]
    lines = [f"{'run':<{width}}" + "".join(f"{heading:>9}" for heading in arrows)]
    for name, run in runs.items():
        cells = "".join(f"{number(run.mean(metric.name)):>9}" for metric in METRICS)
        lines.append(f"{name[:width]:<{width}}{cells}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m step3_rlhf.paper.quickstart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", help="the quickstart's folder, such as runs/quickstart")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    options = parser.parse_args(arguments)
    with errors_end_cleanly(options.debug):
        print(write_report(Path(options.directory)))


if __name__ == "__main__":
    main()
