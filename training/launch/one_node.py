"""Starts the processes of a run on this node, and ends all of them when one fails.

It does what DeepSpeed's launcher of one node does, which imports torch for that and so takes more
than a second.
"""

import os
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import NoReturn

import psutil

SECONDS_TO_END = 30.0
"""How long a process may take to end after it was told to, before it is killed."""
SECONDS_BETWEEN_LOOKS = 0.1


def run_on_this_node(devices: list[str], port: int, command: list[str]) -> None:
    """Run `python -m COMMAND` once per device; returns once all processes have ended well.

    Args:
        devices: the GPUs, or on a CPU the numbers of the processes.
        port: where the processes meet.
        command: a module and its arguments.

    Raises:
        SystemExit: with the exit code of the first process that failed, after the end of the
            others; with 1 after SIGINT or SIGTERM.
    """
    module, *arguments = command
    processes = [
        subprocess.Popen(
            [sys.executable, "-u", "-m", module, f"--local_rank={rank}", *arguments],
            env=os.environ | variables(rank, devices, port),
        )
        for rank in range(len(devices))
    ]

    def end(number: int, frame: FrameType | None) -> NoReturn:
        end_all(processes)
        sys.exit(1)

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    while (codes := [process.poll() for process in processes]).count(0) < len(codes):
        if failed := [code for code in codes if code]:
            end_all(processes)
            sys.exit(failed[0])
        time.sleep(SECONDS_BETWEEN_LOOKS)


def variables(rank: int, devices: list[str], port: int) -> dict[str, str]:
    """What tells a process its place among the others, as torch and DeepSpeed read it."""
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(devices),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(len(devices)),
        "LOCAL_SIZE": str(len(devices)),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "CROSS_SIZE": "1",  # nodes
        "CROSS_RANK": "0",
    }


def end_all(processes: list[subprocess.Popen[bytes]]) -> None:
    """End processes and those that they started; whatever does not end is killed."""
    found: list[psutil.Process] = []
    for process in processes:
        try:
            known = psutil.Process(process.pid)
            found += [*known.children(recursive=True), known]
        except psutil.NoSuchProcess:
            continue
    for each in found:
        try:
            each.terminate()
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(found, timeout=SECONDS_TO_END)
    for each in alive:
        each.kill()
