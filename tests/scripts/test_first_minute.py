"""What a user sees first: help, and mistakes that end before anything is launched.

Each script runs as a user would start it, from another directory than the repository's.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from training.launch import lock

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 3.0
"""Of CPU time: a check that imports transformers takes longer."""

Settings = Callable[[str], dict[str, Any]]


@dataclass(frozen=True)
class Ended:
    code: int
    printed: str
    said: str
    """What was printed to standard error."""
    cpu: float


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Ended]:
    """Runs a script in `tmp_path`."""

    def run(name: str, *arguments: str, **variables: str) -> Ended:
        own = {
            "VIRTUAL_ENV": sys.prefix,
            "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
        }
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ended = subprocess.run(
            ["bash", str(ROOT / "scripts" / name), *arguments],
            env=os.environ | own | variables, cwd=tmp_path,
            capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime - before.ru_utime
        return Ended(ended.returncode, ended.stdout, ended.stderr, cpu)

    return run


def test_a_mistake_ends_with_its_message_alone(
    script: Callable[..., Ended], stage_settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "bad.json").write_text(json.dumps(stage_settings("ppo") | {"seeed": 1}))
    ended = script("step3_rlhf.sh", "bad.json", NUM_PROCESSES="2")
    assert ended.code == 2
    assert ended.printed == ""
    lines = ended.said.strip().splitlines()
    assert lines == [
        "bad.json cannot be used:",
        "  - seeed: unknown key; did you mean 'seed'?",
    ]
    assert ended.cpu < SECONDS


def test_a_config_of_another_stage(
    script: Callable[..., Ended], stage_settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "ppo.json").write_text(json.dumps(stage_settings("ppo")))
    ended = script("step1_sft.sh", "ppo.json")
    assert ended.code == 2
    assert ended.said.count("this seems to be a config of scripts/step3_rlhf.sh: ") == 1
    assert ended.said.count("known here") == 1
    assert ended.cpu < SECONDS


def test_an_output_directory_in_use(
    script: Callable[..., Ended], stage_settings: Settings, tmp_path: Path
) -> None:
    settings = stage_settings("sft")
    (tmp_path / "sft.json").write_text(json.dumps(settings))
    lock.occupy(Path(settings["output_dir"]))
    ended = script("step1_sft.sh", "sft.json")
    assert ended.code == 2
    assert f"another run is working in {settings['output_dir']}" in ended.said
    assert ended.printed == ""
    assert ended.cpu < SECONDS


def test_a_checkpoint_of_another_run(
    script: Callable[..., Ended], stage_settings: Settings, tmp_path: Path
) -> None:
    settings = stage_settings("sft") | {"resume_from_checkpoint": "latest"}
    checkpoint = Path(settings["output_dir"], "checkpoints", "step-00000001")
    checkpoint.mkdir(parents=True)
    Path(settings["output_dir"], "config.json").write_text("{}")
    record = {"step": 1, "processes": 1, "config": settings | {"learning_rate": 2.0}, "state": {}}
    (checkpoint / "state.json").write_text(json.dumps(record))
    (tmp_path / "sft.json").write_text(json.dumps(settings))
    ended = script("step1_sft.sh", "sft.json")
    assert ended.code == 2
    assert "learning_rate: 2.0 in the checkpoint, 0.001 now" in ended.said
    assert ended.cpu < SECONDS


@pytest.mark.parametrize("name", ["step1_sft.sh", "step3_rlhf.sh", "evaluate.sh"])
def test_no_arguments_and_help(script: Callable[..., Ended], name: str) -> None:
    nothing = script(name)
    assert nothing.code == 2
    assert nothing.said.startswith(f"usage: bash scripts/{name} ")
    assert "--help shows an example" in nothing.said
    for processes in "12":
        helped = script(name, "--help", NUM_PROCESSES=processes)
        assert helped.code == 0
        assert helped.printed.count(f"usage: bash scripts/{name} ") == 1
        assert "example" in helped.printed
        assert "model_name_or_path" in helped.printed
        assert "local_rank" not in helped.printed
        assert helped.cpu < SECONDS


@pytest.mark.parametrize("name", ["slurm.sh", "test.sh", "sweep.sh", "quickstart.sh"])
def test_help_of_the_other_scripts(script: Callable[..., Ended], name: str) -> None:
    helped = script(name, "--help")
    assert (helped.code, helped.said) == (0, "")
    assert f"scripts/{name}" in helped.printed
    assert "SBATCH" not in helped.printed


def test_an_evaluation_is_not_replaced_unasked(
    script: Callable[..., Ended], stage_settings: Settings, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / "actor").mkdir(parents=True)
    (run / "actor" / "config.json").write_text("{}")
    (run / "config.json").write_text(json.dumps(stage_settings("ppo")))
    (run / "evaluation.json").write_text("precious")
    ended = script("evaluate.sh", "run", "evaluation.max_prompts=2")
    assert ended.code == 2
    assert ended.said.strip().startswith("run/evaluation.json exists; pass --overwrite")
    assert (run / "evaluation.json").read_text() == "precious"
    assert ended.cpu < SECONDS


def test_a_run_that_does_not_exist(script: Callable[..., Ended]) -> None:
    ended = script("evaluate.sh", "runs/nowhere")
    assert ended.code == 2
    assert ended.said.strip() == "runs/nowhere does not exist"


@pytest.mark.parametrize("count", ["0", "two", "-1"])
def test_a_number_of_processes_that_is_none(script: Callable[..., Ended], count: str) -> None:
    ended = script("step1_sft.sh", "any.json", NUM_PROCESSES=count)
    assert ended.code == 1
    assert ended.said == f"NUM_PROCESSES={count}: a number above 0 was expected\n"


HARD = r"""
set -e
mount -t tmpfs -o size=64m tmpfs /dev/shm
cd "$1/elsewhere"
exec env -i PATH="$PATH" VIRTUAL_ENV="$VIRTUAL_ENV" LC_ALL=C HOME="$1/home" RESULTS="$1/results" \
    OMP_NUM_THREADS=1 NUM_PROCESSES=2 HF_HUB_OFFLINE=1 \
    bash "$1/der Prüfstand/scripts/step1_sft.sh" sft.json
