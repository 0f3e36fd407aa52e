"""Writes report.json, report.html and panel.png into the experiment's folder."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from step3_rlhf.paper.pages import svg_uri
from step3_rlhf.paper.people.measure import FIGURES, measure
from step3_rlhf.paper.people.report.findings import GROUPS, POLICIES, Findings, read_findings
from step3_rlhf.paper.people.report.page import Pictures, page
from step3_rlhf.paper.people.report.pictures import draw_minorities, draw_panel, panel
from step3_rlhf.paper.people.report.targets import targets
from step3_rlhf.paper.quickstart.machine import this_machine
from step3_rlhf.paper.quickstart.metrics import number
from training.plotting import reliability_diagram
from training.runtime.json_text import json_text
from training.statistics import Estimate

ESTIMAND = (
    "means over questions of figures that are exact over each board's answers, after averaging "
    "over seeds; 95 % intervals, for other questions drawn like these, with Student's t"
)


def write_report(directory: Path) -> str:
    """Write the files; returns what the terminal is to show."""
    findings = read_findings(directory)
    machine = this_machine()
    shown = panel(findings.runs["sft"].of("unseen")[0])
    drawn = draw_panel(findings.runs, shown)
    drawn.savefig(directory / "panel.png", dpi=150)
    minorities = draw_minorities(findings.runs)
    minorities.savefig(directory / "minorities.png", dpi=150)
    unseen = findings.reward_models["unseen"]
    pictures = Pictures(
        svg_uri(drawn),
        svg_uri(minorities),
        svg_uri(reliability_diagram(unseen.reliability, unseen.ece)),
    )
    report = report_json(findings) | {
        "panel": [board.id for board in shown],
        "versions": machine.versions,
        "cores": machine.cores,
    }
    (directory / "report.json").write_text(json_text(report))
    html = page(findings, pictures, machine)
    (directory / "report.html").write_text(html, encoding="utf-8")
    return f"{terminal_table(findings)}\n\nreport: {directory / 'report.html'}"


def report_json(findings: Findings) -> dict[str, Any]:
    """The report's numbers for programs."""
    return {
        "estimand": ESTIMAND,
        "groups": {
            group: {row.name: _plain(row.figures) for row in rows}
            for group, rows in findings.tables.items()
        },
        "seeds": {
            name: {
                seed: {
                    group: {
                        figure: _estimate(
                            measure([[b for b in boards if b.group == group]], function)
                        )
                        for figure, function in FIGURES.items()
                    }
                    for group in GROUPS
                }
                for seed, boards in run.boards.items()
            }
            for name, run in findings.runs.items()
        },
        "reward_model": {group: asdict(found) for group, found in findings.reward_models.items()},
        "targets": [asdict(target) for target in targets(findings)],
        "alpha": findings.alpha,
        "counts": findings.counts,
        "sizes": findings.sizes,
        "options": findings.options,
        "steps": findings.steps,
    }


def _plain(figures: dict[str, Estimate | None]) -> dict[str, Any]:
    return {name: _estimate(figure) for name, figure in figures.items()}


def _estimate(figure: Estimate | None) -> dict[str, Any] | None:
    return None if figure is None else asdict(figure)


def terminal_table(findings: Findings) -> str:
    """The main figures of the policies, at most 100 characters wide."""
    columns = {
        "tv_to_people": "TV people",
        "tv_to_reward": "TV reward",
        "tv_to_optimum": "TV optim.",
        "outside_mass": "outside",
        "top_share": "top",
        "minority_share": "minority",
    }
    lines = []
    for group, rows in findings.tables.items():
        lines += ["", GROUPS[group]]
        lines.append(f"{'':<16}" + "".join(f"{heading:>11}" for heading in columns.values()))
        for row in rows:
            if row.name in POLICIES or row.name in ("people", "reward"):
                found = (row.figures.get(name) for name in columns)
                cells = "".join(f"{number(None if f is None else f.mean):>11}" for f in found)
                lines.append(f"{row.name:<16}{cells}")
    return "\n".join(lines)
