"""Check a new GPU machine in about ten minutes: what works, how fast, and what does not.

    bash scripts/gpu_check.sh [--shapes SHAPE ...] [--only ROW ...] [--output DIR]

Rows: all three stages, tiny, under each of zero-0, zero-2, zero-3, offload, bf16, fp16, packing,
lora and resume; whether a CUDA graph draws the tokens of single launches (graph); milliseconds of a
decode step for 4, 24 and 64 responses (decode-SHAPE); how often an iteration waits for the GPU
(waiting); its share of the GPU's arithmetic (speed); its memory against --dry-run's (memory).

Writes OUTPUT/gpu_check.json and a log for each row. Exit code 1 if a row failed.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from step3_rlhf.benchmark.result import machine
from step3_rlhf.gpu_check.decoding import SHAPES
from step3_rlhf.gpu_check.plan import all_rows, chosen, on_gpu
from step3_rlhf.gpu_check.rows import as_text, result_of
from training.cli import errors_end_cleanly
from training.launch.gpus import require_usable_gpus


def check_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        usage="bash scripts/gpu_check.sh [--shapes SHAPE ...] [--only ROW ...] [--output DIR]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, metavar="SHAPE",
        help=f"of models to decode, of {', '.join(SHAPES)}; all but tiny on a GPU, tiny on a CPU",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows to run, by name")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check"), metavar="DIR")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    return parser


def main() -> None:
    options = check_parser().parse_args()
    with errors_end_cleanly(options.debug):
        require_usable_gpus()
        usual = [name for name in SHAPES if (name != "tiny") == on_gpu()]
        failed = check(options.output.resolve(), options.shapes or usual, options.only)
    sys.exit(1 if failed else 0)


def check(output: Path, shapes: list[str], only: list[str] | None) -> bool:
    """Run the rows, print the table and write it as JSON; whether a row failed.

    Raises:
        UserError: `only` names a row that there is not.
    """
    rows = chosen(all_rows(output, shapes), only)
    logs = output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    results = []
    for number, row in enumerate(rows, 1):
        print(f"{number}/{len(rows)} {row.name}", end=" ", flush=True)
        results.append(result_of(row, logs))
        print(f"{results[-1].outcome} ({results[-1].seconds:.0f} s)", flush=True)
    where = machine()
    file = output / "gpu_check.json"
    content = {"machine": where, "rows": [result.as_json() for result in results]}
    file.write_text(json.dumps(content, indent=2) + "\n")
    print(f"\n{as_text(described(where), results)}\nwritten to {file}")
    return any(result.outcome == "failed" for result in results)


def described(where: dict[str, Any]) -> str:
    count = f"{where['cores']} cores" if "cores" in where else f"{torch.cuda.device_count()} GPUs"
    return f"{where['device']}, {count}, torch {where['torch']}"


if __name__ == "__main__":
    main()
