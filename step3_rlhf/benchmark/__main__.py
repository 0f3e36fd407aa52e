"""Measure stage 3: seconds per phase, tokens per second, memory, and the distance from the floor.

    bash scripts/benchmark.sh [--shape NAME | --config STAGE3.json] [--against trl] [options]

Random weights of a given shape, or a config's own models and data, run through
scripts/step3_rlhf.sh. With --against trl, TRL's PPO runs in turn with ours on the same inputs, and
ratios are taken pair by pair. Writes OUTPUT/benchmark.json.

With --scaling, ours runs with a quarter to twice the shape's responses, and with a quarter to twice
its length. Writes OUTPUT/scaling.json and scaling.png.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from step3_rlhf.benchmark.measure import Runs, Timing, time_ours, time_trl, trl_environment
from step3_rlhf.benchmark.result import machine, result
from step3_rlhf.benchmark.scaling import draw_scaling, measure_scaling, scaling_text
from step3_rlhf.benchmark.shapes import SHAPES, Shape, stage_config, write_inputs
from step3_rlhf.benchmark.table import as_text
from step3_rlhf.config import PPOConfig
from training.cli import errors_end_cleanly
from training.config import load_config
from training.plotting import require_matplotlib


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
    parser.add_argument(
        "--scaling", action="store_true", help="how the cost grows with responses and with length"
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
    if options.scaling and (options.config or options.against):
        parser.error("--scaling needs --shape alone")
    with errors_end_cleanly(options.debug):
        if options.scaling:
            require_matplotlib()
            print(scaling(options))
            return
        options.output.mkdir(parents=True, exist_ok=True)
        found = of_config(options) if options.config else of_shape(options)
        file = options.output / "benchmark.json"
        file.write_text(json.dumps(found, indent=2) + "\n")
        print(as_text(found) + f"\nwritten to {file}")


def of_shape(options: argparse.Namespace) -> dict[str, Any]:
    """Measure random weights of a shape."""
    shape: Shape = SHAPES[options.shape]
    directory, log = options.output.resolve() / options.shape, options.output / "log.txt"
    config = write_shape(shape, directory, options.iterations)
    runs: dict[str, Callable[[], Timing]] = {}
    if options.against:
        python = trl_environment(options.output.resolve() / "trl-environment", log)
        count = options.iterations + 1
        runs["trl"] = lambda: time_trl(python, directory, shape, count, log)
    runs["ours"] = lambda: time_ours(config, [], log)
    if options.bf16:
        runs["ours, bf16"] = lambda: time_ours(config, ["bf16=true"], log)
    return result(
        options.shape, in_turn(runs, options.pairs), load_config(PPOConfig, str(config), [])
    )


def write_shape(shape: Shape, directory: Path, iterations: int) -> Path:
    """Write models, prompts and a config; it runs one iteration more than those that count."""
    directory.mkdir(parents=True, exist_ok=True)
    write_inputs(shape, directory)
    config = directory / "config.json"
    settings = stage_config(shape, directory, iterations + 1)
    config.write_text(json.dumps(settings, indent=2) + "\n")
    return config


def scaling(options: argparse.Namespace) -> str:
    """Measure how the cost grows, write it and draw it; returns its text."""
    overrides = ["bf16=true"] if options.bf16 else []

    def seconds(shape: Shape) -> float:
        directory = options.output.resolve() / "scaling"
        config = write_shape(shape, directory, options.iterations)
        found = time_ours(config, overrides, options.output / "log.txt").seconds
        what = f"{shape.batch} responses, {shape.prompt} + {shape.response} tokens"
        print(f"{what}: {found:.2f} s per iteration", flush=True)
        return found

    found = measure_scaling(SHAPES[options.shape], seconds)
    file = options.output / "scaling.json"
    content = {"shape": options.shape, "machine": machine(), "growth": found}
    file.write_text(json.dumps(content, indent=2) + "\n")
    draw_scaling(found, file.with_suffix(".png"))
    return f"{scaling_text(found)}\nwritten to {file} and {file.with_suffix('.png')}"


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


if __name__ == "__main__":
    main()
