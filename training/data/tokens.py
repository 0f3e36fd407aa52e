"""Records -> token ids, encoded in batches and cached on disk.

Columns: "prompt" and "group" (texts) and "prompt_ids"; for sft also "response_ids"; for reward also
"responses_ids", a list of lists, best first, with "levels", "unranked" and "largest_tie" as in
formats.py, one level a response; for ppo also "messages", the prompt as JSON.
"""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.data.formats import UNLEARNED_ANSWERS, Record
from training.data.messages import Dialogue, dialogue_text, is_learnable
from training.data.records import StageRecords
from training.data.settings import DataSettings, Stage
from training.data.split import normalized
from training.data.tally import Mistakes, Tally
from training.data.templates import (
    TemplateRefusal,
    encode_prompts,
    encode_responses,
    fitting_prompt,
    render_prompt,
)
from training.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedTokenizerBase

BATCH_SIZE = 1000
WORTH_A_PROGRESS_BAR = 50_000


REFUSED = "the chat template refuses the dialogue: "
WHAT_HELPS = "set another chat_template, or data.on_bad_record=skip to leave such records out"


@dataclass(frozen=True)
class TokenizedData:
    """The token ids of a stage's records, and the counts of what was cut or dropped."""

    train: "Dataset"
    eval: "Dataset"
    tally: Tally


@dataclass
class Outcome:
    """What became of records.

    counts: what was cut or dropped, and how often.
    refused: the numbers of the records that the chat template refuses, with its message.
    """

    counts: dict[str, int] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)

    def count(self, what: str, number: int = 1) -> None:
        """Count `what`; zero adds no entry."""
        if number:
            self.counts[what] = self.counts.get(what, 0) + number


def tokenize(
    records: StageRecords,
    tokenizer: "PreTrainedTokenizerBase",
    settings: DataSettings,
    stage: Stage,
) -> TokenizedData:
    """Encode the records, or read them from the cache of an earlier run.

    Raises:
        UserError: none of the training records, or none of the evaluation records, can be used; or
            the chat template refuses some, and the settings say to stop.
    """
    tally, mistakes = Tally(), Mistakes()
    parts = {}
    for name, content in (("training", records.train), ("evaluation", records.eval)):
        parts[name], outcome = _cached(content, tokenizer, settings, stage)
        for what, count in outcome.counts.items():
            tally.add(name, what, count)
        refused = Mistakes()
        for number, reason in outcome.refused.items():
            for found in (refused, mistakes):
                found.add(content[number].origin, REFUSED + reason)
        for what, count in refused.left_out():
            tally.add(name, what, count)
    if mistakes and settings.on_bad_record == "stop":
        raise UserError([*mistakes.lines(), WHAT_HELPS], "The data cannot be used:")
    for name, content in (("training", records.train), ("evaluation", records.eval)):
        if content and not len(parts[name]):
            files = ", ".join(dict.fromkeys(record.origin.rpartition(":")[0] for record in content))
            raise UserError(
                tally.lines(), f"No {name} records are left for the stage {stage!r} in {files}:"
            )
    return TokenizedData(parts["training"], parts["evaluation"], tally)


def _cached(
    records: list[Record],
    tokenizer: "PreTrainedTokenizerBase",
    settings: DataSettings,
    stage: Stage,
) -> "tuple[Dataset, Outcome]":
    import datasets

    root = settings.cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "token_ids"
    entry = Path(root).expanduser() / cache_key(records, tokenizer, settings, stage)
    if entry.is_dir():
        try:
            stored = json.loads((entry / "counts.json").read_text(encoding="utf-8"))
            refused = {int(number): reason for number, reason in stored["refused"].items()}
            return datasets.load_from_disk(str(entry)), Outcome(stored["counts"], refused)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            # Damaged from outside; encode again.
            shutil.rmtree(entry, ignore_errors=True)
    with _progress_bars(shown=len(records) >= WORTH_A_PROGRESS_BAR):
        dataset, outcome = _encoded(records, tokenizer, settings, stage, entry.name)
        if len(dataset):  # an empty data set cannot be read back
            _save(dataset, outcome, entry)
    return dataset, outcome


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
        prompt = [dict(message) for message in record.prompt]
        ranked = [record.responses, record.levels, record.unranked, record.largest_tie]
        line = json.dumps([prompt, ranked, record.all_turns, record.group])
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()[:32]


@lru_cache(maxsize=1)
def code_version() -> str:
    """A digest of the code that turns records into ids and of the libraries that it calls."""
    import tokenizers
    import transformers

    digest = hashlib.sha256(f"{transformers.__version__} {tokenizers.__version__}".encode())
    folder = Path(__file__).parent
    for name in ("cutting", "fields", "formats", "messages", "templates", "tokens"):
        digest.update((folder / f"{name}.py").read_bytes())
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
) -> "tuple[Dataset, Outcome]":
    from datasets import Dataset

    outcome = Outcome()

    def encode(rows: dict[str, list[int]]) -> dict[str, list[Any]]:
        batch = {number: records[number] for number in rows["row"]}
        return _encode_batch(batch, tokenizer, settings, stage, outcome)

    features = _features(stage)
    if not records:
        return Dataset.from_dict({name: [] for name in features}, features=features), outcome
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
    return dataset, outcome


