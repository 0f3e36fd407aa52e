"""Which rows there are, and why some are not possible on this machine."""

import os
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from step3_rlhf.benchmark.shapes import SHAPES
from step3_rlhf.gpu_check.iteration import Iteration
from step3_rlhf.gpu_check.measurements import decode_steps, graph_tokens, waits
from step3_rlhf.gpu_check.rows import Row
from step3_rlhf.gpu_check.stages import SETTINGS, Stages
from training.errors import UserError, did_you_mean


def on_gpu() -> bool:
    return bool(get_accelerator().device_name() == "cuda")


def all_rows(output: Path, shapes: list[str]) -> list[Row]:
    """Every row; what they write goes to folders of `output`.

    Args:
        shapes: names of the models to decode.
    """
    impossible = impossible_settings()
    stages = Stages(output / "stages", processes_here())
    bf16 = on_gpu() and "bf16" not in impossible
    iteration = Iteration(output / "iteration", SHAPES["gpu" if on_gpu() else "tiny"], bf16)

    def without_gpu(reason: str) -> str:
        return "" if on_gpu() else f"there is no GPU: {reason}"

    return [
        *(Row(name, stages.run_under(name), impossible.get(name, "")) for name in SETTINGS),
        Row("graph", graph_tokens, without_gpu("CUDA graphs are captured on one")),
        *(Row(f"decode-{name}", decode_steps(name)) for name in shapes),
        Row("waiting", waits(output / "waiting"), without_gpu("a CPU is never waited for")),
        Row("speed", iteration.speed),
        Row(
            "memory",
            iteration.memory,
            without_gpu("the memory of a process on a CPU includes Python's libraries"),
        ),
    ]


def impossible_settings() -> dict[str, str]:
    """Why stages cannot be run under a setting here."""
    accelerator = get_accelerator()
    supported = {"bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported()}
    found = {
        name: f"this machine's {accelerator.device_name()} does not train in it"
        for name, possible in supported.items()
        if not possible
    }
    return found | ({} if on_gpu() else {"offload": "there is no GPU: offloading takes from one"})


def chosen(rows: list[Row], only: list[str] | None) -> list[Row]:
    """The rows that are named, or all.

    Raises:
        UserError: there is no row of a name.
    """
    known = {row.name: row for row in rows}
    for name in only or []:
        if name not in known:
            raise UserError(f"--only: there is no row {name!r}{did_you_mean(name, known)}")
    return [row for row in rows if not only or row.name in only]


def processes_here() -> int:
    """How many processes scripts/launch.sh starts."""
    return int(os.environ.get("NUM_PROCESSES", "0")) or max(1, torch.cuda.device_count())
