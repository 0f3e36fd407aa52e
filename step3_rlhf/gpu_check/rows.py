"""Rows of the check: each does one thing that a GPU machine must be able to do."""

import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Outcome = Literal["ok", "failed", "not possible"]


@dataclass(frozen=True)
class Found:
    """What a row found: for people, and for programs."""

    text: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    run         does it, with its output in the given file; raises an error if it fails
    impossible  why it cannot be done on this machine; empty where it can
    """

    name: str
    run: Callable[[Path], Found]
    impossible: str = ""


@dataclass(frozen=True)
class Result:
    """How a row ended. `text` is what it found, what failed, or why it was not possible."""

    name: str
    outcome: Outcome
    text: str
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    log: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def result_of(row: Row, logs: Path) -> Result:
    """Run a row; whatever goes wrong in it ends in its result, and the other rows run on."""
    if row.impossible:
        return Result(row.name, "not possible", row.impossible)
    log = logs / f"{row.name}.txt"
    log.unlink(missing_ok=True)
    start = time.perf_counter()
    try:
        found = row.run(log)
    except Exception as error:
        with log.open("a") as file:
            file.write(traceback.format_exc())
        text = (str(error) or type(error).__name__).splitlines()[0]
        named = text if str(log) in text else f"{text}; {log} says more"
        return Result(row.name, "failed", named, time.perf_counter() - start, log=str(log))
    seconds = time.perf_counter() - start
    kept = str(log) if log.exists() else None
    return Result(row.name, "ok", found.text, seconds, found.figures, kept)


def as_text(machine: str, results: list[Result]) -> str:
    """The table, one line for each row, and a count of their outcomes."""
    width = max(len(result.name) for result in results)
    lines = [f"Check of {machine}", f"{'row':{width}}  {'outcome':12}  {'s':>4}  found"]
    lines += [
        f"{result.name:{width}}  {result.outcome:12}  {result.seconds:4.0f}  {result.text}"
        for result in results
    ]
    outcomes = [result.outcome for result in results]
    lines.append(
        f"{outcomes.count('ok')} ok, {outcomes.count('failed')} failed, "
        f"{outcomes.count('not possible')} not possible here"
    )
    return "\n".join(lines)
