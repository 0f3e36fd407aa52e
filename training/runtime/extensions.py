"""DeepSpeed's compiled extensions, loaded so that no run waits for one that was killed.

torch guards an extension with a file while it compiles or loads it. A process that is killed
meanwhile leaves the file behind, and every later one waits for it for ever. The operating system
takes a lock back from the dead: whoever holds ours knows that the file is left over, unless
something compiles beneath it.
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
    """Compile (once per machine) and load one of DeepSpeed's; nothing where it has none."""
    builder = get_accelerator().create_op_builder(builder_name)
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    directory = Path(cpp_extension._get_build_directory(builder.name, verbose=False))
    with locked(directory.with_name(f"{directory.name}.loading")):
        while (directory / GUARD).exists() and is_worked_in(directory):
            time.sleep(1)  # not torch's own wait, which a compiler that is killed makes endless
        (directory / GUARD).unlink(missing_ok=True)
        builder.load()


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Alone among the processes that lock this file."""
    with file.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def is_worked_in(directory: Path) -> bool:
    """Whether a process of this machine, such as a compiler, runs there."""
    wanted = str(directory.resolve())
    return any(process.info["cwd"] == wanted for process in psutil.process_iter(["cwd"]))
