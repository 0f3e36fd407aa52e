"""Prints a dry run: facts, memory per GPU, whether it fits, and what would need less."""

from collections.abc import Callable
from typing import TypeVar

import torch
from deepspeed.accelerator import get_accelerator

from training.dry_run import DryRun
from training.stage_config import StageConfig

Stage = TypeVar("Stage", bound=StageConfig)

GIB = 1024**3
USUAL_GPU = 80.0
"""GiB of memory that are assumed if this machine has no GPU (A100)."""
RESERVE = 0.1
"""Share of a GPU that the estimate leaves to CUDA, NCCL and fragmentation."""


def print_dry_run(
    config: Stage,
    fill: Callable[[Stage, DryRun], None],
    processes: int,
    memory: float | None,
    stand_in: str | None = None,
) -> None:
    """Print what `config` would do and need on `processes` GPUs of `memory` GiB.

    Args:
        fill: adds the stage's own part to the dry run.
        memory: None for that of this machine's GPU, or of a usual one.
    """
    run = DryRun(config, processes, stand_in)
    fill(config, run)
    print(described(run, memory or gpu_memory()))


def gpu_memory() -> float:
    """GiB of this machine's GPU, or of a usual one."""
    if get_accelerator().device_name() == "cpu":
        return USUAL_GPU
    return float(torch.cuda.get_device_properties(0).total_memory / GIB)


def described(run: DryRun, gpu_memory: float) -> str:
    """The text of a dry run for GPUs of `gpu_memory` GiB."""
    lines = ["Dry run: the config is sound; no weights were loaded.", ""]
    if run.config.description:
        lines += [run.config.description, ""]
    facts = {"processes": str(run.processes), **run.facts}
    lines += [f"  {name + ':':<22}{value}" for name, value in facts.items()]
    lines += ["", *(f"  {note}" for note in run.notes)] if run.notes else []
    lines += ["", *_memory_table(run)]
    usable = gpu_memory * (1 - RESERVE)
    needed = run.needed / GIB
    verdict = "fits" if needed <= usable else "does NOT fit"
    lines += [
        "",
        f"  Estimate: {needed:.1f} GiB; it {verdict} a GPU of {gpu_memory:.0f} GiB, of which "
        f"{RESERVE:.0%} are reserved for CUDA.",
    ]
    if needed > usable:
        lines.append(f"  These need less: {remedy(run.config)}")
    if host := sum(states.host for _, states in run.models.values()):
        lines.append(
            f"  Offloaded to the host: {host / GIB:.0f} GiB over all processes, plus half as much "
            "again for buffers; divide by the number of nodes."
        )
    return "\n".join(lines)


def _memory_table(run: DryRun) -> list[str]:
    """One line for each model's states, and one for each phase."""
    kinds = f"{'weights':>9}{'grads':>7}{'optimizer':>11}{'buckets':>9}"
    lines = [f"  {'GiB on each GPU':<20}{'parameters':>16}{'trained':>16}{kinds}"]
    for name, (shape, states) in run.models.items():
        trained = "frozen" if name in run.frozen else f"{shape.trained:,}"
        lines.append(
            f"  {name:<20}{shape.parameters:>16,}{trained:>16}"
            f"{states.weights / GIB:>9.2f}{states.gradients / GIB:>7.2f}"
            f"{states.optimizer / GIB:>11.2f}{states.buckets / GIB:>9.2f}"
        )
    for phase, parts in run.phases.items():
        inside = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
        lines.append(f"  {phase + ':':<20}{sum(parts.values()) / GIB:>9.2f}  ({inside})")
    return lines


def remedy(config: StageConfig) -> str:
    """Settings that would lower the estimate for this config."""
    zero = config.deepspeed.get("zero_optimization", {})
    options = [
        ("gradient_checkpointing=true", not config.gradient_checkpointing),
        ("bf16=true", not config.bf16 and not config.fp16),
        ("a smaller per_device_train_batch_size", config.per_device_train_batch_size > 1),
        ("deepspeed.zero_optimization.stage=3", zero.get("stage", 0) < 3),
        (
            "deepspeed.zero_optimization.offload_optimizer.device=cpu",
            "offload_optimizer" not in zero,
        ),
        ('lora={"r": 16}', config.lora is None),
        ("more GPUs", zero.get("stage", 0) > 0),
    ]
    return ", ".join(name for name, helps in options if helps)
