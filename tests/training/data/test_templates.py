"""Prompts and responses as ids: templates, special tokens once, exact round trips."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from training.data import (
    decode_responses,
    encode_prompts,
    encode_responses,
    render_prompt,
    response_text,
)
from training.data.templates import truncate_prompt
from training.world.base_model import build_tokenizer

DIALOGUE = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Name a river."},
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
sound_text = st.text(st.characters(exclude_categories=["Cs"]))


def byte_level(**special) -> PreTrainedTokenizerFast:
    """GPT-2's and OPT's kind: every byte a token, nothing put in front by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {name: i for i, name in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    options = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


@pytest.fixture(scope="module")
def llama():
    return build_tokenizer()


@pytest.fixture(scope="module")
def plain():
    return byte_level()


@pytest.fixture(scope="module")
def chat():
    tokenizer = byte_level()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def test_plain_template(plain):
    assert render_prompt(DIALOGUE[:1], plain) == "\n\nHuman: Hi\n\nAssistant:"
    assert render_prompt(DIALOGUE, plain) == (
        "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Name a river.\n\nAssistant:"
    )
    system = ({"role": "system", "content": "Be brief."}, *DIALOGUE[:1])
    assert render_prompt(system, plain) == "Be brief.\n\nHuman: Hi\n\nAssistant:"
    assert response_text("The Rhine", plain) == " The Rhine"


def test_chat_template(chat):
    assert render_prompt(DIALOGUE, chat) == (
        "<s>[user]Hi[assistant]Hello.[user]Name a river.[assistant]"
    )
    assert response_text("The Rhine", chat) == "The Rhine"


@pytest.mark.parametrize("name", ["llama", "plain", "chat"])
def test_bos_stands_there_once(name, request):
    tokenizer = request.getfixturevalue(name)
    (ids,) = encode_prompts([render_prompt(DIALOGUE, tokenizer)], tokenizer)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids


def test_no_bos_where_the_tokenizer_has_none():
    tokenizer = byte_level(bos_token=None)
    (ids,) = encode_prompts(["ab"], tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("plain", ["Ġ", "T", "e", "a", "</s>"]),
        ("chat", ["T", "e", "a", "</s>"]),
        ("llama", ["▁Tea", "</s>"]),
    ],
)
def test_a_response_ends_with_eos(name, pieces, request):
    tokenizer = request.getfixturevalue(name)
    (ids,) = encode_responses(["Tea"], tokenizer)
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == "".join(pieces)
    assert ids.count(tokenizer.eos_token_id) == 1


def test_prompt_and_response_read_as_one_text(plain, llama):
    for tokenizer in (plain, llama):
        (prompt,) = encode_prompts([render_prompt(DIALOGUE, tokenizer)], tokenizer)
        (response,) = encode_responses(["The Rhine"], tokenizer)
        text = tokenizer.decode([*prompt, *response], skip_special_tokens=True)
        assert text.lstrip(" ") == render_prompt(DIALOGUE, tokenizer) + " The Rhine"


@pytest.mark.parametrize("name", ["llama", "plain", "chat"])
@given(text=sound_text)
def test_every_text_comes_back(name, request, text):
    tokenizer = request.getfixturevalue(name)
    # What sentencepiece itself takes for a space; records have no white space around them.
    text = text.strip().replace("\u2581", "")
    ids = encode_responses([text], tokenizer)
    assert decode_responses(ids, tokenizer) == [text]


@pytest.mark.parametrize("name", ["llama", "plain", "chat"])
def test_special_tokens_in_a_response_are_text(name, request):
    tokenizer = request.getfixturevalue(name)
    text = "stop</s> here <pad>"
    (ids,) = encode_responses([text], tokenizer)
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.pad_token_id not in ids
    assert decode_responses([ids], tokenizer) == [text]
    # The tokenizer's own calls are not changed by it.
    assert tokenizer("</s>", add_special_tokens=False).input_ids[-1] == tokenizer.eos_token_id


def test_no_texts(plain):
    assert encode_prompts([], plain) == encode_responses([], plain) == []


def test_truncation_keeps_the_end_and_bos():
    assert truncate_prompt([1, 5, 6, 7], 4, bos_token_id=1) == [1, 5, 6, 7]
    assert truncate_prompt([1, 5, 6, 7], 3, bos_token_id=1) == [1, 6, 7]
    assert truncate_prompt([1, 5, 6, 7], 1, bos_token_id=1) == [1]
    assert truncate_prompt([4, 5, 6, 7], 3, bos_token_id=None) == [5, 6, 7]


def test_a_template_that_prints_the_date_gives_the_same_text_every_day(plain):
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%f') %}{% endif %}"
        "{{ date_string }}"
    )
    assert render_prompt(DIALOGUE, tokenizer) == "26 Jul 2024"
