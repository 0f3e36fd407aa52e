"""How often an iteration of stage 3 waits for the GPU, in a process of its own:

    python -m step3_rlhf.gpu_check.waiting STAGE3.json

torch warns of every operation that makes the host wait for the device. Prints one line of JSON.
Without a GPU nothing waits; tests count on a tensor that pretends to be on one.
"""

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from step3_rlhf.config import PPOConfig
from step3_rlhf.main import build
from step3_rlhf.prompts import Prompts
from step3_rlhf.roles import training_roles_of
from training.config import load_config
from training.data import read_records, tokenize
from training.launch.launcher import free_port
from training.runtime import ranks

WARNING = "called a synchronizing CUDA operation"
"""What torch says of an operation for which the host waits."""


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """The places, `file:line`, at which the host waited inside the context."""
    on_gpu = torch.cuda.is_available()
    places: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
            places += [
                f"{Path(each.filename).name}:{each.lineno}"
                for each in caught
                if WARNING in str(each.message)
            ]


def waits(config: PPOConfig) -> list[str]:
    """Where the second iteration of a run waits; the first one allocates and compiles."""
    roles = training_roles_of(config)
    records = read_records(config.data, "ppo")
    data = tokenize(records, roles.policy.tokenizer, config.data, "ppo").train
    trainer = build(config, roles, Prompts(data, config), 2)
    trainer.iteration(0)
    with counted() as places:
        trainer.iteration(1)
    return places


def main(file: str) -> list[str]:
    own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(own, MASTER_PORT=str(free_port()))
    config = load_config(PPOConfig, file, [])
    ranks.connect()
    places = waits(config)
    ranks.disconnect()
    return places


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
