"""Starts the processes of a run, once the config is known to be sound.

This process checks the config first and then is the launcher, so that a mistake ends before any
process is started. The processes of one node are started here (one_node.py); for everything else
there is DeepSpeed's launcher.

scripts/launch.sh says what to start in these variables:
    LAUNCH_DEVICES      one node: the GPUs, or the numbers of the processes on a CPU, as in 0,1
    LAUNCH_ARGUMENTS    otherwise: arguments of the `deepspeed` command, one a line
    LAUNCH_BY_PDSH      set: that command reaches several nodes through pdsh
"""

import gc
import os
import re
import shlex
import signal
import socket

from training.errors import RunError
from training.launch.one_node import run_on_this_node

PROCESS = "training.launch.process"


def launch(module: str, arguments: list[str]) -> None:
    """Run `module` in each process; returns once all have ended well.

    Raises:
        SystemExit: with the exit code of the first process that failed, which said why.
        RunError: a process was killed by a signal, and could not say why.
    """
    if os.environ.get("LAUNCH_BY_PDSH"):
        arguments = [quoted_for_nodes(word) for word in arguments]
    try:
        if devices := os.environ.get("LAUNCH_DEVICES"):
            port = int(os.environ.get("MASTER_PORT") or free_port())
            run_on_this_node(devices.split(","), port, [PROCESS, module, *arguments])
        else:
            by_deepspeed([PROCESS, module, *arguments])
    except SystemExit as ended:
        if isinstance(ended.code, int) and ended.code < 0:
            raise RunError(killed(-ended.code)) from None
        raise


def by_deepspeed(command: list[str]) -> None:
    """Call DeepSpeed's launcher, with the options that LAUNCH_ARGUMENTS has."""
    gc.disable()  # see process.py
    from deepspeed.launcher import runner

    options = os.environ["LAUNCH_ARGUMENTS"].splitlines()
    runner.main([*options, "--log_level=critical", "--module", *command])


def quoted_for_nodes(word: str) -> str:
    """A word that reaches a program through pdsh and a shell as it is.

    pdsh replaces %h and the like. DeepSpeed puts double quotes around words with spaces and leaves
    the others as they are.
    """
    word = word.replace("%", "%%")
    return re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)


def killed(number: int) -> str:
    """The message about a process that a signal ended."""
    cause = ""
    if number == signal.SIGABRT:
        cause = (
            '; if the lines above speak of a "collective operation timeout", a process waited for '
            "another for longer than DEEPSPEED_TIMEOUT (in minutes): allow more"
        )
    elif number == signal.SIGKILL:
        cause = (
            ": most often by the operating system, for lack of memory (`dmesg` says so); fewer "
            "processes or smaller batches need less"
        )
    return f"A process of the run was ended by {signal.Signals(number).name}{cause}"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
