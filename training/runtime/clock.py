"""How long the phases of a step take, and how much memory the run has used."""

import contextlib
import resource
import time
from collections.abc import Iterator

import torch

GIB = 2**30


class Clock:
    """Adds up the seconds of named phases, which may contain one another.

    A GPU works on after its commands have been given, so there CUDA's events take the times. They
    are read when the figures are wanted, so that no phase waits for another.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time that passes within the context to the phase."""
        if torch.cuda.is_initialized():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            return
        before = time.perf_counter()
        yield
        self._add(name, time.perf_counter() - before)

    def read(self, steps: int = 1) -> dict[str, float]:
        """Return `time/<phase>` in seconds per step and start again from 0; waits for the GPU.

        Args:
            steps: how many steps the phases were parts of.
        """
        if self._events:
            torch.cuda.synchronize()
        for name, start, end in self._events:
            self._add(name, start.elapsed_time(end) / 1000)
        figures = {f"time/{name}": seconds / steps for name, seconds in self._seconds.items()}
        self._seconds, self._events = {}, []
        return figures

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds


def peak_memory() -> dict[str, float]:
    """`memory/peak_gib`: the most memory that this process has used so far.

    On a GPU it is the memory of PyTorch's allocator, otherwise the process's resident memory.
    """
    if torch.cuda.is_initialized():
        return {"memory/peak_gib": torch.cuda.max_memory_allocated() / GIB}
    return {"memory/peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}
