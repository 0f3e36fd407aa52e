"""Export of a trained model as a Hugging Face directory."""

from pathlib import Path

import deepspeed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training.models.lora import merged_state
from training.models.partitioned import is_partitioned
from training.runtime.disk import draft_of, publish
from training.runtime.ranks import barrier, rank


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write `model` and `tokenizer` as safetensors that `from_pretrained` loads.

    An adapter is merged into the written weights; `model` itself keeps it. Every rank must call
    this; rank 0 writes. The directory appears complete or not at all.
    """
    parameters = list(model.parameters()) if is_partitioned(model) else []
    with deepspeed.zero.GatheredParameters(parameters, enabled=bool(parameters)):
        if rank() == 0:
            draft = draft_of(directory)
            model.save_pretrained(draft, state_dict=merged_state(model), safe_serialization=True)
            tokenizer.save_pretrained(draft)
            publish(draft, directory)
    barrier()
