"""Several runs of the stages in one launch, one after the other: imports are paid for once.

`launch` starts this file in each process, as the scripts start a stage. The real `main` of each
stage runs in this process group.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from step1_sft import main as sft
from step1_sft.config import SFTConfig
from step2_reward import main as reward
from step2_reward.config import RewardConfig
from step3_rlhf import main as ppo
from step3_rlhf.config import PPOConfig
from training.config import check_config
from training.runtime import engine, ranks
from training.runtime.tracking import Clock

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = (
    "import sys; from training.launch.launcher import launch; launch('many_runs', sys.argv[1:])"
)
STAGES: dict[str, tuple[Any, Any]] = {
    "sft": (SFTConfig, sft),
    "reward": (RewardConfig, reward),
    "ppo": (PPOConfig, ppo),
}


def launch(processes: int, runs: list[dict[str, Any]], directory: Path) -> None:
    """Run all of `runs` in so many processes.

    Args:
        runs: {"stage", "settings"} each; a run with "mean_of_means" averages wrongly, for a test
            that must see it.
        directory: where the processes find the list of runs, and modules that settings name.
    """
    file = directory / f"runs_{processes}.json"
    file.write_text(json.dumps(runs))
    own = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent), str(directory)]),
        "LAUNCH_DEVICES": ",".join(map(str, range(processes))),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    ended = subprocess.run(
        [sys.executable, "-c", LAUNCH, str(file)],
        env={name: value for name, value in os.environ.items() if name != "MASTER_PORT"} | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert ended.returncode == 0, ended.stdout[-6000:]


def mean_of_means(
    trained: Sequence[engine.TrainedModule],
    micro_batches: Sequence[Any],
    loss_sums: Callable[[Any], Sequence[Tensor]],
    items: Callable[[Any], int],
    clock: Clock | None = None,
) -> list[float]:
    """What most code does: each micro-batch of each rank counts the same, whatever it holds."""

    def loss_means(batch: Any) -> list[Tensor]:
        return [loss / max(items(batch), 1) for loss in loss_sums(batch)]

    return engine.optimizer_step(trained, micro_batches, loss_means, lambda batch: 1, clock)


@contextlib.contextmanager
def averaging(wrongly: bool) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if wrongly:
            for module in ("training.fitting", "step3_rlhf.trainer"):
                stack.enter_context(patch(f"{module}.optimizer_step", mean_of_means))
        yield


def run_all(runs: list[dict[str, Any]]) -> None:
    ranks.connect()
    for run in runs:
        config_class, module = STAGES[run["stage"]]
        config = check_config(config_class, run["settings"], "run:")
        with averaging(run.get("mean_of_means", False)):
            module.main(config)
    ranks.disconnect()


if __name__ == "__main__":
    run_all(json.loads(Path(sys.argv[-1]).read_text()))
