"""What the processes tell one another; of one process here, of two in test_sharding.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training.runtime import ranks

pytestmark = pytest.mark.usefixtures("process_group")


def test_sums_and_lists_of_one_rank() -> None:
    assert ranks.world_size() == 1
    assert ranks.sum_over_ranks(torch.tensor([1, 2])).tolist() == [1.0, 2.0]
    assert ranks.sum_over_ranks(torch.tensor([1, 2])).dtype == torch.float64
    assert ranks.gather_objects(["a", 1]) == ["a", 1]
    with ranks.rank_zero_first():
        pass


SUM = r"""
import os, torch
from training.runtime import ranks
ranks.connect()
total = ranks.sum_over_ranks(torch.tensor(ranks.rank() + 1.0)).item()
os.write(1, f"sum {total}\n".encode())  # print writes in pieces, the processes' between one another
ranks.barrier()
os._exit(0)
"""


@pytest.mark.launcher
def test_no_shared_memory_is_left_behind(tmp_path: Path) -> None:
    """Not even by processes that end without leaving the group, as one that is killed does."""
    before = set(Path("/dev/shm").iterdir())
    program = tmp_path / "sum.py"
    program.write_text(SUM)
    ended = subprocess.run(
        [Path(sys.prefix) / "bin" / "deepspeed", "--hostfile", "/dev/null", "--num_gpus", "2",
         "--master_port", "29655", program],
        env=os.environ | {"PYTHONPATH": os.getcwd(), "DS_ACCELERATOR": "cpu"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("sum 3.0") == 2
    left = {path.name for path in set(Path("/dev/shm").iterdir()) - before}
    assert not [name for name in left if "_29655_" in name]


def test_shared_memory_that_is_too_small_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_SIZE", "2")
    monkeypatch.setattr(ranks, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(ranks, "SHARED_BUFFER", 2**60)
    assert not ranks.shared_memory_suffices()
    assert "docker run --shm-size=1g" in capsys.readouterr().out
    monkeypatch.setattr(ranks, "SHARED_BUFFER", 1)
    assert ranks.shared_memory_suffices()
    assert capsys.readouterr().out == ""
