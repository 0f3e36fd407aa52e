"""All three stages, tiny and one after the other, under each setting that a GPU must cope with."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from step3_rlhf.benchmark.measure import run_logged
from step3_rlhf.gpu_check.rows import Found
from training.errors import RunError
from training.world.files import WorldSizes, write_world

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
LIMIT = 300.0
"""Seconds for one stage; more means that its processes wait for one another."""
BATCH = 4
STEPS = 2
MOST_KL = 0.01
"""Nats per token between the policy and its reference before the first step, which are one model.
What 16-bit kernels differ by for other batches is less."""
MOST_DIFFERENCE = 1e-3
"""Relative, between losses that ZeRO and offloading must not change."""


def zero(stage: int, **offload: Any) -> dict[str, Any]:
    """The `deepspeed` section of a ZeRO stage."""
    return {"deepspeed": {"zero_optimization": {"stage": stage, **offload}}}


ON_CPU = {"device": "cpu"}
SETTINGS: dict[str, dict[str, Any]] = {
    "zero-0": {},
    "zero-2": zero(2),
    "zero-3": zero(3),
    "offload": zero(3, offload_optimizer=ON_CPU, offload_param=ON_CPU),
    "bf16": {"bf16": True},
    "fp16": {"fp16": True},
    "packing": {"packing": True},
    "lora": {"lora": {"r": 4}},
    "resume": {"save_steps": 1},
}
EQUAL_TO_ZERO_0 = ("zero-2", "zero-3", "offload", "resume")
"""Settings that change where numbers lie, not which."""


class Stages:
    """Runs the stages in `directory`, on as many processes as the scripts start."""

    def __init__(self, directory: Path, processes: int) -> None:
        self.directory = directory
        self.processes = processes
        self.losses: dict[str, list[float]] = {}
        """Test losses of stages 1 and 2 under each setting."""

    def run_under(self, name: str) -> Callable[[Path], Found]:
        """What a row does that runs all stages under a setting."""
        return lambda log: self.run(name, log)

    def run(self, name: str, log: Path) -> Found:
        """Train an SFT model, a reward model on it, and a policy with both.

        Raises:
            UserError: a stage failed.
            RunError: all ended well, with numbers that cannot be right.
        """
        output = self.directory / name
        shutil.rmtree(output, ignore_errors=True)
        metrics = {
            stage: self._stage(stage, name, output, log) for stage in ("sft", "reward", "ppo")
        }
        losses = [metrics[stage][-1]["test/loss"] for stage in ("sft", "reward")]
        kl = metrics["ppo"][0]["policy/kl_per_token"]
        unchanged = self.losses.get("zero-0", losses) if name in EQUAL_TO_ZERO_0 else losses
        check_numbers(losses, kl, unchanged)
        self.losses[name] = losses
        return Found(
            f"losses {losses[0]:.4f} and {losses[1]:.4f}, KL per token at the start {kl:.5f}",
            {"losses": losses, "kl_per_token": kl},
        )

    def _stage(self, stage: str, name: str, output: Path, log: Path) -> list[dict[str, Any]]:
        """Run a stage to its end; with `resume`, once more from its first checkpoint."""
        output.mkdir(parents=True, exist_ok=True)
        config = output / f"{stage}.json"
        config.write_text(json.dumps(self.settings(stage, output) | SETTINGS[name], indent=2))
        script = {"sft": "step1_sft", "reward": "step2_reward", "ppo": "step3_rlhf"}[stage]
        command = ["bash", str(SCRIPTS / f"{script}.sh"), str(config)]
        run_logged(command, log, LIMIT)
        if name == "resume":
            first = output / stage / "checkpoints" / "step-00000001"
            run_logged([*command, f"resume_from_checkpoint={first}"], log, LIMIT)
        lines = (output / stage / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def settings(self, stage: str, output: Path) -> dict[str, Any]:
        """The config of a stage that reads what the stages before it wrote to `output`."""
        world = self._world()
        kind = "texts" if stage == "sft" else "comparisons"
        common: dict[str, Any] = {
            "model_name_or_path": str(
                world / "base" if stage == "sft" else output / "sft" / "model"
            ),
            "output_dir": str(output / stage),
            "per_device_train_batch_size": BATCH,
            "logging_steps": 1,
            "data": {
                "sources": [str(world / f"{kind}.jsonl")],
                "eval_sources": [str(world / f"{kind}_eval.jsonl")],
                "max_train_samples": 64,
                "max_eval_samples": 16,
                "max_prompt_length": 48,
                "max_response_length": 16,
                "cache_dir": str(self.directory / "token_ids"),
            },
        }
        if stage != "ppo":
            return common | {"learning_rate": 1e-3, "max_steps": STEPS}
        optimizer = {"learning_rate": 1e-3, "lr_scheduler_type": "constant"}
        return common | {
            "reward": {"model_name_or_path": str(output / "reward" / "model")},
            "regularizer": {"name": "conditional_pm", "alpha": 0.3},
            "actor": optimizer,
            "critic": optimizer,
            "total_episodes": STEPS * BATCH * self.processes,
            "response_length": 20,  # more than the steps before a CUDA graph is captured
            "evaluation": {"max_prompts": 4},
        }

    def _world(self) -> Path:
        """The bundled world with few records, written once."""
        world = self.directory / "world"
        if not (world / "base").is_dir():
            write_world(world, seed=1, sizes=WorldSizes(1, 1, 1, 1, 1))
        return world


def check_numbers(losses: list[float], kl: float, unchanged: list[float]) -> None:
    """Refuse numbers that cannot be right, though the stages ended well.

    Args:
        losses: test losses of stages 1 and 2.
        kl: nats per token between the policy and its reference before the first step.
        unchanged: the losses without the setting, if it must not change them; else `losses`.

    Raises:
        RunError: they cannot be right.
    """
    if not all(math.isfinite(value) for value in (*losses, kl)):
        raise RunError(f"losses {losses} and KL {kl} are not finite")
    if abs(kl) > MOST_KL:
        raise RunError(f"before the first step the policy is {kl:.4f} nats per token from itself")
    for found, known in zip(losses, unchanged, strict=True):
        if not math.isclose(found, known, rel_tol=MOST_DIFFERENCE):
            raise RunError(f"a test loss is {found:.5f}, and {known:.5f} without this setting")
