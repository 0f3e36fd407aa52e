"""Two nodes, both on the loopback interface: one launcher on each, without ssh."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.launcher

ROOT = Path(__file__).resolve().parents[1]


def start(config: Path, *overrides: str, **variables: str) -> subprocess.Popen[str]:
    own = {
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "step1_sft.sh"), str(config), *overrides],
        env=os.environ | own | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def losses(output: Path) -> list[float]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss"] for line in lines]


@pytest.fixture
def config(stage_settings: Callable[[str], dict[str, Any]], tmp_path: Path) -> Path:
    path = tmp_path / "sft.json"
    path.write_text(json.dumps(stage_settings("sft") | {"max_steps": 4}))
    return path


def test_two_nodes_train_as_two_processes_of_one(config: Path, tmp_path: Path) -> None:
    hosts = tmp_path / "hostfile"
    hosts.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = [
        start(
            config,
            f"output_dir={tmp_path / 'two_nodes'}",
            HOSTFILE=str(hosts),
            NODE_RANK=str(number),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for number in range(2)
    ]
    for node in nodes:
        printed, _ = node.communicate(timeout=120)
        assert node.returncode == 0, printed[-4000:]

    one_node = start(config, f"output_dir={tmp_path / 'one_node'}", NUM_PROCESSES="2")
    printed, _ = one_node.communicate(timeout=120)
    assert one_node.returncode == 0, printed[-4000:]
    assert len(losses(tmp_path / "two_nodes")) == 4
    assert losses(tmp_path / "two_nodes") == pytest.approx(losses(tmp_path / "one_node"), rel=1e-6)


def test_a_node_without_a_meeting_place_is_refused(config: Path, tmp_path: Path) -> None:
    hosts = tmp_path / "hostfile"
    hosts.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    node = start(config, HOSTFILE=str(hosts), NODE_RANK="1", MASTER_ADDR="", MASTER_PORT="")
    printed, _ = node.communicate(timeout=60)
    assert node.returncode == 1
    assert "MASTER_ADDR" in printed


SCONTROL = "#!/bin/sh\nprintf '127.0.0.1\\nlocalhost\\n'\n"
SRUN = """#!/bin/bash
# What srun does for two nodes: the command on each, with its number.
while [[ "$1" == --* ]]; do shift 2; done
for node in 0 1; do
    SLURM_NODEID=$node "$@" &
    started+=($!)
done
for each in "${started[@]}"; do wait "$each" || exit; done
"""


def test_slurm_example(config: Path, tmp_path: Path) -> None:
    """With stand-ins for SLURM's two commands; everything else is real."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"scontrol": SCONTROL, "srun": SRUN}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    variables = {
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{commands}:{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": str(os.getpid()),
    }
    output = tmp_path / "slurm"
    ended = subprocess.run(
        ["bash", str(ROOT / "scripts" / "slurm.sh"), "step1_sft.sh", str(config),
         f"output_dir={output}"],
        env=os.environ | variables, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert len(losses(output)) == 4
    assert not list((ROOT / "runs").glob("hosts-*"))
