"""What users of similar tools reported about data and templates, each with the right value.

Every test names a public report; the inputs are rebuilt small.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerBase

from training.config import check_config
from training.data import (
    DataSettings,
    StageRecords,
    Tally,
    encode_prompts,
    encode_responses,
    read_records,
    render_prompt,
    tokenize,
)
from training.data.fields import RecordFault, Unusable
from training.data.formats import Record, check_usable, parse_record
from training.errors import UserError
from training.world.base_model import build_tokenizer

ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def parsed(raw: dict[str, Any], stage: Any = "sft") -> Record:
    return check_usable(parse_record(raw, "x:1", stage), stage)


def templated(template: str | dict[str, str]) -> PreTrainedTokenizerBase:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def read(path: Path, **options: Any) -> StageRecords:
    data = {"sources": [str(path)], "stage_proportions": [1, 0, 0], "eval_fraction": 0.0}
    settings = data | {"cache_dir": str(path.parent / "ids")} | options
    return read_records(check_config(DataSettings, settings, "bad:"), "sft")


def sft_texts(
    records: StageRecords, tokenizer: PreTrainedTokenizerBase, path: Path, **options: Any
) -> list[tuple[str, str]]:
    data = {"sources": [str(path)], "cache_dir": str(path.parent / "ids"), **options}
    settings = check_config(DataSettings, data, "bad:")
    rows = tokenize(records, tokenizer, settings, "sft").train
    return [(tokenizer.decode(r["prompt_ids"]), tokenizer.decode(r["response_ids"])) for r in rows]


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_a_system_turn_in_a_column_of_its_own() -> None:
    """huggingface/trl 2385: `system` as messages was ignored, and `rejected` said "user"."""
    row = {
        "system": [{"role": "system", "content": "Be brief."}],
        "prompt": [user("Tree?")],
        "chosen": [assistant("Oak")],
        "rejected": [assistant("Moss")],
    }
    assert parsed(row, "reward").prompt == (
        {"role": "system", "content": "Be brief."},
        user("Tree?"),
    )
    with pytest.raises(Unusable, match="does not end with the assistant's turn"):
        parsed(row | {"rejected": [user("Moss")]}, "reward")
    with pytest.raises(RecordFault, match="'system' is int"):
        parsed(row | {"system": 5}, "reward")


def test_function_calls_in_sharegpt() -> None:
    """hiyouga/LlamaFactory 2529: "Invalid role tag" on glaive-function-calling."""
    call = '{"name": "add", "arguments": {"a": 2, "b": 2}}'
    turns = [("human", "2+2?"), ("function_call", call), ("observation", "4"), ("gpt", "Four.")]
    record = parsed({"conversations": [{"from": a, "value": b} for a, b in turns]})
    assert [turn["role"] for turn in record.prompt] == ["user", "assistant", "tool"]
    assert record.prompt[1]["tool_calls"][0]["function"] == json.loads(call)
    assert record.responses == ("Four.",)


@pytest.mark.parametrize("names", [("human", "gpt"), ("user", "assistant"), ("Human", "GPT")])
def test_speakers_under_any_of_their_names(names: tuple[str, str]) -> None:
    """hiyouga/LlamaFactory 8197: entries whose speaker is "user" were skipped as invalid."""
    turns = [{"from": names[0], "value": "Tree?"}, {"from": names[1], "value": "Oak"}]
    record = parsed({"conversation": turns})
    assert (record.prompt, record.responses) == ((user("Tree?"),), ("Oak",))


def test_one_speaker_several_times_in_a_row(tmp_path: Path) -> None:
    """hiyouga/LlamaFactory 2962, 10178: real dialogues do not alternate; only a template may mind.

    huggingface/smol-course 260: user/assistant/user/user, and a template that does mind.
    """
    turns = [user("Hi"), user("Are you there?"), assistant("Yes."), assistant("What is it?")]
    path = write(
        tmp_path / "a.jsonl", {"messages": [user("Tree?"), assistant("Oak")]}, {"messages": turns}
    )
    records = read(path)
    assert (records.train[1].prompt, records.train[1].responses) == (tuple(turns[:2]), ("Yes.",))
    assert records.tally.counts[str(path)] == {
        "read": 2,
        "answers not learned: weight 0, tool calls, thoughts, or no question before": 1,
        "used by sft": 2,
    }
    permissive = templated("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    texts = sft_texts(records, permissive, path)
    assert texts[1][0].removeprefix("<s>").strip() == "[user]Hi[user]Are you there?"
    with pytest.raises(UserError) as caught:
        sft_texts(records, templated(ALTERNATING), path)
    assert caught.value.faults[0] == (
        f"{path}:2: the chat template refuses the dialogue: "
        "Conversation roles must alternate user/assistant/..."
    )
    assert len(sft_texts(records, templated(ALTERNATING), path, on_bad_record="skip")) == 1


def test_the_loss_is_on_all_of_an_answer_and_on_nothing_else(tmp_path: Path) -> None:
    """axolotl 2089, 3088: labels missed parts of answers, or everything, with thoughts in them."""
    thought = "<think>Tall.</think>Oak"
    turns = [user("Tree?"), assistant(thought), user("Stone?"), assistant("<think></think>Slate")]
    path = write(tmp_path / "a.jsonl", {"messages": turns})
    texts = sft_texts(read(path), templated(FORGETFUL), path)
    # Each answer whole, with its end; a template that forgets old thoughts forgets them in
    # prompts only, as when the model is asked.
    assert [answer for _, answer in texts] == [f"{thought}</s>", "<think></think>Slate</s>"]
    prompts = [prompt.removeprefix("<s>").replace(" ", "") for prompt, _ in texts]
    assert prompts == [
        "[user]Tree?</s>[assistant]",
        "[user]Tree?</s>[assistant]Oak</s>[user]Stone?</s>[assistant]",
    ]


def test_pairs_that_are_equal_within_the_limit_are_counted_out(tmp_path: Path) -> None:
    """OpenRLHF 1311: pairs that differ only beyond the cut were trained on."""
    pair = {"prompt": "Tree?", "chosen": "an oak or two", "rejected": "an oak or ten"}
    settings = check_config(
        DataSettings,
        {"sources": ["a/b"], "max_response_length": 3, "cache_dir": str(tmp_path)},
        "bad:",
    )
    other = parsed({"prompt": "Tree?", "chosen": "Oak", "rejected": "Moss"}, "reward")
    records = StageRecords([parsed(pair, "reward"), other], [], Tally())
    found = tokenize(records, build_tokenizer(), settings, "reward")
    assert len(found.train) == 1
    assert found.tally.count("dropped: responses identical up to max_response_length") == 1


def test_with_or_without_a_prompt_the_pair_is_the_same() -> None:
    """OpenRLHF 909: without `prompt` the responses were other ones than with it."""
    asked, good, bad = user("Tree?"), assistant("Oak"), assistant("Moss")
    forms = [
        {"prompt": [asked], "chosen": [good], "rejected": [bad]},
        {"chosen": [asked, good], "rejected": [asked, bad]},
        {"prompt": [asked], "chosen": [asked, good], "rejected": [asked, bad]},
        {"prompt": "Tree?", "chosen": [asked, good], "rejected": [asked, bad]},
        {"prompt": "Tree?", "chosen": "Oak", "rejected": "Moss"},
        {"prompt": asked, "chosen": good, "rejected": bad},
    ]
    for form in forms:
        record = parsed(form, "reward")
        assert (record.prompt, record.responses) == ((asked,), ("Oak", "Moss")), form


def test_a_cut_dialogue_keeps_its_answer_its_system_turn_and_its_headers(tmp_path: Path) -> None:
    """verl 6372: left truncation kept the beginning, and the answer's loss was gone."""
    turns = [
        {"role": "system", "content": "Be brief."},
        *[turn for _ in range(12) for turn in (user("Suggest a drink."), assistant("Tea"))],
        user("Suggest a pet."),
        assistant("A cat"),
    ]
    path = write(tmp_path / "a.jsonl", {"messages": turns})
    tokenizer = templated(
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ((prompt, answer),) = sft_texts(
        read(path, train_on="last"), tokenizer, path, max_prompt_length=64
    )
    assert answer == "A cat</s>"
    assert prompt.startswith("<s><system>Be brief.\n<user>Suggest a drink.\n<assistant>Tea\n")
    assert prompt.endswith("<user>Suggest a pet.\n<assistant>")
    assert prompt.count("<user>") == prompt.count("<assistant>")
    assert prompt.count("<user>") < 13


def test_tool_calls_from_parquet_have_no_keys_of_other_rows(tmp_path: Path) -> None:
    """verl 1889: Arrow gives each row the keys of all rows, and templates wrote them as null."""

    def row(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        turns = [
            user("?"),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "4"},
            assistant("Four."),
        ]
        return {"messages": turns}

    rows = [row("add", {"a": 2}), row("find", {"query": "oak"})]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = read(path).train
    calls = [record.prompt[1]["tool_calls"][0]["function"] for record in found]
    assert calls == [
        {"name": "add", "arguments": {"a": 2}}, {"name": "find", "arguments": {"query": "oak"}}
    ]  # fmt: skip
    assert set(found[0].prompt[0]) == {"role", "content"}


def test_messages_stored_as_json_texts() -> None:
    """Data sets on the Hub that keep `messages` in a column of texts."""
    turns = [user("Tree?"), assistant("Oak")]
    assert parsed({"messages": json.dumps(turns)}) == parsed({"messages": turns})
    with pytest.raises(RecordFault, match="no JSON list of messages"):
        parsed({"messages": "[Tree?"})


def test_a_tokenizer_with_several_templates() -> None:
    """Command-R, Hermes: {"default", "tool_use"}; huggingface/trl and others took it for one."""
    template = "[{{ messages[0].content }}]{% if add_generation_prompt %}>{% endif %}"
    tokenizer = templated({"default": template, "tool_use": "tools"})
    assert render_prompt([user("Tree?")], tokenizer) == "[Tree?]>"


def test_one_beginning_whoever_writes_it() -> None:
    """The doubled BOS of templates that write it, with tokenizers that add it (many reports)."""
    for template in ("{{ bos_token }}{{ messages[0].content }}", "{{ messages[0].content }}"):
        tokenizer = templated(template)
        (ids,) = encode_prompts([render_prompt([user("Tree?")], tokenizer)], tokenizer)
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id


def test_a_template_that_wants_parts_is_refused_with_its_record(tmp_path: Path) -> None:
    """Templates of image models take `content[0].text` only: a refusal, not a traceback."""
    path = write(tmp_path / "a.jsonl", {"messages": [user("Tree?"), assistant("Oak")]})
    parts = templated("{% for m in messages %}{{ m.content[0]['text'] + '' + none }}{% endfor %}")
    with pytest.raises(UserError, match=r"a\.jsonl:1: the chat template refuses the dialogue: "):
        sft_texts(read(path), parts, path)


def test_a_dialogue_that_the_model_opens() -> None:
    """ShareGPT's dialogues often begin with the model; its first turn answers nothing."""
    turns = [assistant("Hello!"), user("Tree?"), assistant("Oak")]
    record = parsed({"messages": turns})
    assert (record.prompt, record.responses) == (tuple(turns[:2]), ("Oak",))
    tokenizer = build_tokenizer()
    assert render_prompt(record.prompt, tokenizer) == (
        "\n\nAssistant: Hello!\n\nHuman: Tree?\n\nAssistant:"
    )
    assert encode_responses(["Oak"], tokenizer)[0][-1] == tokenizer.eos_token_id
    with pytest.raises(Unusable, match="an empty prompt"):
        parsed({"messages": turns[:1]})
