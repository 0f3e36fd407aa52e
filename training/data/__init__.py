"""The data pipeline: sources -> records -> split by stage -> token ids -> padded batches."""

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
from training.data.formats import Record, prompt_messages
from training.data.records import StageRecords, read_records
from training.data.settings import STAGES, DataSettings, Source, Split, Stage
from training.data.split import chosen_at_random, split_rows
from training.data.tally import Tally
from training.data.templates import (
    decode_responses,
    encode_dialogues,
    encode_prompts,
    encode_responses,
    render_prompt,
    response_end,
    response_frame,
    response_text,
    truncate_prompt,
)
from training.data.tokens import TokenizedData, tokenize

__all__ = [
    "FILLER",
    "STAGES",
    "DataSettings",
    "GlobalBatches",
    "GroupedBatch",
    "Record",
    "SequenceBatch",
    "Source",
    "Split",
    "Stage",
    "StageRecords",
    "Tally",
    "TokenizedData",
    "chosen_at_random",
    "collate_groups",
    "collate_texts",
    "decode_responses",
    "encode_dialogues",
    "encode_prompts",
    "encode_responses",
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
