"""Processes of one node: what they are told, and how they end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from training.launch.one_node import variables

RUN = """
import sys
from training.launch.one_node import run_on_this_node
run_on_this_node({devices}, 29501, ["program", *sys.argv[1:]])
assert "torch" not in sys.modules
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts the launcher with a program of so many processes."""

    def started(program: str, processes: int, *arguments: str) -> "subprocess.Popen[str]":
        (tmp_path / "program.py").write_text(program)
        devices = [str(2 + rank) for rank in range(processes)]
        return subprocess.Popen(
            [sys.executable, "-c", RUN.format(devices=devices), *arguments],
            env=os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
            cwd=Path(__file__).parents[3],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return started


def test_a_process_is_told_its_place() -> None:
    assert variables(1, ["2", "GPU-7"], 29501) == {
        "CUDA_VISIBLE_DEVICES": "2,GPU-7",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29501",
        "WORLD_SIZE": "2",
        "LOCAL_SIZE": "2",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "CROSS_SIZE": "1",
        "CROSS_RANK": "0",
    }


def test_all_processes_run_and_end_well(start: Start, tmp_path: Path) -> None:
    program = (
        "import os, pathlib, sys\n"
        f"file = pathlib.Path({str(tmp_path)!r}) / os.environ['RANK']\n"
        "file.write_text(' '.join(sys.argv[1:]) + ' ' + os.environ['CUDA_VISIBLE_DEVICES'])\n"
    )
    launcher = start(program, 2, "config.json", "a b=c")
    assert launcher.wait(60) == 0, launcher.communicate()
    for rank in (0, 1):
        found = (tmp_path / str(rank)).read_text()
        assert found == f"--local_rank={rank} config.json a b=c 2,3"


HANGS = """
import os, sys, time
if os.environ["RANK"] == "1":
    {first}
os.write(1, f"{{os.getpid()}}\\n".encode())
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("first", "code"),
    [
        ("time.sleep(0.5); sys.exit(7)", 7),
        ("time.sleep(0.5); os.kill(os.getpid(), 9)", -signal.SIGKILL % 256),
    ],
)
def test_the_first_failure_ends_the_others(start: Start, first: str, code: int) -> None:
    began = time.monotonic()
    launcher = start(HANGS.format(first=first), 2)
    assert launcher.wait(60) == code
    assert time.monotonic() - began < 30
    pids = [int(line) for line in launcher.communicate()[0].split()]
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_signal_ends_all(start: Start) -> None:
    launcher = start(HANGS.format(first="pass"), 2)
    assert launcher.stdout is not None
    pids = [int(launcher.stdout.readline()) for _ in range(2)]
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) == 1
    assert not any(psutil.pid_exists(pid) for pid in pids)
