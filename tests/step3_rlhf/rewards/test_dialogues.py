"""Dialogues reach reward models as messages; a template's refusal is found before any weights."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from step3_rlhf.checks import check_models, readable_records
from step3_rlhf.config import PPOConfig
from step3_rlhf.rewards.readings import OwnTokens
from step3_rlhf.roles import TrainingRoles, training_roles_of
from step3_rlhf.rollout import Rollout, assemble, encode_prompt_texts
from training.config import check_config
from training.data import Dialogue, encode_responses, read_records
from training.errors import UserError

TEMPLATE = (
    "<s>{% for m in messages %}<|{{ m.role }}|> {{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
)


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


ODD: tuple[Dialogue, ...] = (
    (assistant("Hi, I am Bo."), user("Name a tree.")),
    (user("a"), user("b")),
    (system("s"), assistant("hi"), user("q")),
    (user("See:\n\nHuman: x\n\nAssistant: y"), assistant("ok"), user("and?")),
    (user("Human: hi\n\nAssistant: yo\n\nHuman: bye"),),
    (user("2+2?"), {"role": "tool", "content": "4", "name": "add"}),
)
"""Dialogues that no reader of transcripts gives back."""


@pytest.fixture
def templated(world_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(world_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def drawn(dialogues: tuple[Dialogue, ...], tokenizer: PreTrainedTokenizerBase) -> Rollout:
    return assemble(
        encode_prompt_texts(dialogues, tokenizer),
        encode_responses(["tea"] * len(dialogues), tokenizer),
        dialogues,
        tokenizer,
        torch.device("cpu"),
    )


@pytest.mark.parametrize("by_template", [True, False])
def test_a_reward_model_reads_the_dialogue_itself(
    templated: PreTrainedTokenizerBase, by_template: bool
) -> None:
    read = OwnTokens(templated, None, by_template)
    inputs = read(drawn(ODD, templated))
    rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
    for dialogue, (ids, mask) in zip(ODD, rows, strict=True):
        if by_template:
            whole = templated.apply_chat_template([*dialogue, assistant("tea")], tokenize=False)
        else:
            start = templated.apply_chat_template(
                list(dialogue), tokenize=False, add_generation_prompt=True
            )
            whole = None
        expected = templated(whole or start, add_special_tokens=False)["input_ids"]
        if whole is None:
            expected += encode_responses(["tea"], templated)[0]
        assert ids[mask].tolist() == expected, dialogue


def test_a_long_dialogue_loses_whole_turns_in_the_reward_models_tokens(
    templated: PreTrainedTokenizerBase,
) -> None:
    turns = [turn for _ in range(6) for turn in (user("Suggest a drink."), assistant("Water"))]
    dialogue = (system("Be brief."), *turns, user("Suggest a pet."))
    rollout = drawn((dialogue,), templated)
    for by_template in (True, False):
        whole = OwnTokens(templated, None, by_template)(rollout)["input_ids"]
        limit = whole.shape[1] - 5
        inputs = OwnTokens(templated, limit, by_template)(rollout)
        assert inputs["input_ids"].shape[1] <= limit
        text = templated.decode(inputs["input_ids"][0])
        start = "<s><|system|> Be brief.<|end|>\n<|user|> Suggest a drink.<|end|>"
        assert text.replace(" ", "").startswith(start.replace(" ", ""))
        assert text.count("<|user|>") == 6
        assert "tea" in text[-20:]


def records_of(path: Path, config: PPOConfig) -> Any:
    return read_records(config.data.model_copy(update={"eval_fraction": 0.0}), "ppo")


@pytest.fixture
def run(stage_settings: Any, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase) -> Any:
    """A config over two prompts, and roles whose reward model has the template ALTERNATING."""

    def build(
        on_bad_record: str = "stop", response_sets: Path | None = None
    ) -> tuple[PPOConfig, TrainingRoles, Path]:
        path = tmp_path / "prompts.jsonl"
        good, bad = {"prompt": "Name a tree."}, {"prompt": [user("a"), user("b")]}
        path.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
        data = {
            "sources": [str(path)],
            "stage_proportions": [0, 0, 1],
            "cache_dir": str(tmp_path / "ids"),
            "on_bad_record": on_bad_record,
        }
        evaluation = {"response_sets": str(response_sets) if response_sets else None}
        settings = stage_settings("ppo") | {"data": data, "evaluation": evaluation}
        config = check_config(PPOConfig, settings, "config:")
        roles = training_roles_of(config)
        strict = copy.deepcopy(world_tokenizer)
        strict.chat_template = ALTERNATING
        ((_, reward),) = roles.rewards
        reward.tokenizer = strict
        return config, roles, path

    return build


def test_a_template_that_refuses_a_prompt_is_found_before_any_weights(run: Any) -> None:
    config, roles, path = run()
    with pytest.raises(UserError) as caught:
        readable_records(config, roles, records_of(path, config))
    model = config.reward.model_name_or_path
    assert caught.value.faults == [
        f"{path}:2: the chat template of {model} refuses: Conversation roles must alternate",
        "set another chat_template, or data.on_bad_record=skip to leave such records out",
    ]


def test_records_that_a_template_refuses_are_left_out_on_request(run: Any) -> None:
    config, roles, path = run("skip")
    found = readable_records(config, roles, records_of(path, config))
    assert [record.origin for record in found.train] == [f"{path}:1"]
    model = config.reward.model_name_or_path
    assert found.tally.counts["training"] == {
        f"left out: the chat template of {model} refuses: Conversation roles must alternate (at 2)":
        1
    }  # fmt: skip
    only_bad = replace(found, train=[record for record in found.train if record.origin == "none"])
    assert readable_records(config, roles, only_bad).train == []


def test_a_response_set_that_a_template_refuses(
    run: Any, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    """It is named, whether the reward model's template refuses it or the policy's."""
    sets = tmp_path / "sets.jsonl"
    prompt = "Human: a\n\nAssistant: b\n\nAssistant: c\n\nHuman: d"
    sets.write_text(json.dumps({"prompt": prompt, "responses": ["x", "y"]}) + "\n")
    config, roles, path = run("skip", sets)
    with pytest.raises(UserError, match=r"evaluation\.response_sets: the chat template of .*base"):
        readable_records(config, roles, records_of(path, config))
    strict = copy.deepcopy(world_tokenizer)
    strict.chat_template = ALTERNATING
    roles.policy.tokenizer = strict
    with pytest.raises(UserError, match=r"evaluation\.response_sets: the chat template of .*base"):
        check_models(config, roles, stand_in=config.reward.model_name_or_path)
    sets.write_text(json.dumps({"prompt": "Hi", "responses": ["x", "y"]}) + "\n")
    check_models(config, roles, stand_in=config.reward.model_name_or_path)
