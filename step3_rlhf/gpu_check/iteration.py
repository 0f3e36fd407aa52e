"""One PPO iteration as `scripts/benchmark.sh` measures it: speed against the GPU's, memory against
the dry run's."""

import json
from pathlib import Path
from typing import Any

from step3_rlhf.benchmark.measure import run_logged
from step3_rlhf.benchmark.shapes import Shape, stage_config, write_inputs
from step3_rlhf.config import PPOConfig
from step3_rlhf.dry_run import dry_run
from step3_rlhf.gpu_check.rows import Found
from training.config import load_config
from training.dry_run import DryRun
from training.errors import RunError

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark.sh"
LIMIT = 600.0
"""Seconds for the benchmark."""
DENSE_BF16 = {
    "B200": 2250.0, "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0,
    "L40": 181.0, "L4": 121.0, "A10G": 70.0, "A10": 125.0, "RTX 4090": 165.0,
}  # fmt: skip
"""TFLOP/s of matrix products in bfloat16 by NVIDIA's data sheets, without sparsity; the first name
that occurs in the device's counts."""
MOST_MEMORY = 1.05
"""Times the estimate; a run that needs more would not fit where the dry run says it does."""
GIB = 2**30


class Iteration:
    """Measured once, for two rows."""

    def __init__(self, directory: Path, shape: Shape, bf16: bool) -> None:
        self.directory, self.shape, self.bf16 = directory, shape, bf16
        self.config = directory / "inputs" / "config.json"
        self._benchmark: dict[str, Any] = {}

    def benchmark(self, log: Path) -> dict[str, Any]:
        """The content of benchmark.json."""
        if not self._benchmark:
            self.write_config()
            options = ["--config", str(self.config), "--pairs", "1", "--output"]
            run_logged(["bash", str(SCRIPT), *options, str(self.directory)], log, LIMIT)
            self._benchmark = json.loads((self.directory / "benchmark.json").read_text())
        return self._benchmark

    def write_config(self) -> None:
        """Write models and prompts of the shape, and a config that trains with them."""
        self.config.parent.mkdir(parents=True, exist_ok=True)
        write_inputs(self.shape, self.config.parent)
        settings = stage_config(self.shape, self.config.parent, iterations=2)
        self.config.write_text(json.dumps(settings | {"bf16": self.bf16}, indent=2) + "\n")

    def speed(self, log: Path) -> Found:
        """Seconds, and the share of the machine's arithmetic that an iteration uses."""
        benchmark = self.benchmark(log)
        floor = benchmark["floor"]["ours"]
        seconds = benchmark["runs"]["ours"][0]["seconds"]
        figures = {"seconds": seconds, **floor}
        text = (
            f"{seconds:.2f} s per iteration, {floor['tokens_per_second']:,.0f} tokens/s, "
            f"{floor['utilization']:.0%} of the rate of matrix products here"
        )
        if peak := peak_flops(benchmark["machine"]["device"]):
            figures["mfu"] = floor["gflop"] * 1e9 / seconds / peak
            text += f", MFU {figures['mfu']:.1%}"
        return Found(text, figures)

    def memory(self, log: Path) -> Found:
        """The peak of memory, and what the dry run estimates.

        Raises:
            RunError: the run needs more than was estimated.
        """
        peak = self.benchmark(log)["runs"]["ours"][0]["peak_gib"]
        estimate = estimated_gib(self.config)
        text = f"{peak:.2f} GiB at the peak, {estimate:.2f} estimated by --dry-run"
        if peak > MOST_MEMORY * estimate:
            raise RunError(text)
        return Found(text, {"peak_gib": peak, "estimated_gib": estimate})


def peak_flops(device: str) -> float | None:
    """FLOP/s of the data sheet, or None if the device is not known."""
    known = [rate for name, rate in DENSE_BF16.items() if name in device]
    return known[0] * 1e12 if known else None


def estimated_gib(config: Path) -> float:
    """GiB of one process, as `--dry-run` estimates them for a config of stage 3."""
    settings = load_config(PPOConfig, str(config), [])
    run = DryRun(settings, processes=1)
    dry_run(settings, run)
    return run.needed / GIB
