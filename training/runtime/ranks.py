"""The processes of a run: the rank of this one, and how they communicate."""

import atexit
import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from training.runtime.extensions import load_extension

SHARED_MEMORY = Path("/dev/shm")
MIB = 2**20
SHARED_BUFFER = 67 * MIB
"""Bytes that each process on a CPU shares with the others: 66 MiB of data, and a header."""


def connect() -> None:
    """Join the process group that the launcher prepared."""
    if device().type == "cpu" and not shared_memory_suffices():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo does it all
    load_extension("ShareMemCommBuilder")  # ahead of DeepSpeed, whose own loading may hang
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", 0)))
    with contextlib.redirect_stdout(io.StringIO()):  # "built successfully", on every start
        deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name())
    if device().type == "cpu":  # else gloo's threads abort at exit, and the code is lost
        atexit.register(disconnect)  # with NCCL, disconnecting would wait for the other ranks
    barrier()  # by now all have opened one another's shared memory
    shared_memory().unlink(missing_ok=True)


def shared_memory_suffices() -> bool:
    """Whether the buffers of this node's processes fit into the shared memory.

    Docker gives a container 64 MB. Whoever writes beyond the end is killed by SIGBUS.
    """
    needed = int(os.environ.get("LOCAL_SIZE", "1")) * SHARED_BUFFER
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    if free < needed and os.environ.get("LOCAL_RANK", "0") == "0":
        print(
            f"{SHARED_MEMORY} has {free / MIB:.0f} MiB left and DeepSpeed's communication between "
            f"processes takes {needed / MIB:.0f} MiB, so gloo is used, which is slower; "
            "`docker run --shm-size=1g` gives more",
            flush=True,
        )
    return free >= needed


def shared_memory() -> Path:
    """The file of this process's buffer for DeepSpeed's communication between CPU processes.

    DeepSpeed never deletes it, so 66 MiB would stay in memory forever. Once all processes have
    opened the file it can be unlinked, and it disappears with the processes, however they end.
    """
    place = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "RANK")]
    return Path(SHARED_MEMORY, "_".join(["deepspeed_allreduce_buffer", str(os.getuid()), *place]))


def disconnect() -> None:
    """Leave the process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rank() -> int:
    """The number of this process; 0 without a process group."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    """The number of processes; 1 without a process group."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def device() -> torch.device:
    """This process's GPU, or the CPU."""
    return torch.device(get_accelerator().device_name(int(os.environ.get("LOCAL_RANK", 0))))


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a small tensor elementwise over all processes, in float64."""
    total = values.detach().clone().double().to(device(), non_blocking=True)
    if world_size() > 1:
        torch.distributed.all_reduce(total)
    return total


def max_over_ranks(value: int) -> int:
    """The largest value among all processes."""
    if world_size() == 1:
        return value
    largest = torch.tensor(value, device=device())
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return int(largest)


def gather_objects(local: list[Any]) -> list[Any]:
    """Join the lists of all processes in the order of ranks, on every process."""
    if world_size() == 1:
        return local
    parts: list[list[Any]] = [[] for _ in range(world_size())]
    torch.distributed.all_gather_object(parts, local)
    return [item for part in parts for item in part]


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """Let rank 0 work (and fill a cache) before the other ranks do."""
    if rank() != 0:
        barrier()
    try:
        yield
    finally:
        if rank() == 0:
            barrier()
