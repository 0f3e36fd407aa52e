"""What ends a run in the middle: figures that are not finite, memory or disk that is too small.

A figure that is not finite stops the run before it reaches the weights, and what caused it is kept.
"""

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.errors import NotFiniteError, RunError
from training.runtime.ranks import gather_objects, rank, sum_over_ranks

REMEDIES = (
    "lower the learning rate, or raise warmup_ratio",
    "lower max_grad_norm",
    "fp16: use bf16 or float32 where the GPU has it",
    "look for the batch's odd texts or rewards in the dump",
)


OUT_OF_MEMORY = """The memory does not suffice. What takes less, the cheapest first:
  - gradient_checkpointing=true
  - a smaller per_device_train_batch_size, with more gradient_accumulation_steps
  - a smaller rollout_batch_size where responses are drawn, per_device_eval_batch_size where models
    only score
  - bf16=true; lora
  - deepspeed.zero_optimization.stage=2 or 3, and 3 in frozen_deepspeed
  - deepspeed.zero_optimization.offload_optimizer.device=cpu
--dry-run estimates the memory of a config without running it."""


ALLOCATION = re.compile(r"can't allocate memory|not enough memory|CUDA error: out of memory")


DISK_FULL = """The disk is full. Make room and go on with resume_from_checkpoint=latest;
save_total_limit keeps only the newest checkpoints."""


@contextmanager
def dumped(output_dir: str, step: int, batch: Callable[[], Any]) -> Iterator[None]:
    """Keep `batch` in `output_dir/debug/step-N.pt` where a figure of step N is not finite.

    The error must be raised on every rank at the same place. The file holds `message`, `step` and
    `ranks`, each rank's batch in their order; `torch.load(..., weights_only=True)` reads it.

    Args:
        batch: tensors, texts, numbers, and lists and dicts of them.

    Raises:
        RunError: in place of the NotFiniteError, with the file's name and what to try.
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
            f"Step {step} was not taken: {error}.\nIts batch is in {file}. What may help:\n"
            + "\n".join(f"  - {remedy}" for remedy in REMEDIES)
        ) from error


def require_finite(name: str, values: Tensor) -> None:
    """Raise a NotFiniteError on every rank if `values` [any shape] of any rank are not finite."""
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
    """What to do about memory (a GPU's or the CPU's) or disk that did not suffice; None for others.

    torch and safetensors say both in words of their own.
    """
    words = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return OUT_OF_MEMORY
    if isinstance(error, RuntimeError) and ALLOCATION.search(words):
        return OUT_OF_MEMORY
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return DISK_FULL if full or "No space left on device" in words else None
