"""The data pipeline: sources -> records -> split by stage -> token ids -> padded batches."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.data.batches import (
        FILLER,
        GlobalBatches,
        GroupedBatch,
        SequenceBatch,
        collate_groups,
        collate_texts,
        pad_prompts,
        pad_sequences,
        response_labels,
        shard,
    )
    from training.data.formats import Record
    from training.data.messages import (
        Dialogue,
        Message,
        as_dialogue,
        dialogue_text,
        prompt_messages,
    )
    from training.data.records import StageRecords, read_records
    from training.data.settings import STAGES, DataSettings, Source, Split, Stage
    from training.data.split import chosen_at_random, split_rows
    from training.data.tally import Tally
    from training.data.templates import (
        TemplateRefusal,
        decode_responses,
        encode_dialogues,
        encode_prompts,
        encode_responses,
        fitting_prompt,
        render_prompt,
        response_end,
        response_frame,
        response_text,
        truncate_prompt,
    )
    from training.data.tokens import TokenizedData, tokenize
else:
    # A stage's config needs the settings alone, and no torch: the rest is imported when it is used.
    _MODULES = "batches formats messages records settings split tally templates tokens".split()

    def __getattr__(name: str) -> object:
        if name in __all__:
            for module in _MODULES:
                contents = vars(import_module(f"{__name__}.{module}"))
                if name in contents:
                    return contents[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "FILLER",
    "STAGES",
    "DataSettings",
    "Dialogue",
    "GlobalBatches",
    "GroupedBatch",
    "Message",
    "Record",
    "SequenceBatch",
    "Source",
    "Split",
    "Stage",
    "StageRecords",
    "Tally",
    "TemplateRefusal",
    "TokenizedData",
    "as_dialogue",
    "chosen_at_random",
    "collate_groups",
    "collate_texts",
    "decode_responses",
    "dialogue_text",
    "encode_dialogues",
    "encode_prompts",
    "encode_responses",
    "fitting_prompt",
    "pad_prompts",
    "pad_sequences",
    "prompt_messages",
    "read_records",
    "render_prompt",
    "response_end",
    "response_frame",
    "response_labels",
    "response_text",
    "shard",
    "split_rows",
    "tokenize",
    "truncate_prompt",
]
