"""The finished parts of a long evaluation, on disk: one that was stopped goes on from them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from step3_rlhf.config import EvaluationConfig
from step3_rlhf.evaluation.held_out import HeldOut
from training.plugins import module_file
from training.runtime import ranks
from training.runtime.ranks import barrier, gather_objects, rank
from training.runtime.tracking import say

DIRECTORY = "evaluation.unfinished"


SETTINGS, BLOCKS = "settings.json", "blocks.jsonl"


MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".model")
"""Weights, config, tokenizer and chat template."""


class Blocks:
    """Results of blocks of prompts by name, in the order in which they were measured.

    Every rank knows them all; rank 0 writes each one, whole, before the next is begun. JSON keeps
    every digit, so an evaluation that was resumed gives the figures of one that was not.
    """

    def __init__(self, run_directory: Path, identity: dict[str, Any]) -> None:
        """Go on with what is there, if it was made with the same `identity` (JSON).

        Args:
            identity: everything that the results depend on, the division over ranks included.
        """
        self.directory = run_directory / DIRECTORY
        self._known: dict[str, list[Any]] = {}
        identity = json.loads(json.dumps(identity))
        found = self._read(identity) if rank() == 0 else {}
        for name, rows in gather_objects([found])[0].items():
            self._known[name] = rows
        if rank() == 0 and not self._known:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory.mkdir(parents=True)
            (self.directory / SETTINGS).write_text(json.dumps(identity, indent=2) + "\n")
        barrier()

    def _read(self, identity: dict[str, Any]) -> dict[str, list[Any]]:
        settings, blocks = self.directory / SETTINGS, self.directory / BLOCKS
        if not settings.is_file() or not blocks.is_file():
            return {}
        if json.loads(settings.read_text()) != identity:
            say(f"{self.directory}: of another evaluation; it is started anew")
            return {}
        lines = blocks.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]  # a kill may leave half a line
        blocks.write_bytes(b"".join(whole))
        found = dict(json.loads(line) for line in whole)
        say(f"The evaluation goes on after {len(found)} finished blocks in {self.directory}")
        return found

    def get(self, name: str) -> list[Any] | None:
        return self._known.get(name)

    def put(self, name: str, rows: list[Any]) -> None:
        """Keep a block's rows (JSON); all ranks call with the same."""
        if rank() == 0:
            with (self.directory / BLOCKS).open("a", encoding="utf-8") as file:
                file.write(json.dumps([name, rows]) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def remove(self) -> None:
        """The evaluation is finished and written."""
        if rank() == 0:
            shutil.rmtree(self.directory, ignore_errors=True)
        barrier()


def identity_of(path: str) -> list[Any]:
    """Names, sizes and times of a local model's files; a Hub name stands for itself."""
    place = Path(path)
    files = [place] if place.is_file() else []
    if place.is_dir():
        files = sorted(file for suffix in MODEL_SUFFIXES for file in place.glob(f"*{suffix}"))
    return [path, *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]


def identity(config: EvaluationConfig, held_out: HeldOut) -> dict[str, Any]:
    """All that the figures depend on, however its paths are spelt."""
    paths = [config.model_name_or_path, config.reference_model_name_or_path]
    paths += [member.model_name_or_path for member in config.reward.weighted_models]
    if config.reward.function:
        paths.append(module_file(config.reward.function))
    settings = config.model_dump(mode="json", exclude={"output_dir": True, "data": {"cache_dir"}})
    return {
        "config": resolved(settings),
        "models": [identity_of(resolved(path)) for path in paths if path],
        "held_out": held_out.digest,
        "processes": ranks.world_size(),
    }


def resolved(value: Any) -> Any:
    """JSON with every text that is a path of this machine spelt in one way."""
    if isinstance(value, dict):
        return {name: resolved(part) for name, part in value.items()}
    if isinstance(value, list):
        return [resolved(part) for part in value]
    if isinstance(value, str) and "/" in value and Path(value).exists():
        return str(Path(value).resolve())
    return value
