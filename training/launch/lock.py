"""One run at a time in an output directory.

The operating system releases the lock of a process that ends, however it ends, so that there is no
stale lock. The file stays: it is empty and belongs to no run.
"""

import fcntl
import os
from pathlib import Path

from training.errors import UserError

LOCK = ".lock"

_held: dict[Path, int] = {}
"""Descriptors of the locks that this process holds until it ends."""


def occupy(output: Path) -> None:
    """Create a directory if need be, and reserve it for this process until the process ends.

    Raises:
        UserError: another process has reserved it.
    """
    output.mkdir(parents=True, exist_ok=True)
    place = output.resolve()
    if place not in _held or not _is_current(_held[place], place):
        _held[place] = _locked(place)


def require_free(output: Path) -> None:
    """Refuse a directory that another run works in; reserves nothing.

    Raises:
        UserError: another process has reserved it.
    """
    if (output / LOCK).exists():
        os.close(_locked(output))


def contents(directory: Path) -> list[Path]:
    """What lies in a directory, the lock's file apart."""
    return [path for path in directory.iterdir() if path.name != LOCK]


def _locked(directory: Path) -> int:
    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"output_dir: another run is working in {directory}; wait until it has ended, stop it, "
            "or choose another output_dir"
        ) from None
    except OSError:
        pass  # a file system without locks: there is nothing to hold on to
    return descriptor


def _is_current(descriptor: int, directory: Path) -> bool:
    """Whether the directory still holds the locked file; it may have been deleted and made anew."""
    try:
        return os.path.samestat(os.fstat(descriptor), (directory / LOCK).stat())
    except OSError:
        return False
