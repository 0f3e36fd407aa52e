"""Chat templates from the config: bundled or a file, with values that stay with the model."""

import copy
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from training.data import encode_prompts, encode_responses, render_prompt, response_frame
from training.data.chat_template import ChatTemplate, bundled_names, with_defaults
from training.errors import UserError
from training.models.pretrained import Pretrained
from training.world.base_model import build_tokenizer

DIALOGUE = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Tree?"},
)
SYSTEM = {"role": "system", "content": "Be brief."}
THINKING = (
    "\n{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    "{% endif %}"
)
EXPECTED = {
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello.</s>\n\n"
    "### Instruction:\nTree?\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nTree?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "llama-3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nTree?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Hello.</s>[INST] Tree? [/INST]",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello.</s>\n"
    "<|user|>\nTree?</s>\n<|assistant|>\n",
}


def templated(source: str | None, variables: dict | None = None, text: str | None = None):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = text
    ChatTemplate(source, variables or {}).apply(tokenizer, "owner/model")
    return tokenizer


def test_all_bundled_templates_are_expected() -> None:
    assert bundled_names() == sorted(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_bundled_templates_write_what_their_models_read(name: str) -> None:
    tokenizer = templated(name)
    assert render_prompt((SYSTEM, *DIALOGUE), tokenizer) == EXPECTED[name]
    before, _ = response_frame((SYSTEM, *DIALOGUE), tokenizer)
    assert before.strip() == EXPECTED[name].strip()


def test_a_file_and_its_faults(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert render_prompt(DIALOGUE, templated(str(file))) == "[Hi][Hello.][Tree?]"
    file.write_text("{% for m in messages %}\n{% endif %}")
    with pytest.raises(UserError, match=r"chat_template: .*mine\.jinja, line 2: "):
        templated(str(file))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"mine\.jinja is unreadable"):
        templated(str(file))
    (fault,) = ChatTemplate("chatlm").faults()
    assert fault == (
        "chat_template: 'chatlm' is neither a file nor one of alpaca, chatml, llama-3, mistral, "
        "zephyr"
    )
    assert ChatTemplate("chatml", {"enable_thinking": True}).faults() == []
    assert len(ChatTemplate(None, {"messages": 1, "a b": 1}).faults()) == 2


def test_values_of_variables_stay_with_the_saved_model(tmp_path: Path) -> None:
    quiet = templated(None, {"enable_thinking": False}, THINKING)
    expected = "\n<user>Tree?\n<assistant><think></think>"
    assert render_prompt(DIALOGUE[2:], quiet) == expected
    quiet.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    message = [dict(DIALOGUE[2])]
    for tokenizer in (quiet, loaded):
        written = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        assert written == expected
        # A program that asks for another value gets it.
        asked = tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        assert asked == "\n<user>Tree?\n<assistant>"
    again = copy.deepcopy(loaded)
    ChatTemplate(None, {"enable_thinking": False}).apply(again, "m")
    assert again.chat_template == loaded.chat_template
    assert render_prompt(DIALOGUE[2:], templated(None, {}, THINKING)) == (
        "\n<user>Tree?\n<assistant>"
    )


@pytest.mark.parametrize(
    "value", [None, True, 3, -0.5, "it's {{ a }} “ü” 🏞️\n\\", ["a", {"b": None}]]
)
def test_any_json_is_a_value(value: object) -> None:
    tokenizer = templated(None, {"given": value}, "{{ given | tojson }}")
    expected = templated(None, {}, "{{ given | tojson }}")
    rendered = expected.apply_chat_template([dict(DIALOGUE[0])], tokenize=False, given=value)
    assert render_prompt(DIALOGUE[:1], tokenizer) == rendered


def test_a_variable_that_the_template_does_not_have() -> None:
    with pytest.raises(UserError) as caught:
        templated(None, {"enable_thinkin": False}, THINKING)
    assert str(caught.value) == (
        "chat_template_kwargs: the chat template of owner/model has no variable 'enable_thinkin'; "
        "did you mean 'enable_thinking'?"
    )
    with pytest.raises(UserError, match="owner/model has no chat template"):
        templated(None, {"enable_thinking": False})


def test_training_marks_are_no_fault() -> None:
    marked = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    tokenizer = templated(None, {"a": 1}, marked + "{{ a }}")
    assert render_prompt(DIALOGUE[:1], tokenizer) == "Hi1"
    assert with_defaults("x", {}).endswith("x")


def test_a_stages_tokenizer_has_the_configs_template(tiny_world: Path) -> None:
    base = str(tiny_world / "base")
    tokenizer = Pretrained(base, template=ChatTemplate("zephyr")).tokenizer
    (prompt,) = encode_prompts([render_prompt(DIALOGUE[:1], tokenizer)], tokenizer)
    (response,) = encode_responses(["Oak"], tokenizer)
    assert prompt.count(tokenizer.bos_token_id) == 1
    assert response[-1] == tokenizer.eos_token_id
    assert Pretrained(base).tokenizer.chat_template is None
