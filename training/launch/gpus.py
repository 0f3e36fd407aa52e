"""Whether torch can use the GPUs that the machine has."""

import os
import re
import subprocess

from training.errors import UserError


def require_usable_gpus() -> None:
    """Refuse to train on the CPU where GPUs are listed, unless that is what was asked for.

    Raises:
        UserError: the driver lists GPUs, and torch cannot use them.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not (listed := listed_gpus()):
        return
    import torch

    if torch.cuda.is_available():
        return
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs only"
    raise UserError(
        f"nvidia-smi lists {listed} GPU{'s' if listed > 1 else ''}, and torch cannot use "
        f"{'them' if listed > 1 else 'it'}: the driver is {driver()}, and torch "
        f"{torch.__version__} is {built}. Update the driver, install a torch that was built for "
        "this one (https://pytorch.org/get-started), or train on the CPU with CUDA_VISIBLE_DEVICES="
    )


def listed_gpus() -> int:
    return len(re.findall(r"^GPU ", _nvidia_smi("--list-gpus"), re.M))


def driver() -> str:
    """Version of the driver and of the newest CUDA that it supports."""
    head = _nvidia_smi()
    version = re.search(r"Driver Version: *([\d.]+)", head)
    cuda = re.search(r"CUDA Version: *([\d.]+)", head)
    if version is None:
        return "of an unknown version"
    return version[1] + (f", which supports CUDA up to {cuda[1]}" if cuda else "")


def _nvidia_smi(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
