"""Everything that is written from the finished cells: tables, figures and the page."""

from collections.abc import Sequence
from pathlib import Path

from step3_rlhf.paper.grid import figures, page, tables
from step3_rlhf.paper.grid.results import read_results


def report(
    directories: Sequence[Path],
    names: Sequence[str] | None = None,
    paper_models: Sequence[str] | None = None,
    joint: Path | None = None,
) -> str:
    """Write tables, figures and page from what is finished; returns what the terminal shows.

    Args:
        directories: sweeps; each gets its own files, and several also get a joint Figure 1.
        names: the models' names in captions, in place of the sweeps' own.
        paper_models: whose numbers tables and figures have, in place of the sweeps' own.
        joint: directory of the joint Figure 1, in place of the first sweep's.
    """
    none: list[str | None] = [None] * len(directories)
    sweeps = [
        read_results(*given)
        for given in zip(directories, names or none, paper_models or none, strict=True)
    ]
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
