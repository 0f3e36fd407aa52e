"""Records -> token ids, encoded in batches and cached on disk.

Columns: "prompt" and "group" (texts) and "prompt_ids"; for sft also "response_ids"; for reward also
"responses_ids", a list of lists, best first.
"""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.data import formats, templates
from training.data.formats import Record
from training.data.records import StageRecords
from training.data.settings import DataSettings, Stage
from training.data.split import normalized
from training.data.tally import Tally
from training.data.templates import (
    encode_prompts,
    encode_responses,
    render_prompt,
    truncate_prompt,
)
from training.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedTokenizerBase

BATCH_SIZE = 1000
WORTH_A_PROGRESS_BAR = 50_000


@dataclass(frozen=True)
class TokenizedData:
    """The token ids of a stage's records, and the counts of what was cut or dropped."""

    train: "Dataset"
    eval: "Dataset"
    tally: Tally


def tokenize(
    records: StageRecords,
    tokenizer: "PreTrainedTokenizerBase",
    settings: DataSettings,
    stage: Stage,
) -> TokenizedData:
    """Encode the records, or read them from the cache of an earlier run.

    Raises:
        UserError: none of the training records, or none of the evaluation records, can be used.
    """
    tally = Tally()
    parts = {}
    for name, content in (("training", records.train), ("evaluation", records.eval)):
        parts[name], counts = _cached(content, tokenizer, settings, stage)
        for what, count in counts.items():
            tally.add(name, what, count)
        if content and not len(parts[name]):
            raise UserError(tally.lines(), f"No {name} records are left for {stage!r}:")
    return TokenizedData(parts["training"], parts["evaluation"], tally)


