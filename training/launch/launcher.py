"""Starts the processes of a run with DeepSpeed's launcher, once the config is known to be sound.

This process checks the config first and then is the launcher, so that a mistake ends before any
process is started, and the launcher's imports are paid for once.

scripts/launch.sh says what to start in these variables:
    LAUNCH_DEVICES      one node: the GPUs, or the numbers of the processes on a CPU, as in 0,1
    LAUNCH_ARGUMENTS    otherwise: arguments of the `deepspeed` command, one a line
    LAUNCH_BY_PDSH      set: that command reaches several nodes through pdsh
"""

import base64
import gc
import json
import os
import re
import shlex
import signal
import socket
import sys

from training.errors import RunError

PROCESS = "training.launch.process"


def launch(module: str, arguments: list[str]) -> None:
    """Run `module` in each process; returns once all have ended well.

    Raises:
        SystemExit: with the exit code of the first process that failed, which said why.
        RunError: a process was killed by a signal, and could not say why.
    """
    gc.disable()  # see process.py
    if os.environ.get("LAUNCH_BY_PDSH"):
        arguments = [quoted_for_nodes(word) for word in arguments]
    command = ["--log_level=critical", "--module", PROCESS, module, *arguments]
    try:
        if devices := os.environ.get("LAUNCH_DEVICES"):
            on_this_node(devices.split(","), command)
        else:
            from deepspeed.launcher import runner

            runner.main([*os.environ["LAUNCH_ARGUMENTS"].splitlines(), *command])
    except SystemExit as ended:
        if isinstance(ended.code, int) and ended.code < 0:
            raise RunError(killed(-ended.code)) from None
        raise


def on_this_node(devices: list[str], command: list[str]) -> None:
    """Call DeepSpeed's launcher of one node; its command would import torch once more for that."""
    from deepspeed.launcher import launch

    world = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
    port = os.environ.get("MASTER_PORT") or str(free_port())
    sys.argv = [launch.__file__, f"--world_info={world}", f"--master_port={port}", *command]
    launch.main()


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
