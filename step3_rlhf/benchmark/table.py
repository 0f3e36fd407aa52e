"""The table of a benchmark that people read."""

import statistics
from collections.abc import Callable
from typing import Any

PHASES = ("rollout", "reward", "reference", "old_scores", "forward", "backward", "step")


def as_text(found: dict[str, Any]) -> str:
    """One column for each kind of run, from the content of benchmark.json."""
    machine = found["machine"]
    lines = [f"\n{found['what']} on {machine['device']}, {machine.get('cores', 1)} cores"]
    lines.append(f"{'median of the runs':24}" + "".join(f"{kind:>14}" for kind in found["runs"]))

    def row(name: str, values: list[str]) -> None:
        lines.append(f"{name:24}" + "".join(f"{value:>14}" for value in values))

    def middle(kind: str, read: Callable[[dict[str, Any]], float | None]) -> str:
        known = [value for run in found["runs"][kind] if (value := read(run)) is not None]
        return f"{statistics.median(known):.3g}" if known else "-"

    kinds = list(found["runs"])
    row("seconds per iteration", [middle(kind, lambda run: run["seconds"]) for kind in kinds])
    for phase in PHASES:
        values = [middle(kind, lambda run: run["phases"].get(phase)) for kind in kinds]  # noqa: B023
        if set(values) != {"-"}:
            row(f"  {phase}", values)
    row("peak memory, GiB", [middle(kind, lambda run: run["peak_gib"]) for kind in kinds])
    units = {
        "ratio": "times the floor",
        "matmul_gflops": "matmul, GFLOP/s",
        "decoded_tokens_per_second": "decoded tokens/s",
        "decoding_seconds": "reading weights, s",
    }
    for name, title in units.items():
        floors = found["floor"]
        row(title, [f"{floors[kind][name]:.3g}" if kind in floors else "-" for kind in kinds])
    for kind, ratios in found["ratios"].items():
        for name, values in ratios.items():
            spread = f"{min(values):.2f} to {max(values):.2f}"
            pairs = f"{len(values)} pairs"
            lines.append(
                f"{kind}, {name} relative to trl: {statistics.median(values):.2f} "
                f"({spread}, {pairs})"
            )
    return "\n".join(lines)
