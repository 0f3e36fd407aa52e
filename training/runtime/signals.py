"""Signals: a run that is told to stop saves a checkpoint first.

SIGTERM and SIGINT; and SIGUSR1, which DeepSpeed's launcher leaves alone, for queues that signal
every process of a job at once (scripts/slurm.sh).
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from training.runtime.ranks import max_over_ranks

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


ONE_REQUEST = 1.0
"""Seconds within which signals are one request: a launcher passes on what its ranks also got."""


class Stopped(Exception):
    """The run ended early because it was told to; `code` is what a shell expects of it."""

    def __init__(self, number: int, step: int | None = None) -> None:
        """`step`: after which there is a checkpoint; None after the last, models written."""
        name = signal.Signals(number).name
        super().__init__(
            f"Stopped by {name} after the training; its models are written"
            if step is None
            else f"Stopped by {name} after step {step}, with a checkpoint; "
            "resume_from_checkpoint=latest goes on from it"
        )
        self.code = 128 + number


class StopRequests:
    """What signals have asked of this process.

    Outside `deferred` a signal ends the process at once: there is nothing to save, or everything
    has been. Inside, the first one is remembered until the step is done, and a second one ends
    the process at once.
    """

    def __init__(self) -> None:
        self._deferring = False
        self._number = 0
        self._since = 0.0

    def install(self) -> None:
        """Take over the signals, in the main thread, and tell scripts/launch.sh so."""
        for number in STOPPING:
            signal.signal(number, self._receive)
        if "RANK_PIDS" in os.environ:
            node = Path(os.environ["RANK_PIDS"], os.environ.get("CROSS_RANK", "0"))
            node.mkdir(parents=True, exist_ok=True)
            (node / str(os.getpid())).touch()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._deferring:
            os._exit(128 + number)
        if not self._number:
            self._number, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > ONE_REQUEST:
            os._exit(128 + number)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While steps are taken and models written; every rank must leave it together.

        Raises:
            Stopped: at the end, where a signal came after the last step had asked for one.
        """
        self._deferring = True
        try:
            yield
            if number := self.agreed():
                raise Stopped(number)
        finally:
            self._deferring = False
        if self._number:  # it came just now
            os._exit(128 + self._number)

    def agreed(self) -> int:
        """The signal that any rank has received, or 0; every rank must ask after the same step."""
        return max_over_ranks(self._number)


stop_requests = StopRequests()
"""Signals belong to the process, so there is one of these."""
