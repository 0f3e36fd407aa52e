"""What a run shows and records: the progress bar, metrics.jsonl, DeepSpeed's monitors, times."""

import contextlib
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from tqdm import tqdm

from training.runtime.disk import write_whole
from training.runtime.json_text import json_line
from training.runtime.ranks import rank

GIB = 2**30


class Tracker:
    """Shows and records a run's metrics. All ranks may call it; only rank 0 shows and writes."""

    def __init__(
        self,
        output_dir: str,
        total_steps: int,
        description: str,
        deepspeed_section: dict[str, Any],
        done: int = 0,
    ) -> None:
        """Continue after `done` steps, removing lines that a killed run wrote for later ones."""
        self._leads = rank() == 0
        self._start = time.perf_counter()
        if not self._leads:
            return
        file = Path(output_dir) / "metrics.jsonl"
        write_whole(file, "".join(_lines_until(file, done)))
        self._file = file.open("a", encoding="utf-8")
        self._monitor = MonitorMaster(get_monitor_config(deepspeed_section))
        self._bar = tqdm(
            total=total_steps,
            initial=done,
            desc=description,
            mininterval=1.0,
            dynamic_ncols=True,
        )

    def log(self, step: int, metrics: dict[str, float], shown: tuple[str, ...] = ()) -> None:
        """Write one line of metrics.jsonl; `shown` names the metrics to show beside the bar."""
        if not self._leads:
            return
        seconds = round(time.perf_counter() - self._start, 3)
        self._file.write(json_line({"step": step, "seconds": seconds, **metrics}))
        self._file.flush()
        if self._monitor.enabled:
            self._monitor.write_events([(name, value, step) for name, value in metrics.items()])
        self._bar.set_postfix(
            {name.rsplit("/", 1)[-1]: f"{metrics[name]:.4g}" for name in shown if name in metrics},
            refresh=False,
        )

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self._leads:
            self._bar.update()

    def close(self) -> None:
        """Close the progress bar and the file."""
        if self._leads:
            self._bar.close()
            self._file.close()


def _lines_until(file: Path, step: int) -> list[str]:
    """The complete lines of steps up to `step`; a kill may have left half a line."""
    if step == 0 or not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]


def say(message: str) -> None:
    """Print on rank 0, above the progress bar."""
    if rank() == 0:
        tqdm.write(message)


class Clock:
    """Adds up the seconds of named phases, which may contain one another.

    A GPU works on after its commands have been given, so there CUDA's events take the times. They
    are read when the figures are wanted, so that no phase waits for another.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time that passes within the context to the phase."""
        if torch.cuda.is_initialized():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            return
        before = time.perf_counter()
        yield
        self._add(name, time.perf_counter() - before)

    def read(self, steps: int = 1) -> dict[str, float]:
        """Return `time/<phase>` in seconds per step and start again from 0; waits for the GPU.

        Args:
            steps: how many steps the phases were parts of.
        """
        if self._events:
            torch.cuda.synchronize()
        for name, start, end in self._events:
            self._add(name, start.elapsed_time(end) / 1000)
        figures = {f"time/{name}": seconds / steps for name, seconds in self._seconds.items()}
        self._seconds, self._events = {}, []
        return figures

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds


def peak_memory() -> dict[str, float]:
    """`memory/peak_gib`: the most memory that this process has used so far.

    On a GPU it is the memory of PyTorch's allocator, otherwise the process's resident memory.
    """
    if torch.cuda.is_initialized():
        return {"memory/peak_gib": torch.cuda.max_memory_allocated() / GIB}
    return {"memory/peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}
