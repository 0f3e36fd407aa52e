"""What a benchmark found: its runs, the machine, and how far they are from the floor."""

import os
import platform
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from step3_rlhf.benchmark.floor import Work, matmul_rate, read_rate
from step3_rlhf.benchmark.measure import Runs, Timing
from step3_rlhf.config import PPOConfig
from step3_rlhf.roles import roles_of
from training.memory import Shape as ModelShape
from training.models.pretrained import Pretrained


def result(name: str, runs: Runs, config: PPOConfig) -> dict[str, Any]:
    """Everything that is known, as JSON."""
    found: dict[str, Any] = {
        "what": name,
        "machine": machine(),
        "runs": {kind: [asdict(timing) for timing in timings] for kind, timings in runs.items()},
        "floor": {},
        "ratios": {},
    }
    for kind in runs:
        if kind.startswith("ours"):
            found["floor"][kind] = floor(config, runs[kind], bf16=config.bf16 or "bf16" in kind)
        if "trl" in runs and kind != "trl":
            pairs = list(zip(runs["trl"], runs[kind], strict=True))
            found["ratios"][kind] = {
                "speed": [theirs.seconds / ours.seconds for theirs, ours in pairs],
                "memory": [ours.peak_gib / theirs.peak_gib for theirs, ours in pairs],
            }
    return found


def floor(config: PPOConfig, timings: list[Timing], bf16: bool) -> dict[str, float]:
    """The arithmetic of an iteration of one process at the rate that matrix products reach."""
    policy = roles_of(config).policy
    shape = model_shape(policy)
    rows = config.local_rollout_size()
    response = statistics.median(t.metrics["response/length"] for t in timings)
    prompt = statistics.median(t.metrics["prompt/length"] for t in timings)
    head = shape.vocabulary * shape.hidden
    layer = shape.hidden * (2 * shape.query + 2 * shape.key) + shape.hidden * shape.intermediate * (
        3 if shape.gated else 2
    )
    work = Work(
        body=shape.layers * layer,
        head=head,
        prompt=round(prompt * rows),
        response=round(response * rows),
        attended=round((prompt + response) ** 2 * rows),
        width=shape.layers * shape.query,
    )
    dtype = torch.bfloat16 if bf16 else torch.float32
    rate = matmul_rate(
        min(work.prompt + work.response, 16384), shape.hidden, shape.intermediate, dtype
    )
    bandwidth = read_rate()
    seconds = statistics.median(t.seconds for t in timings)
    drawing = statistics.median(t.phases["rollout"] for t in timings)
    steps = round(response) * -(-rows // config.rollout_batch_size)
    return {
        "gflop": work.flops() / 1e9,
        "matmul_gflops": rate / 1e9,
        "seconds": work.flops() / rate,
        "ratio": seconds * rate / work.flops(),
        "utilization": work.flops() / rate / seconds,
        "read_gb_per_second": bandwidth / 1e9,
        "decoding_seconds": work.decoding_bytes(steps, dtype.itemsize) / bandwidth,
        "decoded_tokens_per_second": work.response / drawing,
        "tokens_per_second": (work.prompt + work.response) / seconds,
    }


def model_shape(policy: Pretrained) -> ModelShape:
    """Sizes of the policy, from its config alone."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return ModelShape.of(AutoModelForCausalLM.from_config(policy.config))


def machine() -> dict[str, Any]:
    """The device, its cores if it is a CPU, and the version of torch."""
    if get_accelerator().device_name() == "cuda":
        return {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in cpu.splitlines() if "model name" in line]
    return {
        "device": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
    }
