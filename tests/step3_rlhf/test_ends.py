"""Whatever ends a response ends it, is counted as its end, and one of them is learned.

Seen elsewhere: TRL #2387 (generation without an end), google/tunix #842 and lighteval #1278 (Gemma
ends turns with <end_of_turn>, its tokenizer's EOS is <eos>), mlx-vlm #2112 (a generation config
that lists another token replaced the tokenizer's EOS), axolotl #3754 (the template's end was never
learned), TRL #2059 (a chat format was added and its end was not).
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from step3_rlhf.config import SamplingSettings
from step3_rlhf.rewards.readings import OwnTokens, reading
from step3_rlhf.rollout import Rollout, assemble, encode_prompt_texts, sample
from training.data import encode_prompts, encode_responses, render_prompt, response_end
from training.models.export import export
from training.models.loading import load_policy
from training.models.options import LoadOptions
from training.models.pretrained import Pretrained

TURN = "<end_of_turn>"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}" + TURN + "\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CPU = torch.device("cpu")


@pytest.fixture
def chat(world_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """As Gemma: the template ends a turn with another special token than EOS."""
    tokenizer = copy.deepcopy(world_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def constant_model(
    directory: Path, tokenizer: PreTrainedTokenizerBase, token: int, listed: Any = "missing"
) -> str:
    """A model that says `token` whatever came before.

    Args:
        listed: the generation config's `eos_token_id`.
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=4, max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    with torch.no_grad():  # every embedding is the same vector, and the head's row of `token` too
        direction = torch.ones(32)
        model.model.embed_tokens.weight.copy_(direction.expand_as(model.model.embed_tokens.weight))
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = direction
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink()
    if listed != "missing":
        GenerationConfig(eos_token_id=listed).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def one_response(path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Rollout, tuple[int, ...]]:
    policy = load_policy(Pretrained(path), tokenizer).eval()
    prompts = encode_prompt_texts(["Hi"], tokenizer)
    rollout = sample(
        policy, tokenizer, prompts, ["Hi"], [(1, 0)], SamplingSettings(response_length=12)
    )
    return rollout, policy.ends