"""


def small_shared_memory_is_possible() -> bool:
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    return (
        shutil.which("unshare") is not None
        and not subprocess.run(command, capture_output=True).returncode
    )


@pytest.mark.launcher
@pytest.mark.skipif(not small_shared_memory_is_possible(), reason="mounting needs privileges")
def test_a_hard_machine(stage_settings: Settings, tiny_world: Path, tmp_path: Path) -> None:
    """Docker's shared memory, LANG=C, spaces and umlauts, another clone's environment, ~ and $.

    The environment was set up by this clone; the other one, whose code says so, shares it.
    """
    clone = tmp_path / "der Prüfstand"
    clone.mkdir()
    for name in ("scripts", "training", "step1_sft", "pyproject.toml"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, clone / name)
    main = clone / "step1_sft" / "main.py"
    main.write_text(main.read_text(encoding="utf-8").replace("SFT is done", "SFT is done — über"))
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    shutil.copy(tiny_world / "texts.jsonl", home)
    shutil.copytree(tiny_world / "base", elsewhere / "models" / "base")
    settings = stage_settings("sft")
    settings["model_name_or_path"] = "models/base"
    settings["output_dir"] = "${RESULTS}/run"
    settings["data"] |= {"sources": ["~/texts.jsonl"]}
    (elsewhere / "sft.json").write_text(json.dumps(settings))
    variables = {
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
    }
    ended = subprocess.run(
        ["unshare", "--mount", "bash", "-c", HARD, "hard", str(tmp_path)],
        env=os.environ | variables, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert ended.stdout.startswith("Starting 2 processes\n")
    assert "SFT is done — über" in ended.stdout
    assert ended.stdout.count("/dev/shm has 64 MiB left") == 1
    assert "built successfully" not in ended.stdout + ended.stderr
    assert "WARNING" not in ended.stdout + ended.stderr
    results = tmp_path / "results" / "run"
    assert (results / "model" / "model.safetensors").is_file()
    written = json.loads((results / "config.json").read_text())
    assert written["model_name_or_path"] == str(elsewhere / "models" / "base")
    assert written["data"]["sources"][0]["path"] == str(home / "texts.jsonl")