def _examples(record: Record, outcome: Outcome) -> list[tuple[Dialogue, tuple[str, ...]]]:
    """The prompt with its responses; before it, each earlier answer that is learned too.

    An answer within a dialogue is learned after the turns before it alone, as it will be drawn.
    """
    found: list[tuple[Dialogue, tuple[str, ...]]] = []
    for place, turn in enumerate(record.prompt if record.all_turns else ()):
        if turn["role"] != "assistant":
            continue
        before = record.prompt[:place]
        if is_learnable(turn) and before and before[-1]["role"] in ("user", "tool"):
            found.append((before, (turn["content"],)))
        else:
            outcome.count(UNLEARNED_ANSWERS)
    return [*found, (record.prompt, record.responses)]


def _encode_batch(
    batch: dict[int, Record],
    tokenizer: "PreTrainedTokenizerBase",
    settings: DataSettings,
    stage: Stage,
    outcome: Outcome,
) -> dict[str, list[Any]]:
    """The columns of the records that are kept; what becomes of the others is in `outcome`.

    Args:
        batch: the records by their numbers.
    """
    rendered, kept = [], []
    for number, record in batch.items():
        for prompt, responses in _examples(record, outcome):
            try:
                rendered.append(render_prompt(prompt, tokenizer))
                group = record.group or normalized(record.prompt_text)
                kept.append((prompt, responses, group, record))
            except TemplateRefusal as refusal:
                outcome.refused.setdefault(number, str(refusal))
    prompt_ids = encode_prompts(rendered, tokenizer)
    flat = [response for _, responses, *_ in kept for response in responses]
    encoded = iter(encode_responses(flat, tokenizer))
    columns: dict[str, list[Any]] = {name: [] for name in _features(stage)}
    for (prompt, responses, group, record), whole in zip(kept, prompt_ids, strict=True):
        answers = [next(encoded) for _ in responses]
        ids = _within_length(prompt, whole, tokenizer, settings, outcome)
        if ids is None:
            continue
        limit, limited_by = _room(len(ids), settings)
        cut = [answer[:limit] for answer in answers]
        if stage == "reward" and len({tuple(answer) for answer in cut}) < len(cut):
            outcome.count(f"dropped: responses identical up to {limited_by}")
            continue
        outcome.count(
            f"responses cut to {limited_by}, without EOS",
            sum(len(answer) > limit for answer in answers),
        )
        columns["prompt"].append(dialogue_text(prompt))
        columns["group"].append(group)
        columns["prompt_ids"].append(ids)
        if stage == "sft":
            columns["response_ids"].append(cut[0])
        elif stage == "reward":
            columns["responses_ids"].append(cut)
            columns["levels"].append(list(record.levels or range(len(cut))))
            columns["unranked"].append(record.unranked)
            columns["largest_tie"].append(record.largest_tie)
        else:
            columns["messages"].append(json.dumps(prompt))
    return columns


def _within_length(
    prompt: Dialogue,
    ids: list[int],
    tokenizer: "PreTrainedTokenizerBase",
    settings: DataSettings,
    outcome: Outcome,
) -> list[int] | None:
    """The ids of the prompt within max_prompt_length; None if it is dropped."""
    limit = settings.max_prompt_length
    if len(ids) <= limit:
        return ids
    if settings.overlong_prompts == "drop":
        outcome.count("dropped: a prompt longer than max_prompt_length")
        return None
    shorter = fitting_prompt(prompt, limit, tokenizer)
    if shorter is None:
        outcome.count("dropped: system turn and headers alone longer than max_prompt_length")
        return None
    if shorter[-1] == prompt[-1] and len(shorter) < len(prompt):
        outcome.count("prompts without their oldest turns, to fit max_prompt_length")
    else:
        outcome.count("prompts truncated from the left to max_prompt_length")
    return encode_prompts([render_prompt(shorter, tokenizer)], tokenizer)[0]


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
        columns |= {"levels": ids, "unranked": Value("int32"), "largest_tie": Value("int32")}
    else:
        columns["messages"] = Value("string")
    return Features(columns)


def _save(dataset: "Dataset", outcome: Outcome, entry: Path) -> None:
    """Write the entry atomically: other processes may be writing the same one."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=entry.parent, prefix=f".{entry.name}."))
    except OSError as error:
        warnings.warn(f"token ids are not cached: {error}", stacklevel=2)
        return
    try:
        dataset.save_to_disk(str(draft))
        (draft / "counts.json").write_text(json.dumps(asdict(outcome)), encoding="utf-8")
        draft.chmod(0o755)
        os.rename(draft, entry)
    except OSError:
        # Another process was first, or the disk is full; the data in memory are sound.
        shutil.rmtree(draft, ignore_errors=True)
