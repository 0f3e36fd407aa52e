"""Checkpoints, from which a stopped run resumes as if it had never been interrupted."""

import contextlib
import copyreg
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from training.errors import RunError
from training.runtime.averaging import AveragedWeights
from training.runtime.disk import REMOVED, UNFINISHED, draft_of, publish, remove
from training.runtime.engine import TrainedModule
from training.runtime.random_states import random_states, set_random_states
from training.runtime.ranks import barrier, rank, world_size
from training.runtime.resume import STATE, complete_checkpoints, read_state, resumed_checkpoint
from training.stage_config import StageConfig

FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""Environment variable of torch.load."""

DEEPSPEEDS_OWN = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
"""The classes found in DeepSpeed's checkpoints; they hold only numbers."""

# Python 3.11.0 to 3.11.3 pickle an enum's member as a call of getattr, which is not plain data.
copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))


class Checkpoints:
    """`output_dir/checkpoints/step-N`: the complete state of a run after N steps.

    A checkpoint holds the engines in DeepSpeed's format, moving averages of their weights, the
    stage's own state as JSON, and the random states of each rank. The order of the data and the
    seed of every draw are functions of the step, so there is no sampler state to save. A directory
    gets its final name once it is complete; until then no run finds it.
    """

    def __init__(
        self,
        config: StageConfig,
        engines: Mapping[str, TrainedModule],
        averages: Mapping[str, AveragedWeights] | None = None,
    ) -> None:
        self.config = config
        self.engines = engines
        self.averages = averages or {}
        self.directory = Path(config.output_dir) / "checkpoints"

    def is_due(self, step: int, steps: int) -> bool:
        """Every `save_steps` and after the last of `steps`; never if `save_steps` is 0."""
        every = self.config.save_steps
        return every > 0 and (step % every == 0 or step == steps)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the checkpoint of `step`, then delete the oldest beyond `save_total_limit`.

        Raises:
            RunError: the checkpoint could not be written; earlier ones are unchanged.
        """
        name = f"step-{step:08d}"
        try:
            self._write(name, step, state)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            shutil.rmtree(self.directory / (name + UNFINISHED), ignore_errors=True)
            earlier = complete_checkpoints(self.directory)
            last = (
                f"The last complete one is {earlier[-1]}" if earlier else "There is no earlier one"
            )
            raise RunError(
                f"The checkpoint of step {step} could not be written to {self.directory}: {error}\n"
                f"{last}",
                everywhere=False,
            ) from error

    def _write(self, name: str, step: int, state: dict[str, Any]) -> None:
        draft = self.directory / (name + UNFINISHED)
        if rank() == 0:
            for suffix in (UNFINISHED, REMOVED):
                for leftover in self.directory.glob(f"step-*{suffix}"):
                    shutil.rmtree(leftover)
            draft_of(self.directory / name)
        barrier()
        has_lora = self.config.lora is not None  # frozen weights are loaded with the model
        for label, trained in self.engines.items():
            trained.engine.save_checkpoint(
                str(draft / label), tag="engine", exclude_frozen_parameters=has_lora
            )
        torch.save(random_states(), draft / f"random-{rank()}.pt")
        for label, average in self.averages.items():
            if rank() == 0 or average.is_partitioned:
                torch.save(average.averages, draft / _averages_file(label, average))
        barrier()
        if rank() == 0:
            record = {
                "step": step,
                "processes": world_size(),
                "config": self.config.model_dump(mode="json"),
                "state": state,
            }
            (draft / STATE).write_text(json.dumps(record, indent=2) + "\n")
            publish(draft, self.directory / name)
            kept = self.config.save_total_limit or 0
            for old in complete_checkpoints(self.directory)[:-kept] if kept else []:
                remove(old)
        barrier()

    def restore(self) -> tuple[int, dict[str, Any]]:
        """Load the checkpoint that `resume_from_checkpoint` names into the engines.

        Checkpoints of later steps are deleted, because the run takes those steps again.

        Returns:
            The number of steps done and the stage's state; 0 and {} if the run starts from scratch.

        Raises:
            RunError: a file of the checkpoint is missing or damaged.
        """
        source = resumed_checkpoint(self.config)
        if source is None:
            return 0, {}
        record = read_state(source)
        try:
            self._load(source)
        except Exception as error:  # DeepSpeed, torch and pickle raise exceptions of many kinds
            raise RunError(
                f"{source} is damaged: {error!r}\nResume from an earlier checkpoint of this run",
                everywhere=False,
            ) from error
        barrier()
        if rank() == 0:
            for later in complete_checkpoints(self.directory):
                if later.name > source.name:
                    remove(later)
        barrier()
        return record["step"], record["state"]

    def _load(self, source: Path) -> None:
        with _no_code_in_files():
            for label, trained in self.engines.items():
                trained.engine.load_checkpoint(
                    str(source / label), tag="engine", load_module_strict=self.config.lora is None
                )
        for label, average in self.averages.items():
            path = source / _averages_file(label, average)
            average.load(torch.load(path, map_location="cpu", weights_only=True))
        set_random_states(torch.load(source / f"random-{rank()}.pt", weights_only=True))


def _averages_file(label: str, average: AveragedWeights) -> str:
    return f"{label}-{rank() if average.is_partitioned else 0}.pt"


@contextlib.contextmanager
def _no_code_in_files() -> Iterator[None]:
    """Let torch unpickle plain data only, since DeepSpeed's loading could run code otherwise."""
    before = os.environ.get(FORCE_WEIGHTS_ONLY)
    os.environ[FORCE_WEIGHTS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals(DEEPSPEEDS_OWN):
            yield
    finally:
        del os.environ[FORCE_WEIGHTS_ONLY]
        if before is not None:
            os.environ[FORCE_WEIGHTS_ONLY] = before