def _cached(
    records: list[Record],
    tokenizer: "PreTrainedTokenizerBase",
    settings: DataSettings,
    stage: Stage,
) -> "tuple[Dataset, dict[str, int]]":
    import datasets

    root = settings.cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "token_ids"
    entry = Path(root).expanduser() / cache_key(records, tokenizer, settings, stage)
    if entry.is_dir():
        try:
            counts = json.loads((entry / "counts.json").read_text(encoding="utf-8"))
            return datasets.load_from_disk(str(entry)), counts
        except (OSError, ValueError):
            # Damaged from outside; encode again.
            shutil.rmtree(entry, ignore_errors=True)
    with _progress_bars(shown=len(records) >= WORTH_A_PROGRESS_BAR):
        dataset, counts = _encoded(records, tokenizer, settings, stage, entry.name)
        if len(dataset):  # an empty data set cannot be read back
            _save(dataset, counts, entry)
    return dataset, counts


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Hide the progress bars of `datasets` unless `shown`: short work needs none."""
    import datasets

    if shown or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def cache_key(
    records: Iterable[Record],
    tokenizer: "PreTrainedTokenizerBase",
    settings: DataSettings,
    stage: Stage,
) -> str:
    """A digest of everything that the token ids depend on."""
    digest = hashlib.sha256()
    for part in (
        code_version(),
        stage,
        settings.max_prompt_length,
        settings.max_response_length,
        settings.max_length,
        settings.overlong_prompts,
        tokenizer_content(tokenizer),
    ):
        digest.update(f"{part}\x1e".encode())
    for record in records:
        line = json.dumps([[dict(message) for message in record.prompt], record.responses])
        line += json.dumps(record.group)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()[:32]


@lru_cache(maxsize=1)
def code_version() -> str:
    """A digest of the code that turns records into ids and of the libraries that it calls."""
    import tokenizers
    import transformers

    digest = hashlib.sha256(f"{transformers.__version__} {tokenizers.__version__}".encode())
    for file in (formats.__file__, templates.__file__, __file__):
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def tokenizer_content(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Everything in a tokenizer that the ids depend on, as text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = sorted(tokenizer.get_vocab().items())
    else:
        content = json.loads(backend.to_str())
        # State left behind by calls, which has no effect here.
        for transient in ("padding", "truncation"):
            content.pop(transient, None)
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    whole = [type(tokenizer).__name__, content, special, tokenizer.chat_template]
    return json.dumps(whole, sort_keys=True, default=str)


def _encoded(
    records: list[Record],
    tokenizer: "PreTrainedTokenizerBase",
    settings: DataSettings,
    stage: Stage,
    fingerprint: str,
) -> "tuple[Dataset, dict[str, int]]":
    from datasets import Dataset

    tally = Tally()

    def encode(rows: dict[str, list[int]]) -> dict[str, list[Any]]:
        batch = [records[index] for index in rows["row"]]
        return _encode_batch(batch, tokenizer, settings, stage, tally)

    features = _features(stage)
    if not records:
        return Dataset.from_dict({name: [] for name in features}, features=features), {}
    # With a given fingerprint, `datasets` need not pickle the tokenizer to compute one.
    dataset = Dataset.from_dict({"row": list(range(len(records)))}).map(
        encode,
        batched=True,
        batch_size=BATCH_SIZE,
        remove_columns=["row"],
        features=features,
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint=fingerprint,
        desc="Tokenizing",
    )
    return dataset, dict(tally.counts.get("", {}))


def _encode_batch(
    batch: list[Record],
    tokenizer: "PreTrainedTokenizerBase",
    settings: DataSettings,
    stage: Stage,
    tally: Tally,
) -> dict[str, list[Any]]:
    """The columns of the records that are kept; the rest are tallied under an empty heading."""
    from jinja2 import TemplateError

    rendered, kept = [], []
    for record in batch:
        try:
            rendered.append(render_prompt(record.prompt, tokenizer))
            kept.append(record)
        except TemplateError:
            tally.add("", "dropped: the chat template refuses the prompt")
    prompt_ids = encode_prompts(rendered, tokenizer)
    flat = [response for record in kept for response in record.responses]
    responses = iter(encode_responses(flat, tokenizer))
    columns: dict[str, list[Any]] = {name: [] for name in _features(stage)}
    for record, ids in zip(kept, prompt_ids, strict=True):
        answers = [next(responses) for _ in record.responses]
        if len(ids) > settings.max_prompt_length:
            if settings.overlong_prompts == "drop":
                tally.add("", "dropped: a prompt longer than max_prompt_length")
                continue
            tally.add("", "prompts truncated from the left to max_prompt_length")
            ids = truncate_prompt(ids, settings.max_prompt_length, tokenizer.bos_token_id)
        limit, limited_by = _room(len(ids), settings)
        cut = [answer[:limit] for answer in answers]
        if stage == "reward" and len({tuple(answer) for answer in cut}) < len(cut):
            tally.add("", f"dropped: responses identical up to {limited_by}")
            continue
        tally.add(
            "",
            f"responses cut to {limited_by}, without EOS",
            sum(len(answer) > limit for answer in answers),
        )
        columns["prompt"].append(record.prompt_text)
        columns["group"].append(record.group or normalized(record.prompt_text))
        columns["prompt_ids"].append(ids)
        if stage == "sft":
            columns["response_ids"].append(cut[0])
        elif stage == "reward":
            columns["responses_ids"].append(cut)
    return columns


def _room(prompt_length: int, settings: DataSettings) -> tuple[int, str]:
    """The tokens left for a response to a prompt of this length, and the limiting setting."""
    if settings.max_length is not None:
        room = settings.max_length - prompt_length
        if room < settings.max_response_length:
            return room, "max_length"
    return settings.max_response_length, "max_response_length"


def _features(stage: Stage) -> "Features":
    from datasets import Features, List, Value

    ids = List(Value("int32"))
    columns = {"prompt": Value("string"), "group": Value("string"), "prompt_ids": ids}
    if stage == "sft":
        columns["response_ids"] = ids
    elif stage == "reward":
        columns["responses_ids"] = List(ids)
    return Features(columns)


def _save(dataset: "Dataset", counts: dict[str, int], entry: Path) -> None:
    """Write the entry atomically: other processes may be writing the same one."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=entry.parent, prefix=f".{entry.name}."))
    except OSError as error:
        warnings.warn(f"token ids are not cached: {error}", stacklevel=2)
        return
    try:
        dataset.save_to_disk(str(draft))
        (draft / "counts.json").write_text(json.dumps(counts), encoding="utf-8")
        draft.chmod(0o755)
        os.rename(draft, entry)
    except OSError:
        # Another process was first, or the disk is full; the data in memory are sound.
        shutil.rmtree(draft, ignore_errors=True)
