"""GPUs that the driver lists and torch cannot use, with a stand-in for nvidia-smi.

The torch of the tests is built for the CPU, or runs where there is no GPU.
"""

from pathlib import Path

import pytest
import torch

from training.errors import UserError
from training.launch.gpus import driver, listed_gpus, require_usable_gpus

NVIDIA_SMI = r"""#!/bin/sh
if [ "$1" = --list-gpus ]; then
    printf 'GPU 0: Tesla T4 (UUID: GPU-1)\nGPU 1: Tesla T4 (UUID: GPU-2)\n'
else
    echo '| NVIDIA-SMI 470.82.01    Driver Version: 470.82.01    CUDA Version: 11.4     |'
fi
"""


@pytest.fixture
def old_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a torch without a GPU")
@pytest.mark.usefixtures("old_driver")
def test_a_driver_that_is_too_old_is_named_with_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert listed_gpus() == 2
    assert driver() == "470.82.01, which supports CUDA up to 11.4"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError) as caught:
        require_usable_gpus()
    assert "nvidia-smi lists 2 GPUs, and torch cannot use them" in str(caught.value)
    assert "470.82.01, which supports CUDA up to 11.4" in str(caught.value)
    assert f"torch {torch.__version__} is built for CUDA 13.0" in str(caught.value)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match="is built for CPUs only"):
        require_usable_gpus()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # asked for: CUDA_VISIBLE_DEVICES= does that
    require_usable_gpus()


def test_no_gpu_is_no_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    require_usable_gpus()
