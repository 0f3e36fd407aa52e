"""What a stage leaves behind: Hugging Face directories, whatever the ZeRO stage was."""

import shutil
from pathlib import Path

import deepspeed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training.engine import barrier, is_partitioned, rank


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write `model` and `tokenizer` as safetensors that `from_pretrained` loads.

    Must be called on every rank; rank 0 writes. The directory appears whole or not at all.
    """
    parameters = list(model.parameters()) if is_partitioned(model) else []
    with deepspeed.zero.GatheredParameters(parameters, enabled=bool(parameters)):
        if rank() == 0:
            unfinished = directory.with_name(directory.name + ".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            model.save_pretrained(unfinished, safe_serialization=True)
            tokenizer.save_pretrained(unfinished)
            shutil.rmtree(directory, ignore_errors=True)
            unfinished.rename(directory)
    barrier()
