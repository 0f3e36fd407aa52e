"""The progress bar, metrics.jsonl, and DeepSpeed's monitors (TensorBoard, W&B, CSV)."""

import json
import time
from pathlib import Path
from typing import Any

from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from tqdm import tqdm

from training.runtime.disk import write_whole
from training.runtime.json_text import json_line
from training.runtime.ranks import rank


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
