"""Runs the command of a cell, and passes signals on to it."""

import os
import signal
import subprocess
import sys
from types import FrameType

from training.runtime.signals import STOPPING


class Launcher:
    """Runs a command; a signal goes to the command, which may save a checkpoint, then ends all."""

    def __init__(self) -> None:
        self._stopped_by = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Launcher":
        numbers = [*STOPPING, signal.SIGHUP]
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup
            numbers.remove(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._stop) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self, command: list[str]) -> int:
        """The exit code. In its own session, Ctrl-C reaches the command through `_stop` only.

        Raises:
            SystemExit: the sweep was told to stop.
        """
        code = 0
        if not self._stopped_by:
            self._process = subprocess.Popen(command, start_new_session=True)
            if self._stopped_by:  # the signal came while the command was being started
                self._process.send_signal(self._stopped_by)
            code = self._process.wait()
        if self._stopped_by:
            print("\nStopped; the same command goes on with it", file=sys.stderr)
            sys.exit(128 + self._stopped_by)
        return code

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped_by = number
        # SLURM gives this signal to every process of a step; a second one would end the command
        # before its checkpoint is written.
        told = number == signal.SIGUSR1 and "SLURM_STEP_ID" in os.environ
        if self._process is not None and not told:
            self._process.send_signal(number)
