"""Times TRL's PPO on the inputs of shapes.py; runs in an environment of its own, which has TRL.

python trl_ppo.py DIRECTORY SHAPE_JSON ITERATIONS

Prints one line of JSON: seconds of each iteration, and the peak memory in GiB.
"""

import itertools
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Stopwatch(TrainerCallback):
    """The time at the start of training and at the end of each iteration."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *arguments: Any, **named: Any) -> None:
        self._now()

    def on_step_end(self, *arguments: Any, **named: Any) -> None:
        self._now()

    def _now(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def main(directory: Path, shape: dict[str, int], iterations: int) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(directory / "policy", padding_side="left")
    lines = (directory / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    ids = tokenizer(prompts, truncation=True, max_length=shape["prompt"])["input_ids"]
    data = Dataset.from_dict({"input_ids": ids})
    stopwatch = Stopwatch()
    scalar = AutoModelForSequenceClassification.from_pretrained
    trainer = PPOTrainer(
        PPOConfig(
            output_dir=str(directory / "trl"),
            total_episodes=iterations * shape["batch"],
            per_device_train_batch_size=shape["batch"],
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=1,
            local_rollout_forward_batch_size=shape["batch"],
            response_length=shape["response"],
            temperature=1.0,
            num_sample_generations=0,
            learning_rate=1e-6,
            save_strategy="no",
            report_to=[],
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
        ),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(directory / "policy"),
        ref_model=AutoModelForCausalLM.from_pretrained(directory / "policy"),
        reward_model=scalar(directory / "reward", num_labels=1),
        value_model=scalar(directory / "reward", num_labels=1),
        train_dataset=data,
        eval_dataset=data.select(range(2)),
        callbacks=[stopwatch],
    )
    trainer.train()
    times = stopwatch.times
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "seconds": [end - start for start, end in itertools.pairwise(times)],
        "peak_gib": peak,
    }


if __name__ == "__main__":
    found = main(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps(found))
