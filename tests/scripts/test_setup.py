"""What scripts/setup.sh finds out about the machine, with stand-ins for its programs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TWO_GPUS = "#!/bin/sh\nprintf 'GPU 0: A100 (UUID: GPU-1)\\nGPU 1: A100 (UUID: GPU-2)\\n'\n"
SHOWN = (
    "gpus visible DS_ACCELERATOR PYTORCH_ALLOC_CONF DEEPSPEED_TIMEOUT HOME PYTHONPATH root".split()
)


def after_setup(tmp_path: Path, nvidia_smi: str | None = None, **variables: str) -> dict[str, str]:
    """The variables of a shell that has sourced setup.sh, in another directory."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    if nvidia_smi:
        (tmp_path / "bin" / "nvidia-smi").write_text(nvidia_smi)
        (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    own = {
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.prefix) / 'bin'}:/usr/bin:/bin",
        "VIRTUAL_ENV": sys.prefix,
        "HOME": str(tmp_path),
    }
    shown = "; ".join(f'echo "{name}=${{{name}-unset}}"' for name in SHOWN)
    command = f'source "{ROOT}/scripts/setup.sh"; {shown}'
    ended = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=own | variables, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return dict(line.split("=", 1) for line in ended.stdout.splitlines())


@pytest.mark.parametrize(
    ("wanted", "visible", "gpus"),
    [
        (None, "0,1", "2"),
        ("1", "1", "1"),
        ("1,0", "1,0", "2"),
        ("", "", "0"),
        ("-1", "", "0"),
        ("NoDevFiles", "", "0"),
        ("1,-1,0", "1", "1"),  # CUDA stops at the first that is none
        ("7", "", "0"),
        ("GPU-2", "GPU-2", "1"),
        ("MIG-3,GPU-1", "MIG-3,GPU-1", "2"),
    ],
)
def test_the_visible_gpus(tmp_path: Path, wanted: str | None, visible: str, gpus: str) -> None:
    variables = {} if wanted is None else {"CUDA_VISIBLE_DEVICES": wanted}
    found = after_setup(tmp_path, TWO_GPUS, **variables)
    assert (found["visible"], found["gpus"]) == (visible, gpus)
    # Without a GPU the CPU is what was asked for; with one, DeepSpeed looks for itself.
    assert found["DS_ACCELERATOR"] == ("cpu" if gpus == "0" else "unset")
    expected = "unset" if gpus == "0" else "expandable_segments:True"
    assert found["PYTORCH_ALLOC_CONF"] == expected


def test_what_the_user_has_set_stays(tmp_path: Path) -> None:
    found = after_setup(tmp_path, TWO_GPUS, PYTORCH_ALLOC_CONF="mine", DEEPSPEED_TIMEOUT="7")
    assert (found["PYTORCH_ALLOC_CONF"], found["DEEPSPEED_TIMEOUT"]) == ("mine", "7")
    older = after_setup(tmp_path, TWO_GPUS, PYTORCH_CUDA_ALLOC_CONF="mine")
    assert older["PYTORCH_ALLOC_CONF"] == "unset"


def test_a_machine_without_gpus(tmp_path: Path) -> None:
    found = after_setup(tmp_path, PYTHONPATH="/mine")
    assert (found["gpus"], found["DS_ACCELERATOR"]) == ("0", "cpu")
    assert found["DEEPSPEED_TIMEOUT"] == "60"
    assert found["root"] == str(ROOT)
    assert found["PYTHONPATH"] == f"{ROOT}:/mine"  # this clone's code, whoever set up


def test_a_user_without_a_home(tmp_path: Path) -> None:
    found = after_setup(tmp_path, HOME="/nonexistent", TMPDIR=str(tmp_path))
    assert found["HOME"] == f"{tmp_path}/home-{os.getuid()}"
    assert Path(found["HOME"]).is_dir()


def test_missing_headers_are_named_before_anything_is_installed(tmp_path: Path) -> None:
    """With a stand-in for an environment's python that has no headers and no packages."""
    environment = tmp_path / "env"
    (environment / "bin").mkdir(parents=True)
    python = f'#!/bin/sh\ncase "$*" in *sys.prefix*) echo {environment};; *) echo /nowhere;; esac\n'
    (environment / "bin" / "python").write_text(python)
    (environment / "bin" / "python").chmod(0o755)
    ended = subprocess.run(
        ["bash", str(ROOT / "scripts" / "setup.sh")],
        env={
            "PATH": f"{environment / 'bin'}:/usr/bin:/bin",
            "VIRTUAL_ENV": str(environment),
            "HOME": str(tmp_path),
        },
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "/nowhere/Python.h is missing; on Debian: apt install python3-dev" in ended.stderr
