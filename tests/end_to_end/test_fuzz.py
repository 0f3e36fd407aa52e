"""Thousands of damaged configs and data files: each is accepted and round-trips, or is refused with
a message that names the place. Nothing else may come out of the config loader and the readers.
"""

import copy
import csv
import gzip
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_rlhf.config import EvaluationConfig, PPOConfig
from training.config import StrictModel, check_config, load_config
from training.data import encode_prompts, encode_responses, read_records, tokenize
from training.data.settings import STAGES, DataSettings
from training.data.templates import render_prompt
from training.errors import UserError

CONFIGS: dict[str, type[StrictModel]] = {
    "sft": SFTConfig,
    "reward": RewardConfig,
    "ppo": PPOConfig,
    "evaluation": EvaluationConfig,
}
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "500"))
"""Of each kind of config, and of each format of data; `scripts/test.sh --fast` takes fewer, and
`--all` more."""
OUTCOMES: Counter[str] = Counter()
Path_ = tuple[str | int, ...]

fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

odd_text = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", " ", "\x00", "\ud800", "é", "\u202e", "😀", "../..", "nan", "1e5", "null", "true",
         "a" * 3000, "\n\nHuman: ", "\n\nAssistant:", "</s>", "<s>", "{", "%s", "$HOME"]
    ),
)  # fmt: skip
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 10**400, 0.0, -0.0, 1e-300, 1e308]),
    st.floats(),  # NaN and infinities as well: Python's JSON knows them
    odd_text,
)
junk = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(odd_text, inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value: Any, at: Path_ = ()) -> Iterator[Path_]:
    """Where a mutation can take hold."""
    members = value.items() if isinstance(value, dict) else enumerate(value)
    for name, member in members:
        yield (*at, name)
        if isinstance(member, dict | list):
            yield from places(member, (*at, name))


def mutated(draw: st.DrawFn, sound: Any) -> Any:
    """One to three keys deleted, renamed, copied elsewhere, or given another value."""
    damaged = copy.deepcopy(sound)
    for _ in range(draw(st.integers(1, 3))):
        known = list(places(damaged))
        if not known:
            break
        *above, name = draw(st.sampled_from(known))
        parent = damaged
        for part in above:
            parent = parent[part]
        how = draw(st.sampled_from(["delete", "rename", "replace", "replace", "add"]))
        if how == "replace":
            parent[name] = draw(junk)
        elif how == "add" and isinstance(parent, dict):
            parent[draw(odd_text)] = draw(junk)
        elif how == "rename" and isinstance(parent, dict):
            parent[str(name)[:-1] + draw(odd_text)] = parent.pop(name)
        else:
            del parent[name]
    return damaged


def bruised(draw: st.DrawFn, content: bytes) -> bytes:
    """Now and then also the bytes: cut off, in another encoding, with bytes of no encoding."""
    how = draw(st.sampled_from(["whole"] * 6 + ["cut", "bytes", "bom", "utf-16", "nul", "twice"]))
    at = draw(st.integers(0, len(content)))
    if how == "cut":
        return content[:at]
    if how == "bytes":
        return content[:at] + draw(st.binary(min_size=1, max_size=4)) + content[at:]
    if how == "bom":
        return b"\xef\xbb\xbf" + content
    if how == "utf-16":
        return content.decode("utf-8", "replace").encode("utf-16")
    if how == "nul":
        return content.replace(b" ", b"\x00", 1)
    return content * 2 if how == "twice" else content


def explained(error: UserError, file: Path, keys: set[str] | None = None) -> None:
    """The refusal names the file; of a config, each fault begins with a known key, or says that the
    key is unknown.

    Args:
        keys: those that the config has; None of data.
    """
    assert str(file) in str(error)
    assert all(fault.strip() for fault in error.faults)
    for fault in error.faults if keys is not None else []:
        named = fault.startswith((*keys, "(top level)", "the key "))
        assert named or ": unknown key" in fault or str(file) in fault, fault[-300:]


@pytest.fixture(scope="module", autouse=True)
def counts() -> Iterator[None]:
    OUTCOMES.clear()
    yield
    print("\nmutated inputs:", dict(sorted(OUTCOMES.items())))
    for kind in ("config", "data"):
        # Neither outcome is a matter of course.
        assert OUTCOMES[f"{kind} accepted"] > EXAMPLES // 15
        assert OUTCOMES[f"{kind} refused"] > EXAMPLES * 2 // 3


