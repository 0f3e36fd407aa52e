"""Writes the quickstart's report: what its runs measured, as a page, a picture and a JSON file.

    python -m step3_rlhf.paper.quickstart runs/quickstart

reads the finished runs in that folder (world, reward, sft, kl, pm, conditional_pm and any other
stage-3 run) and writes report.json, report.html (self-contained), shares.png and, if the runs with
two groups of people are there, groups.png into it.
"""

import argparse
import time
from pathlib import Path

from step3_rlhf.paper import analytic_figures
from step3_rlhf.paper.pages import svg_uri
from step3_rlhf.paper.quickstart.findings import Run, read_findings
from step3_rlhf.paper.quickstart.groups import draw_groups, group_shares
from step3_rlhf.paper.quickstart.machine import this_machine
from step3_rlhf.paper.quickstart.metrics import METRICS, number
from step3_rlhf.paper.quickstart.page import Pictures, page
from step3_rlhf.paper.quickstart.report_json import all_seconds, report_json
from step3_rlhf.paper.quickstart.shares import draw_shares, topic_shares
from training.cli import errors_end_cleanly
from training.plotting import reliability_diagram, require_matplotlib
from training.runtime.json_text import json_text


def write_report(directory: Path) -> str:
    """Write the report's files; returns what the terminal is to show."""
    require_matplotlib()
    started = time.perf_counter()
    findings = read_findings(directory)
    reward_model, calibrated = findings.reward_model, findings.calibration
    shares = draw_shares(topic_shares({name: run.sets for name, run in findings.runs.items()}))
    shares.savefig(directory / "shares.png", dpi=150)
    of_groups = group_shares(findings.runs)
    groups = draw_groups(of_groups) if of_groups else None
    if groups:
        groups.savefig(directory / "groups.png", dpi=150)
    pictures = Pictures(
        shares=svg_uri(shares),
        reliability=svg_uri(reliability_diagram(reward_model.reliability, reward_model.ece)),
        figure2=svg_uri(analytic_figures.figure2()),
        figure2_f_divergences=svg_uri(analytic_figures.figure2_f_divergences()),
        figure9=svg_uri(analytic_figures.figure9()),
        groups=svg_uri(groups) if groups else None,
        calibrated=(
            svg_uri(reliability_diagram(calibrated.reliability, calibrated.ece))
            if calibrated
            else ""
        ),
    )
    machine = this_machine()
    seconds = all_seconds(findings.seconds, time.perf_counter() - started)
    report = report_json(findings, seconds, machine)
    (directory / "report.json").write_text(json_text(report))
    html = page(findings, pictures, seconds, machine)
    (directory / "report.html").write_text(html, encoding="utf-8")
    return f"{metrics_table(findings.runs)}\n\nreport: {directory / 'report.html'}"


def metrics_table(runs: dict[str, Run]) -> str:
    """The main metrics of all runs in aligned columns, at most 100 characters wide."""
    widest = max(len("run"), *(len(name) for name in runs))
    width = min(widest, 18)
    metrics = [metric for metric in METRICS if metric.in_terminal]
    arrows = [metric.heading + ("↓" if metric.lower_is_better else "") for metric in metrics]
    lines = [f"{'run':<{width}}" + "".join(f"{heading:>9}" for heading in arrows)]
    for name, run in runs.items():
        cells = "".join(f"{number(run.mean(metric.name)):>9}" for metric in metrics)
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
