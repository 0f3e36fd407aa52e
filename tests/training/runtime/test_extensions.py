"""A guard that a killed process left behind is no reason to wait for ever."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.accelerator import get_accelerator
from torch.utils import cpp_extension

from training.runtime.extensions import GUARD, is_worked_in, load_extension, locked

pytestmark = pytest.mark.launcher

LOAD = (
    "from training.runtime.extensions import load_extension; load_extension('ShareMemCommBuilder')"
)


@pytest.fixture
def guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the guard would lie in a copy of the extension, which no other test uses."""
    load_extension("ShareMemCommBuilder")
    name = get_accelerator().create_op_builder("ShareMemCommBuilder").name
    built = Path(cpp_extension._get_build_directory(name, verbose=False))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    copy = Path(cpp_extension._get_build_directory(name, verbose=False))
    shutil.copytree(built, copy, dirs_exist_ok=True)
    return copy / GUARD


def test_a_guard_left_behind_is_taken_away(guard: Path) -> None:
    with locked(guard.parent.with_name(f"{guard.parent.name}.loading")):
        guard.touch()  # as a process that was killed while it loaded the extension
    subprocess.run([sys.executable, "-c", LOAD], check=True, timeout=120, capture_output=True)
    assert not guard.exists()


def test_a_compiler_that_is_killed_is_no_longer_waited_for(guard: Path) -> None:
    guard.touch()
    with subprocess.Popen(["sleep", "60"], cwd=guard.parent) as compiler:
        loading = subprocess.Popen([sys.executable, "-c", LOAD], stdout=subprocess.DEVNULL)
        with pytest.raises(subprocess.TimeoutExpired):
            loading.wait(timeout=15)
        compiler.kill()
    assert loading.wait(timeout=120) == 0
    assert not guard.exists()


def test_a_compiler_at_work_is_noticed(tmp_path: Path) -> None:
    assert not is_worked_in(tmp_path)
    with subprocess.Popen(["sleep", "60"], cwd=tmp_path) as compiler:
        assert is_worked_in(tmp_path)
        compiler.kill()


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    hold = (
        "import sys, time, pathlib; from training.runtime.extensions import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(file)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    while holder.stdout.readline() != "held\n":
        pass
    holder.kill()
    holder.wait()
    with locked(file):
        pass