def test_the_chat_templates_end_of_turn_ends_a_response(
    chat: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where no generation config names it."""
    turn, eos = chat.convert_tokens_to_ids(TURN), chat.eos_token_id
    rollout, ends = one_response(constant_model(tmp_path, chat, turn), chat)
    assert ends == (turn, eos)
    assert rollout.lengths.tolist() == [1]
    assert rollout.ended.tolist() == [True]
    assert rollout.response_mask.tolist() == [[True]]
    assert rollout.input_ids[0, -1] == turn
    assert rollout.responses == ("",)
    said = capsys.readouterr().out
    assert f"a response ends with '{TURN}', as in training data, or with '</s>'" in said


def test_eos_ends_a_response_beside_what_the_generation_config_lists(
    chat: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """A list without the tokenizer's EOS adds to it, and does not replace it."""
    turn = chat.convert_tokens_to_ids(TURN)
    path = constant_model(tmp_path, chat, chat.eos_token_id, listed=[turn])
    rollout, ends = one_response(path, chat)
    assert set(ends) == {turn, chat.eos_token_id}
    assert (rollout.lengths.tolist(), rollout.ended.tolist()) == ([1], [True])


@pytest.mark.parametrize("as_list", [False, True])
def test_an_end_that_is_no_special_token(
    world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, as_list: bool
) -> None:
    """It is not a part of the text, as EOS is not."""
    word = 300
    path = constant_model(tmp_path, world_tokenizer, word, listed=[2, word] if as_list else word)
    rollout, ends = one_response(path, world_tokenizer)
    assert ends == (2, word)
    assert (rollout.lengths.tolist(), rollout.ended.tolist()) == ([1], [True])
    assert rollout.responses == ("",)


def test_other_tokens_end_nothing(world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rollout, ends = one_response(constant_model(tmp_path, world_tokenizer, 300), world_tokenizer)
    assert ends == (2,)
    assert (rollout.lengths.tolist(), rollout.ended.tolist()) == ([12], [False])


def test_a_default_of_the_models_class_is_no_end(tmp_path: Path, world_tokenizer) -> None:
    """A Llama whose config does not speak of ends has 2, whatever its tokenizer has there."""
    path = Path(constant_model(tmp_path, world_tokenizer, 300))
    model = LlamaForCausalLM.from_pretrained(path)
    model.config.eos_token_id = 300
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(path)
    assert load_policy(Pretrained(str(path)), world_tokenizer).ends == (2,)
    (path / "generation_config.json").unlink()
    assert load_policy(Pretrained(str(path)), world_tokenizer).ends == (2,)


def test_several_ends_in_the_models_own_config(tmp_path: Path, world_tokenizer) -> None:
    """As Llama 3's config.json: a list is no default."""
    path = Path(constant_model(tmp_path, world_tokenizer, 300))
    model = LlamaForCausalLM.from_pretrained(path)
    model.config.eos_token_id = [2, 300]
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(path)
    (path / "generation_config.json").unlink()
    rollout, ends = one_response(str(path), world_tokenizer)
    assert (ends, rollout.lengths.tolist()) == ((2, 300), [1])


def test_ends_without_a_token_are_left_out(tmp_path: Path, world_tokenizer) -> None:
    n = len(world_tokenizer)
    path = constant_model(tmp_path, world_tokenizer, 300, listed=[2, n + 5])
    assert load_policy(Pretrained(path), world_tokenizer).ends == (2,)


def test_the_pad_token_may_be_an_end(chat: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """As Qwen2.5's <|endoftext|>; where it is drawn it is a token of the response."""
    pad = chat.pad_token_id
    path = constant_model(tmp_path, chat, pad, listed=[chat.eos_token_id, pad])
    rollout, _ = one_response(path, chat)
    assert (rollout.lengths.tolist(), rollout.ended.tolist()) == ([1], [True])
    assert rollout.attention_mask[0, -1] == 1


class Numbers:
    """Ids are their own texts; 2, 3 and 9 are special."""

    pad_token_id, eos_token_id = 3, 2

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(str(i) for i in row if i not in {2, 3, 9}) for row in rows]


def test_the_first_end_of_any_kind_is_a_responses_last_token() -> None:
    rollout = assemble(
        [[5]] * 4,
        [[7, 9, 2, 8], [7, 2, 9, 8], [7, 30, 8, 2], [7, 8, 8, 8]],
        ["p"] * 4, Numbers(), CPU, ends=(9, 2, 30),
    )  # fmt: skip
    assert rollout.response_mask.sum(-1).tolist() == [2, 2, 2, 4]
    assert rollout.ended.tolist() == [True, True, True, False]
    assert rollout.input_ids[:, 1:3].tolist() == [[7, 9], [7, 2], [7, 30], [7, 8]]
    assert rollout.responses == ("7", "7", "7", "7 8 8 8")


# What is learned


@pytest.mark.parametrize(
    ("after", "learned"),
    [
        (TURN + "\n", TURN),  # Gemma
        ("\n" + TURN, TURN),
        (TURN + "</s>", TURN),  # Phi-3: the end of the turn, then that of the text
        ("</s>", "</s>"),  # Llama 2, Mistral
        (" </s>\n", "</s>"),
        ("</s>" + TURN, "</s>"),
        ("\n", "</s>"),
        ("", "</s>"),
        ("### End\n", "</s>"),  # spelt with ordinary tokens
    ],
)
def test_the_end_that_is_learned(chat: PreTrainedTokenizerBase, after: str, learned: str) -> None:
    chat.chat_template = TEMPLATE.replace(TURN + "\n", after)
    end = chat.convert_tokens_to_ids(learned)
    assert response_end(chat) == end
    assert [ids[-1] for ids in encode_responses(["tea", "no"], chat)] == [end, end]
    assert all(ids.count(end) == 1 for ids in encode_responses(["tea", f"no {learned}"], chat))


def test_templates_that_say_nothing_of_answers(chat: PreTrainedTokenizerBase) -> None:
    eos = chat.eos_token_id
    chat.chat_template = "{{ raise_exception('only with a system message') }}"
    assert response_end(chat) == eos
    chat.chat_template = "<s>[user]{{ messages[0].content }}" + TURN  # shows no answer
    assert response_end(chat) == eos
    chat.chat_template = None
    assert response_end(chat) == eos


def test_models_without_a_template_learn_what_they_learned(
    world_tokenizer: PreTrainedTokenizerBase,
) -> None:
    (ids,) = encode_responses(["green tea"], world_tokenizer)
    assert ids[-1] == world_tokenizer.eos_token_id == 2
    assert ids.count(2) == 1


def test_training_data_is_the_beginning_of_what_the_template_writes(
    chat: PreTrainedTokenizerBase,
) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    (prompt,) = encode_prompts([render_prompt(messages, chat)], chat)
    (response,) = encode_responses(["tea"], chat)
    whole = chat.apply_chat_template(
        [*messages, {"role": "assistant", "content": "tea"}], tokenize=False
    )
    text = chat.decode(prompt[1:] + response).replace("] tea", "]tea")  # sentencepiece's space
    assert text == whole.removesuffix("\n")


def test_an_export_lists_every_end(chat: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    turn = chat.convert_tokens_to_ids(TURN)
    path = constant_model(tmp_path / "m", chat, turn, listed=[chat.eos_token_id, 300])
    policy = load_policy(Pretrained(path), chat)
    export(policy.model, chat, tmp_path / "exported")
    found = GenerationConfig.from_pretrained(tmp_path / "exported").eos_token_id
    assert found == [turn, chat.eos_token_id, 300]
    again = load_policy(Pretrained(str(tmp_path / "exported")), chat)
    assert again.ends == policy.ends == (turn, chat.eos_token_id, 300)
    output = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").generate(
        input_ids=torch.tensor([[1, 20]]), max_new_tokens=5
    )
    assert output[0, 2:].tolist() == [turn]


def test_one_end_is_exported_as_one(world_tokenizer, tiny_world: Path, tmp_path: Path) -> None:
    policy = load_policy(Pretrained(str(tiny_world / "base")), world_tokenizer)
    export(policy.model, world_tokenizer, tmp_path / "exported")
    assert GenerationConfig.from_pretrained(tmp_path / "exported").eos_token_id == 2


def test_a_reference_ends_where_the_actor_does(
    chat: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    actor = load_policy(
        Pretrained(constant_model(tmp_path / "a", chat, 300, listed=[2, 300])), chat
    )
    capsys.readouterr()
    path = constant_model(tmp_path / "r", chat, 300, listed=[2])
    reference = load_policy(Pretrained(path), chat, LoadOptions(), ends=actor.ends)
    assert reference.ends == actor.ends
    assert "a response ends with" not in capsys.readouterr().out


# What a reward model sees


@pytest.fixture
def rollout(chat: PreTrainedTokenizerBase) -> Rollout:
    """One response ends with each end, one is cut."""
    turn, eos = chat.convert_tokens_to_ids(TURN), chat.eos_token_id
    return assemble(
        [[1, 20]] * 3, [[30, turn], [30, eos], [30, 31]], ["Hi"] * 3, chat, CPU, (turn, eos)
    )


def reward(chat: PreTrainedTokenizerBase, **config: Any) -> Pretrained:
    own = LlamaConfig(architectures=["LlamaForSequenceClassification"], num_labels=1, **config)
    made = Pretrained("rm", config=own, tokenizer=chat)
    made.has_linear_score = True  # type: ignore[misc]  # as read from its weights
    return made


@pytest.mark.parametrize(("name", "learned"), [("eos", "</s>"), (TURN, TURN)])
def test_a_reward_model_of_stage_2_gets_the_end_that_it_learned(
    chat: PreTrainedTokenizerBase, rollout: Rollout, name: str, learned: str
) -> None:
    """Runs from before say "eos", whatever their template writes."""
    read = reading(reward(chat, response_end=name), chat)
    ids = read(rollout)["input_ids"]
    end = chat.convert_tokens_to_ids(learned)
    assert ids.tolist() == [[1, 20, 30, end], [1, 20, 30, end], [1, 20, 30, 31]]
    before = rollout.input_ids.clone()
    read(rollout)
    assert torch.equal(rollout.input_ids, before)


def test_in_its_own_tokens_too(chat: PreTrainedTokenizerBase, world_tokenizer) -> None:
    eos = world_tokenizer.eos_token_id
    rollout = assemble([[1, 20]], [[30, eos]], ["Hi"], world_tokenizer, CPU)
    for name, learned in (("eos", "</s>"), (TURN, TURN)):
        read = reading(reward(chat, response_end=name), world_tokenizer)
        assert isinstance(read, OwnTokens)
        assert read(rollout)["input_ids"][0, -1] == chat.convert_tokens_to_ids(learned)


def test_a_single_end_is_given_as_it_stands(world_tokenizer: PreTrainedTokenizerBase) -> None:
    rollout = assemble([[1, 20]] * 2, [[30, 2], [30, 31]], ["Hi"] * 2, world_tokenizer, CPU)
    for config in ({}, {"response_end": "eos"}):
        read = reading(reward(world_tokenizer, **config), world_tokenizer)
        assert torch.equal(read(rollout)["input_ids"], rollout.input_ids)
