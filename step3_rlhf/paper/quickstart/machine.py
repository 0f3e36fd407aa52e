"""The machine that the report is made on."""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version


@dataclass(frozen=True)
class Machine:
    """Versions of Python and of the packages that compute, and the CPU cores available."""

    versions: dict[str, str]
    cores: int


def this_machine() -> Machine:
    packages = ("torch", "deepspeed", "transformers")
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return Machine(versions, len(affinity(0)) if affinity else os.cpu_count() or 1)
