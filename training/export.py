"""A trained model as a Hugging Face directory."""

import shutil
from pathlib import Path

import deepspeed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training.engine import barrier, is_partitioned, rank
from training.lora import merged_state


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write `model` and `tokenizer` as safetensors that `from_pretrained` loads.

    An adapter is merged into the weights that are written; `model` keeps it.
    Must be called on every rank; rank 0 writes. The directory appears whole or not at all.
    """
    parameters = list(model.parameters()) if is_partitioned(model) else []
    with deepspeed.zero.GatheredParameters(parameters, enabled=bool(parameters)):
        if rank() == 0:
            unfinished = directory.with_name(directory.name + ".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            model.save_pretrained(
                unfinished, state_dict=merged_state(model), safe_serialization=True
            )
            tokenizer.save_pretrained(unfinished)
            shutil.rmtree(directory, ignore_errors=True)
            unfinished.rename(directory)
    barrier()
