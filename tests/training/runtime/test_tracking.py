"""metrics.jsonl: what a run wrote stays, whatever becomes of the next one."""

import json
import math
from pathlib import Path

import pytest

from training.runtime.tracking import Tracker

pytestmark = pytest.mark.usefixtures("process_group")


def steps(directory: Path) -> list[int]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def write_steps(directory: Path, count: int) -> None:
    tracker = Tracker(str(directory), count, "run", {})
    for step in range(1, count + 1):
        tracker.log(step, {"loss": 1.0 / step})
    tracker.close()


def test_a_resumed_run_has_the_earlier_lines_before_its_first_step(tmp_path: Path) -> None:
    """A kill may come before the resumed run has anything to write itself."""
    write_steps(tmp_path, 5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # the first run was killed here
    tracker = Tracker(str(tmp_path), 9, "run", {}, done=4)
    assert steps(tmp_path) == [1, 2, 3, 4]
    tracker.log(5, {"loss": 0.1})
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    tracker.close()


def test_a_new_run_starts_with_an_empty_file(tmp_path: Path) -> None:
    write_steps(tmp_path, 3)
    Tracker(str(tmp_path), 9, "run", {}).close()
    assert steps(tmp_path) == []


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    tracker = Tracker(str(tmp_path), 1, "run", {})
    tracker.log(1, {"norm": math.nan, "loss": 2.0})
    tracker.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (line["norm"], line["loss"]) == (None, 2.0)