@pytest.mark.parametrize("kind", CONFIGS)
def test_damaged_configs(
    kind: str, stage_settings: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    sound = stage_settings("ppo" if kind == "evaluation" else kind)
    if kind == "evaluation":
        known = EvaluationConfig.model_fields
        sound = {name: value for name, value in sound.items() if name in known}
    sound |= {"deepspeed": {"zero_optimization": {"stage": 2}}} if kind != "evaluation" else {}
    check_config(CONFIGS[kind], sound, "config:")  # it is sound
    file = tmp_path / "config.json"

    @fuzzed
    @given(st.data())
    def load(data: st.DataObject) -> None:
        draw = data.draw
        damaged = mutated(draw, sound)
        text = json.dumps(damaged, ensure_ascii=draw(st.booleans()))
        file.write_bytes(bruised(draw, text.encode("utf-8", "surrogatepass")))
        try:
            config = load_config(CONFIGS[kind], str(file), [])
        except UserError as error:
            explained(error, file, set(CONFIGS[kind].model_fields))
            OUTCOMES["config refused"] += 1
            return
        resolved = json.loads(json.dumps(config.model_dump(mode="json")))
        assert check_config(CONFIGS[kind], resolved, "config:") == config
        OUTCOMES["config accepted"] += 1

    load()


RECORDS: dict[str, list[dict[str, Any]]] = {
    "preference": [
        {"prompt": f"Which tea is number {n}?", "chosen": "the green one", "rejected": "none"}
        for n in range(12)
    ],
    "ranking": [
        {"prompt": f"Rank {n}.", "responses": ["one", "two", "three"], "ranking": [2, 0, 1]}
        for n in range(12)
    ],
    "completion": [{"prompt": f"Say {n}.", "response": f"It is {n}."} for n in range(12)],
    "chat": [
        {"prompt": [{"role": "system", "content": "Be brief."},
                    {"role": "user", "content": f"Name {n}."}],
         "chosen": "Ann", "rejected": "Bob"}
        for n in range(12)
    ],
    "transcript": [
        {"chosen": f"\n\nHuman: Is {n} even?\n\nAssistant: Yes.",
         "rejected": f"\n\nHuman: Is {n} even?\n\nAssistant: No."}
        for n in range(12)
    ],
    "tldr_comparison": [
        {"info": {"id": str(n), "subreddit": "tea", "title": f"Cup {n}", "post": "It was cold."},
         "summaries": [{"text": "cold tea"}, {"text": "a cup"}], "choice": n % 2}
        for n in range(12)
    ],
    "completions": [
        {"instruction": f"Rank {n}.", "completions": [
            {"response": "one", "overall_score": 1.5}, {"response": "two", "overall_score": 3}]}
        for n in range(12)
    ],
    "scored": [
        {"prompt": f"Say {n // 2}.", "response": f"It is {n}.", "helpfulness": n % 5}
        for n in range(24)
    ],
    "kto": [
        {"prompt": f"Say {n}.", "completion": f"It is {n}.", "label": n % 3 > 0} for n in range(12)
    ],
    "instruction": [
        {"instruction": f"Say {n}.", "input": "" if n % 2 else "Loud.", "output": f"It is {n}.",
         "history": [["Hi", "Hello."]], "system": "Be brief."}
        for n in range(12)
    ],
    "messages": [
        {"messages": [
            {"role": "user", "content": f"2+{n}?"},
            {"role": "assistant", "content": None, "tool_calls": [
                {"type": "function", "function": {"name": "add", "arguments": {"a": n}}}]},
            {"role": "tool", "content": "4", "name": "add"},
            {"role": "assistant", "content": [{"type": "text", "text": "Four."}], "weight": 1}]}
        for n in range(12)
    ],
    "conversations": [
        {"system": "Be brief.", "conversations": [
            {"from": "human", "value": f"Name {n}."}, {"from": "gpt", "value": "Ann"}]}
        for n in range(12)
    ],
    "tldr_post": [
        {"id": str(n), "subreddit": "tea", "title": f"Cup {n}", "post": "It was cold.",
         "summary": "cold tea"}
        for n in range(12)
    ],
}  # fmt: skip


CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ m.tool_calls | default('') }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def chat_tokenizer(world_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """One that writes turns of tools as well."""
    tokenizer = copy.deepcopy(world_tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def as_table(records: list[Any]) -> str:
    """The records as CSV, as far as they are objects; what is no text is written as JSON."""
    rows = [record for record in records if isinstance(record, dict)]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    table = csv.writer(out)
    table.writerow(columns)
    for row in rows:
        cells = (row.get(name, "") for name in columns)
        table.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
    return out.getvalue()


@pytest.mark.parametrize("form", RECORDS)
def test_damaged_data(form: str, tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    sound = RECORDS[form]

    @fuzzed
    @given(st.data())
    def read(data: st.DataObject) -> None:
        draw = data.draw
        records = mutated(draw, sound)
        suffix = draw(st.sampled_from([".jsonl", ".json", ".jsonl.gz", ".csv"]))
        file = tmp_path / f"records{suffix}"
        if suffix == ".json":
            text = json.dumps(records, ensure_ascii=draw(st.booleans()))
        elif suffix == ".csv":
            text = as_table(records)
        else:
            text = "".join(json.dumps(record) + "\n" for record in records)
        content = text.encode("utf-8", "surrogatepass")
        if suffix.endswith(".gz"):
            content = gzip.compress(content, compresslevel=1)
        file.write_bytes(bruised(draw, content))
        stage = draw(st.sampled_from(STAGES))
        try:
            settings = DataSettings(
                sources=[str(file)],
                train_on=draw(st.sampled_from(["all", "last"])),
                on_bad_record=draw(st.sampled_from(["stop", "skip"])),
                cache_dir=str(tmp_path / "ids"),
            )
            found = read_records(settings, stage)
            tokenize(found, chat_tokenizer, settings, stage)
        except UserError as error:
            explained(error, file)
            OUTCOMES["data refused"] += 1
            return
        for record in [*found.train[:2], *found.eval[:1]]:
            rendered = render_prompt(record.prompt, chat_tokenizer)
            assert encode_prompts([rendered], chat_tokenizer)[0]
            assert all(encode_responses(list(record.responses), chat_tokenizer))
        OUTCOMES["data accepted"] += 1

    read()
