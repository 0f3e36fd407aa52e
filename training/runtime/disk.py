"""Atomic directories and files: complete or absent, even after a kill or a power failure."""

import errno
import os
import shutil
from pathlib import Path

UNFINISHED, REMOVED = ".unfinished", ".removed"


def draft_of(directory: Path) -> Path:
    """Create the empty directory in which `directory` is written before it gets its name."""
    draft = directory.with_name(directory.name + UNFINISHED)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    return draft


def remove_draft(directory: Path) -> None:
    """Delete what was written of `directory` before it got its name."""
    shutil.rmtree(directory.with_name(directory.name + UNFINISHED), ignore_errors=True)


def is_disk_full(error: Exception) -> bool:
    """Whether a disk or a quota is full; torch and safetensors have their own classes of errors."""
    by_number = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return by_number or "No space left on device" in str(error)


def publish(draft: Path, directory: Path) -> None:
    """Give a finished draft its name, replacing an older directory of that name."""
    for path in [*draft.rglob("*"), draft]:
        to_disk(path)  # the name must not reach the disk before the contents
    older = directory.with_name(directory.name + REMOVED)
    shutil.rmtree(older, ignore_errors=True)
    if directory.exists():
        directory.rename(older)
    draft.rename(directory)
    to_disk(directory.parent)
    shutil.rmtree(older, ignore_errors=True)


def recover(directory: Path) -> None:
    """Undo a `publish` that was killed between its two renames."""
    older = directory.with_name(directory.name + REMOVED)
    if older.is_dir() and not directory.exists():
        older.rename(directory)


def remove(directory: Path) -> None:
    """Delete a directory, renaming it first so that nobody finds half of it."""
    if directory.is_dir():
        nameless = directory.with_name(directory.name + REMOVED)
        shutil.rmtree(nameless, ignore_errors=True)
        directory.rename(nameless)
        shutil.rmtree(nameless)


def write_whole(path: Path, text: str) -> None:
    """Replace the text of a file atomically: after a kill it holds the new or the old one."""
    draft = path.with_name(path.name + UNFINISHED)
    draft.write_text(text, encoding="utf-8")
    to_disk(draft)
    draft.replace(path)
    to_disk(path.parent)


def to_disk(path: Path) -> None:
    """Wait until the operating system has written the path to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
