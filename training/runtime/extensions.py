"""DeepSpeed's compiled extensions, loaded so that no run waits for a process that was killed.

While torch compiles or loads an extension, it guards it with a file. A process that is killed in
the meantime leaves the file behind, and every later process waits for it forever. The operating
system releases the locks of dead processes, so the holder of our own lock knows that the file is a
leftover, unless a compiler still works in the directory.
"""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import psutil
from deepspeed.accelerator import get_accelerator
from torch.utils import cpp_extension

GUARD = "lock"


def load_extension(builder_name: str) -> None:
    """Compile (once per machine) and load an extension of DeepSpeed, if this machine has it."""
    builder = get_accelerator().create_op_builder(builder_name)
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    directory = Path(cpp_extension._get_build_directory(builder.name, verbose=False))
    with locked(directory.with_name(f"{directory.name}.loading")):
        while (directory / GUARD).exists() and is_worked_in(directory):
            time.sleep(1)  # torch's own wait never ends if the compiler is killed
        (directory / GUARD).unlink(missing_ok=True)
        builder.load()


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Exclude all other processes that lock this file."""
    with file.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def is_worked_in(directory: Path) -> bool:
    """Whether a process of this machine, such as a compiler, works in `directory`."""
    wanted = str(directory.resolve())
    return any(process.info["cwd"] == wanted for process in psutil.process_iter(["cwd"]))
