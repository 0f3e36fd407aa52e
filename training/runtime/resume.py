"""Which checkpoint a run resumes from, and what may differ from the run that made it.

Nothing here needs torch: a run that cannot be resumed is refused before any process is launched.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from training.config import absolute_paths
from training.errors import UserError
from training.stage_config import StageConfig

STATE = "state.json"

NO_EFFECT = frozenset(
    "description resume_from_checkpoint overwrite_output_dir output_dir save_steps "
    "export_steps save_total_limit logging_steps".split()
)
"""Settings that do not affect what a run computes."""

FREE_TO_CHANGE = NO_EFFECT | frozenset(
    "per_device_eval_batch_size rollout_batch_size gradient_checkpointing packing evaluation "
    "frozen_deepspeed data.cache_dir ptx_data.cache_dir deepspeed.tensorboard deepspeed.wandb "
    "deepspeed.csv_monitor deepspeed.comet deepspeed.steps_per_print "
    "deepspeed.wall_clock_breakdown deepspeed.memory_breakdown deepspeed.comms_logger "
    "deepspeed.flops_profiler".split()
)
"""Settings that a resumed run may change: what it learns stays the same, up to rounding."""

SILENT = frozenset({"resume_from_checkpoint", "overwrite_output_dir", "output_dir"})
"""Settings whose change is not worth a message."""

LENGTHS = {"max_steps": "num_train_epochs", "total_episodes": "num_train_epochs"}
"""Settings that give a run's length, each with the one whose place it takes unless it is null."""

MICRO_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
"""Their product is what counts."""


def complete_checkpoints(directory: Path) -> list[Path]:
    """The completely written checkpoints in `directory`, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(
        path
        for path in directory.iterdir()
        if re.fullmatch(r"step-\d{8}", path.name) and (path / STATE).is_file()
    )


def resumed_checkpoint(config: StageConfig) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` names; None if there is none."""
    wanted = config.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted == "latest":
        found = complete_checkpoints(Path(config.output_dir) / "checkpoints")
        return found[-1] if found else None
    return Path(wanted)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's `step`, `processes`, `config` and the stage's `state`.

    Raises:
        UserError: this is not a checkpoint of this project.
    """
    try:
        record = json.loads((checkpoint / STATE).read_text())
        kinds = {"step": int, "processes": int, "config": dict, "state": dict}
        if all(isinstance(record[name], kind) for name, kind in kinds.items()):
            return dict(record)
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise UserError(f"{checkpoint / STATE} is not what a checkpoint holds; name another one")


def check_resumable(config: StageConfig, processes: int) -> list[str]:
    """Refuse a checkpoint of a different run, before anything is loaded or written.

    Args:
        processes: how many there are now, over all nodes.

    Returns:
        A line for each setting that differs from the checkpoint's and may differ.

    Raises:
        UserError: settings or the number of processes differ; the message lists every difference.
    """
    source = resumed_checkpoint(config)
    if source is None:
        return []
    record = read_state(source)
    settings_then, settings_now = record["config"], config.model_dump(mode="json")
    then, now = _flat(absolute_paths(settings_then)), _flat(absolute_paths(settings_now))
    allowed = longer(settings_then, settings_now) | regrouped(settings_then, settings_now)
    faults, changes = [], []
    for name in sorted(now.keys() | then.keys()):
        if now.get(name) == then.get(name):
            continue
        difference = f"{name}: {then.get(name)!r} in the checkpoint, {now.get(name)!r} now"
        if not (name in allowed or _is_free(name)):
            faults.append(difference)
        elif name not in SILENT:
            changes.append(difference)
    if record["processes"] != processes:
        faults.append(
            f"it was made by {record['processes']} processes, and there are {processes} now; "
            "start as many"
        )
    if faults:
        raise UserError(faults, f"{source} cannot be resumed:")
    if longer(settings_then, settings_now):
        changes.append("from here on, the learning rate follows the schedule of the longer run")
    return changes


def longer(then: dict[str, Any], now: dict[str, Any]) -> set[str]:
    """The setting that makes this run longer than that of the checkpoint, if one does."""
    for name, otherwise in LENGTHS.items():
        if name in now:
            before, after = then.get(name), now[name]
            if before is None and after is None:
                name, before, after = otherwise, then.get(otherwise), now[otherwise]
            if before is not None and after is not None and after > before:
                return {name}
    return set()


def regrouped(then: dict[str, Any], now: dict[str, Any]) -> set[str]:
    """The sizes of the micro-batches, if an optimizer step has as many examples as before."""
    before = math.prod(then.get(name) or 0 for name in MICRO_BATCH)
    return set(MICRO_BATCH) if before == math.prod(now[name] for name in MICRO_BATCH) else set()


def _is_free(name: str) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:length]) in FREE_TO_CHANGE for length in range(1, len(parts) + 1))


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict) or not data:
        return {prefix: data}
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= _flat(value, f"{prefix}.{name}" if prefix else name)
    return flat
