"""The processes of a run: which one this is, and what they tell one another."""

import atexit
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from training.runtime.extensions import load_extension


def connect() -> None:
    """Join the process group that the launcher prepared."""
    load_extension("ShareMemCommBuilder")  # before DeepSpeed does
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", 0)))
    deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name())
    if device().type == "cpu":  # an error's exit code is lost when gloo's threads abort the process
        atexit.register(disconnect)  # NCCL's would wait for the others
    barrier()  # all have opened one another's shared memory
    shared_memory().unlink(missing_ok=True)


def shared_memory() -> Path:
    """The file of this process's buffer for DeepSpeed's communication between CPU processes.

    DeepSpeed leaves it, 66 MiB, in memory for ever. Once all processes have it open it needs no
    name, and without one it goes with them, however they end.
    """
    place = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "RANK")]
    return Path("/dev/shm", "_".join(["deepspeed_allreduce_buffer", str(os.getuid()), *place]))


def disconnect() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def barrier() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def device() -> torch.device:
    return torch.device(get_accelerator().device_name(int(os.environ.get("LOCAL_RANK", 0))))


def sum_over_ranks(values: Tensor) -> Tensor:
    """The elementwise sum of a small tensor over all processes."""
    total = values.detach().clone().double().to(device())
    if world_size() > 1:
        torch.distributed.all_reduce(total)
    return total


def max_over_ranks(value: int) -> int:
    """The largest value of any process."""
    if world_size() == 1:
        return value
    largest = torch.tensor(value, device=device())
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return int(largest)


def gather_objects(local: list[Any]) -> list[Any]:
    """The lists of all processes, joined in the order of ranks, on every process."""
    if world_size() == 1:
        return local
    parts: list[list[Any]] = [[] for _ in range(world_size())]
    torch.distributed.all_gather_object(parts, local)
    return [item for part in parts for item in part]


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """Rank 0 does the work (and fills the cache), then the others find it done."""
    if rank() != 0:
        barrier()
    try:
        yield
    finally:
        if rank() == 0:
            barrier()
