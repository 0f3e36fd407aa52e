"""Two nodes, both on the loopback interface: one launcher on each, without ssh."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.launcher

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize("argument", ["--launcher openmpi", "--launcher=SLURM"])
def test_other_launchers_are_refused(config: Path, tmp_path: Path, argument: str) -> None:
    """They start ranks and quote words in their own ways, which nothing here follows."""
    hosts = tmp_path / "hostfile"
    hosts.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    node = start(config, HOSTFILE=str(hosts), DEEPSPEED_ARGS=f"--log_level error {argument}")
    printed, _ = node.communicate(timeout=60)
    assert node.returncode == 1
    assert f"DEEPSPEED_ARGS: {argument}: several nodes are reached by pdsh" in printed


SSH = "#!/bin/sh\necho 127.0.0.1\n"  # DeepSpeed asks the first node for its address
PDSH = r"""#!/bin/bash
# What pdsh -S does: the command in a shell on each node, %n the node's number; an exit code.
while [[ "$1" == -* ]]; do
    case "$1" in
        -w) nodes="$2"; shift 2 ;;
        -f) shift 2 ;;
        *) shift ;;
    esac
done
number=0 code=0
for node in ${nodes//,/ }; do
    words="${*//%%/$'\x01'}" words="${words//%n/$number}" words="${words//%h/$node}"
    env -i HOME="$HOME" PATH=/usr/bin:/bin bash -c "${words//$'\x01'/%}" &
    started+=($!) number=$((number + 1))
done
for each in "${started[@]}"; do wait "$each" || code=$?; done
exit "$code"
"""


def stand_ins(directory: Path, **programs: str) -> str:
    """A PATH that has these programs before all others."""
    directory.mkdir()
    for name, text in programs.items():
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    return f"{directory}:{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}"


def rank_of(output: Path) -> psutil.Process:
    """One of the training processes."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if {f"output_dir={output}", "--local_rank=0"} <= set(words):
            return process
    raise AssertionError("no process has this output directory")


def test_two_nodes_through_pdsh_until_a_signal(config: Path, tmp_path: Path) -> None:
    """With stand-ins for pdsh and ssh, which pass on what they are given and nothing else."""
    hosts = tmp_path / "hostfile"
    hosts.write_text("# node1 slots=1\n127.0.0.1 slots=1\nlocalhost slots=1\n")
    output = tmp_path / "it's {a,b}; 5 %h"
    description = r"""{a,b} "quoted" \ `echo` %n"""
    sources = json.loads(config.read_text())["data"]["sources"]
    node = start(
        config,
        f"output_dir={output}",
        f"description={description}",
        f"data.sources={json.dumps(sources, separators=(',', ':'))}",  # quotes, no spaces
        "max_steps=100000",
        "num_train_epochs=100000",
        HOSTFILE=str(hosts),
        PATH=stand_ins(tmp_path / "bin", ssh=SSH, pdsh=PDSH),
        HF_HOME=str(tmp_path),
        WANDB_API_KEY="secret",
    )
    ends = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or len(losses(output)) < 2:
        assert node.poll() is None, node.communicate()[0][-4000:]
        assert time.monotonic() < ends
        time.sleep(0.2)
    handed_over = rank_of(output).environ()
    node.terminate()
    printed, _ = node.communicate(timeout=60)
    assert node.returncode == 143, printed[-4000:]
    assert list((output / "checkpoints").glob("step-*")), printed[-4000:]
    assert json.loads((output / "config.json").read_text())["description"] == description
    assert handed_over["HF_HOME"] == str(tmp_path)
    assert handed_over["DS_ACCELERATOR"] == "cpu"
    assert handed_over["DEEPSPEED_TIMEOUT"] == os.environ.get("DEEPSPEED_TIMEOUT", "60")
    assert "WANDB_API_KEY" not in handed_over


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
    variables = {
        "VIRTUAL_ENV": sys.prefix,
        "PATH": stand_ins(tmp_path / "bin", scontrol=SCONTROL, srun=SRUN),
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
