"""Keeps the finished blocks of a long evaluation on disk, so that a stopped one can resume."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from step3_rlhf.config import EvaluationConfig
from step3_rlhf.evaluation.held_out import HeldOut
from training.config import absolute_paths
from training.plugins import module_file
from training.runtime import ranks
from training.runtime.ranks import barrier, gather_objects, rank
from training.runtime.tracking import say

DIRECTORY = "evaluation.unfinished"
SETTINGS, BLOCKS = "settings.json", "blocks.jsonl"

MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".model")
"""Weights, config, tokenizer and chat template."""


class FinishedBlocks:
    """The blocks of prompts that have been measured, by name, in the order of their measurement.

    Every rank knows all of them. Rank 0 writes each block to disk before the next one begins. JSON
    keeps every digit, so a resumed evaluation gives the same figures as an uninterrupted one.
    """

    def __init__(self, run_directory: Path, fingerprint: dict[str, Any]) -> None:
        """Read the blocks that an earlier evaluation with the same fingerprint left.

        Blocks of an evaluation with another fingerprint are deleted.

        Args:
            fingerprint: JSON that differs whenever the results would (see `fingerprint`).
        """
        self.directory = run_directory / DIRECTORY
        self._known: dict[str, list[Any]] = {}
        fingerprint = json.loads(json.dumps(fingerprint))
        found = self._read(fingerprint) if rank() == 0 else {}
        for name, rows in gather_objects([found])[0].items():
            self._known[name] = rows
        if rank() == 0 and not self._known:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory.mkdir(parents=True)
            (self.directory / SETTINGS).write_text(json.dumps(fingerprint, indent=2) + "\n")
        barrier()

    def _read(self, fingerprint: dict[str, Any]) -> dict[str, list[Any]]:
        settings, blocks = self.directory / SETTINGS, self.directory / BLOCKS
        if not settings.is_file() or not blocks.is_file():
            return {}
        if json.loads(settings.read_text()) != fingerprint:
            say(f"{self.directory} holds blocks of another evaluation; it is started anew")
            return {}
        lines = blocks.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]  # a kill may leave half a line
        blocks.write_bytes(b"".join(whole))
        found = dict(json.loads(line) for line in whole)
        say(f"The evaluation goes on after {len(found)} finished blocks in {self.directory}")
        return found

    def get(self, name: str) -> list[Any] | None:
        """The rows of a block; None if it is not finished."""
        return self._known.get(name)

    def put(self, name: str, rows: list[Any]) -> None:
        """Keep the rows (JSON) of a finished block; every rank calls with the same rows."""
        if rank() == 0:
            with (self.directory / BLOCKS).open("a", encoding="utf-8") as file:
                file.write(json.dumps([name, rows]) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete the blocks, once the whole evaluation is written."""
        if rank() == 0:
            shutil.rmtree(self.directory, ignore_errors=True)
        barrier()


def fingerprint(config: EvaluationConfig, held_out: HeldOut) -> dict[str, Any]:
    """Everything that the results depend on: settings, models, data and number of processes.

    Two spellings of one path have the same fingerprint.
    """
    paths = [config.model_name_or_path, config.reference_model_name_or_path]
    reward = config.reward
    paths += [member.model_name_or_path for member in reward.weighted_models] if reward else []
    if reward and reward.function:
        paths.append(module_file(reward.function))
    classes = config.regularizer.response_classes if config.regularizer else None
    if classes:
        own = classes.answer_key or (classes.function and module_file(classes.function))
        paths.append(own)
    settings = config.model_dump(mode="json", exclude={"output_dir": True, "data": {"cache_dir"}})
    return {
        "config": absolute_paths(settings),
        "models": [model_fingerprint(absolute_paths(path)) for path in paths if path],
        "held_out": held_out.digest,
        "processes": ranks.world_size(),
    }


def model_fingerprint(path: str) -> list[Any]:
    """Names, sizes and times of a local model's files; a Hub name is its own fingerprint."""
    place = Path(path)
    files = [place] if place.is_file() else []
    if place.is_dir():
        files = sorted(file for suffix in MODEL_SUFFIXES for file in place.glob(f"*{suffix}"))
    return [path, *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]
