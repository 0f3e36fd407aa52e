"""Signals: a run that is asked to stop saves a checkpoint first.

SIGTERM, SIGINT and SIGUSR1 stop a run. DeepSpeed's launcher ignores SIGUSR1, so queues that signal
every process of a job at once can use it (scripts/slurm.sh).
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from training.errors import Stopped
from training.runtime.ranks import max_over_ranks

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

ONE_REQUEST = 1.0
"""Seconds within which signals count as one request: a launcher forwards what its ranks got too."""


class StopRequests:
    """Requests to stop that this process has received as signals.

    Outside `deferred` a signal ends the process at once, since there is nothing left to save.
    Inside, the first signal is remembered until the step is done, and a second one ends the process
    at once.
    """

    def __init__(self) -> None:
        self._deferring = False
        self._number = 0
        self._since = 0.0

    def install(self) -> None:
        """Handle the signals from now on (main thread only), and let scripts/launch.sh know."""
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
        """Defer signals while steps are taken and models written; all ranks leave it together.

        Raises:
            Stopped: at the end, if a signal arrived after the last step had checked for one.
        """
        self._deferring = True
        try:
            yield
            if number := self.agreed():
                raise Stopped(number)
        finally:
            self._deferring = False
        if self._number:  # it arrived after the check
            os._exit(128 + self._number)

    def agreed(self) -> int:
        """The signal that any rank has received, or 0; all ranks must ask after the same step."""
        return max_over_ranks(self._number)


stop_requests = StopRequests()
"""The only instance, since signals belong to the process."""
