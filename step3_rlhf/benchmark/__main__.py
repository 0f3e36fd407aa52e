"""Measure stage 3: seconds per phase, tokens per second, memory, and the distance from the floor.

    bash scripts/benchmark.sh [--shape NAME | --config STAGE3.json] [--against trl] [options]

Random weights of a given shape, or a config's own models and data, run through
scripts/step3_rlhf.sh. With --against trl, TRL's PPO runs in turn with ours on the same inputs, and
ratios are taken pair by pair. Writes OUTPUT/benchmark.json.
"""

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from step3_rlhf.benchmark.floor import Work, matmul_rate, read_rate
from step3_rlhf.benchmark.measure import Timing, time_ours, time_trl, trl_environment
from step3_rlhf.benchmark.shapes import SHAPES, Shape, stage_config, write_inputs
from step3_rlhf.config import PPOConfig
from step3_rlhf.roles import roles_of
from training.cli import errors_end_cleanly
from training.config import load_config
from training.memory import Shape as ModelShape
from training.models.pretrained import Pretrained

Runs = dict[str, list[Timing]]
PHASES = ("rollout", "reward", "reference", "old_scores", "forward", "backward", "step")


def benchmark_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        usage="bash scripts/benchmark.sh [--shape NAME | --config STAGE3.json] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shape", choices=SHAPES, default="small", help="random weights (small)")
    what.add_argument("--config", type=Path, help="a stage-3 config with its own models and data")
    parser.add_argument("--against", choices=["trl"], help="also run this library's PPO")
    parser.add_argument("--pairs", type=int, default=3, metavar="N", help="runs of each (3)")
    parser.add_argument(
        "--iterations", type=int, default=3, metavar="N", help="that count in each run (3)"
    )
    parser.add_argument("--bf16", action="store_true", help="also ours in bfloat16")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), metavar="DIR")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    return parser


def main() -> None:
    parser = benchmark_parser()
    options = parser.parse_args()
    if options.config and options.against:
        parser.error("--against needs --shape: another library does not read our configs")
    with errors_end_cleanly(options.debug):
        options.output.mkdir(parents=True, exist_ok=True)
        found = of_config(options) if options.config else of_shape(options)
        file = options.output / "benchmark.json"
        file.write_text(json.dumps(found, indent=2) + "\n")
        print(as_text(found) + f"\nwritten to {file}")


def of_shape(options: argparse.Namespace) -> dict[str, Any]:
    """Measure random weights of a shape."""
    shape: Shape = SHAPES[options.shape]
    directory = options.output.resolve() / options.shape
    directory.mkdir(parents=True, exist_ok=True)
    write_inputs(shape, directory)
    config, log = directory / "config.json", options.output / "log.txt"
    settings = stage_config(shape, directory, options.iterations + 1)
    config.write_text(json.dumps(settings, indent=2) + "\n")
    runs: dict[str, Callable[[], Timing]] = {}
    if options.against:
        python = trl_environment(options.output.resolve() / "trl-environment", log)
        count = options.iterations + 1
        runs["trl"] = lambda: time_trl(python, directory, shape, count, log)
    runs["ours"] = lambda: time_ours(config, [], log)
    if options.bf16:
        runs["ours, bf16"] = lambda: time_ours(config, ["bf16=true"], log)
    return result(options.shape, in_turn(runs, options.pairs), load_config(PPOConfig, config, []))


def of_config(options: argparse.Namespace) -> dict[str, Any]:
    """Measure a user's config, with its output elsewhere."""
    config = load_config(PPOConfig, options.config, [])
    processes = int(os.environ.get("NUM_PROCESSES", "0")) or max(1, torch.cuda.device_count())
    episodes = config.local_rollout_size() * processes * (options.iterations + 1)
    settings = config.model_dump(mode="json") | {
        "output_dir": str((options.output / "run").resolve()),
        "overwrite_output_dir": True,
        "total_episodes": episodes,
        "eval_steps": 0,
        "save_steps": 0,
        "logging_steps": 1,
        "evaluation": {"max_prompts": 1},
    }
    file = options.output / "config.json"
    file.write_text(json.dumps(settings, indent=2) + "\n")
    log = options.output / "log.txt"
    runs = in_turn({"ours": lambda: time_ours(file, [], log)}, options.pairs)
    return result(str(options.config), runs, config)


def in_turn(runs: dict[str, Callable[[], Timing]], pairs: int) -> Runs:
    """Run each of them once, `pairs` times over, so that a slow hour slows all of them."""
    timings: Runs = {name: [] for name in runs}
    for number in range(pairs):
        for name, run in runs.items():
            timing = run()
            timings[name].append(timing)
            print(
                f"{number + 1}/{pairs} {name}: {timing.seconds:.2f} s per iteration, "
                f"{timing.peak_gib:.2f} GiB",
                flush=True,
            )
    return timings


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
    if get_accelerator().device_name() == "cuda":
        return {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in cpu.splitlines() if "model name" in line]
    return {
        "device": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
    }


def as_text(found: dict[str, Any]) -> str:
    """The table that people read."""
    machine = found["machine"]
    lines = [f"\n{found['what']} on {machine['device']}, {machine.get('cores', 1)} cores"]
    lines.append(f"{'median of the runs':24}" + "".join(f"{kind:>14}" for kind in found["runs"]))

    def row(name: str, values: list[str]) -> None:
        lines.append(f"{name:24}" + "".join(f"{value:>14}" for value in values))

    def middle(kind: str, read: Callable[[dict[str, Any]], float | None]) -> str:
        known = [value for run in found["runs"][kind] if (value := read(run)) is not None]
        return f"{statistics.median(known):.3g}" if known else "-"

    kinds = list(found["runs"])
    row("seconds per iteration", [middle(kind, lambda run: run["seconds"]) for kind in kinds])
    for phase in PHASES:
        values = [middle(kind, lambda run: run["phases"].get(phase)) for kind in kinds]  # noqa: B023
        if set(values) != {"-"}:
            row(f"  {phase}", values)
    row("peak memory, GiB", [middle(kind, lambda run: run["peak_gib"]) for kind in kinds])
    units = {
        "ratio": "times the floor",
        "matmul_gflops": "matmul, GFLOP/s",
        "decoded_tokens_per_second": "decoded tokens/s",
        "decoding_seconds": "reading weights, s",
    }
    for name, title in units.items():
        floors = found["floor"]
        row(title, [f"{floors[kind][name]:.3g}" if kind in floors else "-" for kind in kinds])
    for kind, ratios in found["ratios"].items():
        for name, values in ratios.items():
            spread = f"{min(values):.2f} to {max(values):.2f}"
            pairs = f"{len(values)} pairs"
            lines.append(
                f"{kind}, {name} relative to trl: {statistics.median(values):.2f} "
                f"({spread}, {pairs})"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
