"""Rows that measure something in a process of its own, so that an error there ends with it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from step3_rlhf.benchmark.measure import run_logged
from step3_rlhf.benchmark.shapes import SHAPES, stage_config, write_inputs
from step3_rlhf.gpu_check.rows import Found
from training.errors import RunError

LIMIT = 300.0
"""Seconds for a measurement."""


def graph_tokens(log: Path) -> Found:
    """Whether a graph draws the tokens of single launches, for each family.

    Raises:
        RunError: it does not.
    """
    same = measured("decoding", "graph", log)
    if wrong := [family for family, equal in same.items() if not equal]:
        raise RunError(f"a CUDA graph draws other tokens than single launches: {', '.join(wrong)}")
    return Found(f"the tokens of single launches: {', '.join(same)}", same)


def decode_steps(shape: str) -> Callable[[Path], Found]:
    """Milliseconds per decode step, and those of reading the weights once."""

    def run(log: Path) -> Found:
        found = measured("decoding", shape, log)
        kinds = [
            f"{kind} " + " / ".join(f"{ms:.2f}" for ms in by_rows.values())
            for kind, by_rows in found["ms_per_step"].items()
        ]
        rows = " / ".join(next(iter(found["ms_per_step"].values())))
        reading = f"to read the weights {found['ms_to_read_weights']:.2f}"
        return Found(f"ms per step of {rows} responses: {', '.join([*kinds, reading])}", found)

    return run


def waits(directory: Path) -> Callable[[Path], Found]:
    """How often an iteration waits for the GPU, on inputs that are written to `directory`."""

    def run(log: Path) -> Found:
        directory.mkdir(parents=True, exist_ok=True)
        write_inputs(SHAPES["tiny"], directory)
        config = directory / "config.json"
        settings = stage_config(SHAPES["tiny"], directory, iterations=2)
        config.write_text(json.dumps(settings, indent=2) + "\n")
        places = measured("waiting", str(config), log)
        return Found(f"{len(places)} waits in an iteration", {"places": places})

    return run


def measured(module: str, argument: str, log: Path) -> Any:
    """What a module of this package prints as its last line, from JSON."""
    command = [sys.executable, "-m", f"step3_rlhf.gpu_check.{module}", argument]
    return json.loads(run_logged(command, log, LIMIT).strip().splitlines()[-1])
