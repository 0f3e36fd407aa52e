"""Runs stage 3, and TRL's PPO, and reads how long their iterations took."""

import json
import os
import shlex
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from step3_rlhf.benchmark.shapes import Shape
from training.errors import UserError

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "step3_rlhf.sh"
TRL = "1.10.0"
"""The last version whose PPO these figures were compared with."""
GRACE = 60
"""Seconds that a command has to end after it was told to."""
TIMED_OUT, KILLED = 124, 137
"""Exit codes of `timeout`."""


@dataclass(frozen=True)
class Timing:
    """One run: seconds per iteration (the median over its iterations), and peak memory in GiB.

    phases  seconds of each phase, for our runs
    """

    seconds: float
    peak_gib: float
    phases: dict[str, float]
    metrics: dict[str, float]


Runs = dict[str, list[Timing]]
"""The runs of each kind: of ours, of TRL."""


def time_ours(config: Path, overrides: list[str], log: Path) -> Timing:
    """Run stage 3 with its script; the first iteration, which allocates, does not count.

    Raises:
        UserError: the run failed.
    """
    output = json.loads(config.read_text())["output_dir"]
    run_logged(["bash", str(SCRIPT), str(config), *overrides], log)
    lines = (Path(output) / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines][1:]
    middle = {
        name: statistics.median(line[name] for line in metrics)
        for name, value in metrics[0].items()
        if isinstance(value, (int, float))
    }
    phases = {k.removeprefix("time/"): v for k, v in middle.items() if k.startswith("time/")}
    return Timing(phases["iteration"], metrics[-1]["memory/peak_gib"], phases, middle)


def time_trl(python: Path, directory: Path, shape: Shape, iterations: int, log: Path) -> Timing:
    """Run TRL's PPO on the same inputs, in its own environment.

    Raises:
        UserError: the run failed.
    """
    program = Path(__file__).with_name("trl_ppo.py")
    arguments = [str(directory), json.dumps(asdict(shape)), str(iterations)]
    printed = run_logged([str(python), str(program), *arguments], log)
    found: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
    return Timing(statistics.median(found["seconds"][1:]), found["peak_gib"], {}, {})


def trl_environment(directory: Path, log: Path) -> Path:
    """Install TRL beside the torch and transformers of this environment, once.

    Returns:
        The environment's Python.
    """
    python = directory / "bin" / "python"
    stamp = directory / "installed"
    if not stamp.is_file():
        print(f"Installing TRL {TRL} into {directory} (a few minutes, once)", flush=True)
        run_logged([sys.executable, "-m", "venv", str(directory)], log)
        pins = [f"{name}=={version(name)}" for name in ("torch", "transformers", "datasets")]
        pins[0] = pins[0].split("+")[0]
        run_logged([str(python), "-m", "pip", "install", "--quiet", pins[0]], log)
        run_logged([str(python), "-m", "pip", "install", "--quiet", *pins, f"trl=={TRL}"], log)
        stamp.touch()
    return python


def run_logged(command: list[str], log: Path, limit: float | None = None) -> str:
    """Run a command with its errors in `log`; return what it printed.

    Args:
        limit: seconds after which it is stopped.

    Raises:
        UserError: it failed, or was stopped.
    """
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    # `timeout` stops a script as a user would, so that its processes end too.
    limited = ["timeout", "--foreground", f"--kill-after={GRACE}", str(limit)] if limit else []
    with log.open("a") as errors:
        errors.write(f"$ {shlex.join(command)}\n")
        errors.flush()
        done = subprocess.run(
            [*limited, *command], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        errors.write(done.stdout)
    if limit and done.returncode in (TIMED_OUT, KILLED):
        raise UserError(
            f"{' '.join(command[:3])} took longer than {limit:.0f} s; {log} has its output"
        )
    if done.returncode:
        raise UserError(f"{' '.join(command[:3])} failed; {log} has its output")
    return done.stdout
