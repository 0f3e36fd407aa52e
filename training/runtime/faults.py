"""Faults that end a run: values that are not finite, and too little memory or disk.

A value that is not finite stops the run before it reaches the weights, and the batch that caused it
is saved.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.errors import NotFiniteError, RunError
from training.runtime.disk import is_disk_full
from training.runtime.ranks import gather_objects, rank, sum_over_ranks

REMEDIES = (
    "lower the learning rate, or raise warmup_ratio",
    "lower max_grad_norm",
    "fp16: use bf16, if the GPU supports it, or float32",
    "look for unusual texts or rewards in the saved batch",
)

OUT_OF_MEMORY = """Out of memory. These settings need less, the cheapest first:
  - gradient_checkpointing=true; packing=true
  - a smaller per_device_train_batch_size, with gradient_accumulation_steps larger in proportion
  - a smaller rollout_batch_size if it ran out while drawing responses, or a smaller
    per_device_eval_batch_size if it ran out while scoring
  - zero_optimization.stage=3 in frozen_deepspeed
A run that has a checkpoint resumes with any of these: add resume_from_checkpoint=latest.
These need less too, but a new run:
  - bf16=true; lora
  - deepspeed.zero_optimization.stage=2 or 3
  - deepspeed.zero_optimization.offload_optimizer.device=cpu
--dry-run estimates the memory that a config needs without running it."""

ALLOCATION = re.compile(r"can't allocate memory|not enough memory|CUDA error: out of memory")

TIMED_OUT = """A process waited for another for longer than DEEPSPEED_TIMEOUT ({minutes} minutes).
If one has died, its message is above. If one is only slow (it encodes much data, saves a large
model, or has a slow reward function), allow more, in minutes: DEEPSPEED_TIMEOUT=240"""

WAITED = re.compile(r"[Tt]imed out|[Tt]imeout")

DISK_FULL = """The disk is full. Free some space and, if the run has a checkpoint, resume with
resume_from_checkpoint=latest; save_total_limit keeps only the newest checkpoints."""


@contextmanager
def dumped(output_dir: str, step: int, batch: Callable[[], Any]) -> Iterator[None]:
    """Save `batch` to `output_dir/debug/step-N.pt` if a value of step N is not finite.

    The error must be raised on every rank at the same place. The file holds `message`, `step` and
    `ranks`, the batches in the order of ranks; `torch.load(..., weights_only=True)` reads it.

    Args:
        batch: returns tensors, texts, numbers, or lists and dicts of them.

    Raises:
        RunError: in place of the NotFiniteError, with the name of the file and what to try.
    """
    try:
        yield
    except NotFiniteError as error:
        ranks = gather_objects([_on_cpu(batch())])
        file = Path(output_dir) / "debug" / f"step-{step}.pt"
        if rank() == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"step": step, "message": str(error), "ranks": ranks}, file)
        raise RunError(
            f"Step {step} was not taken: {error}.\nIts batch is in {file}. This may help:\n"
            + "\n".join(f"  - {remedy}" for remedy in REMEDIES)
        ) from error


def require_finite(name: str, values: Tensor) -> None:
    """Raise a NotFiniteError on every rank if any rank's `values` [any shape] are not finite."""
    bad = int(sum_over_ranks((~torch.isfinite(values)).sum()))
    if bad:
        raise NotFiniteError(f"{name}: {bad} not finite")


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {name: _on_cpu(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_on_cpu(entry) for entry in value]
    return value


def remedy(error: Exception) -> str | None:
    """What to do about too little memory (GPU or CPU), disk or patience; None for other errors.

    torch and safetensors raise errors of other classes for both, so their messages are searched.
    """
    words = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return OUT_OF_MEMORY
    if isinstance(error, RuntimeError) and ALLOCATION.search(words):
        return OUT_OF_MEMORY
    if isinstance(error, RuntimeError) and WAITED.search(words):  # torch's DistError is one
        return TIMED_OUT.format(minutes=os.environ.get("DEEPSPEED_TIMEOUT", "10"))
    return DISK_FULL if is_disk_full(error) else None
