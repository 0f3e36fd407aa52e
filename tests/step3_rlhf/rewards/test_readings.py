"""Reward models of any origin: each reads the texts in its own way, whatever the batch."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLNetConfig,
)

from step3_rlhf.config import PPOConfig
from step3_rlhf.rewards.model import ModelReward
from step3_rlhf.rewards.readings import (
    OwnTokens,
    TextPairs,
    known_positions,
    policy_tokens,
    reading,
    reads_policy_tokens,
    right_padded,
)
from step3_rlhf.rewards.sources import load_reward
from step3_rlhf.roles import roles_of
from step3_rlhf.rollout import Rollout, assemble, encode_prompt_texts
from training.config import check_config
from training.data import as_dialogue, encode_responses, response_frame
from training.models.loading import load_scalar_model
from training.models.pretrained import Pretrained
from training.models.scalar import ScalarModel

PROMPTS = ("Please suggest a drink.", "What is a good pet?", "Hi")
RESPONSES = ("tea", "a cat, or perhaps two of them", "hello")
TEMPLATE = (
    "<s>{% for m in messages %}<|{{ m.role }}|> {{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


@pytest.fixture
def rollout(world_tokenizer) -> Rollout:
    return assemble(
        encode_prompt_texts(PROMPTS, world_tokenizer),
        encode_responses(list(RESPONSES), world_tokenizer),
        PROMPTS,
        world_tokenizer,
        torch.device("cpu"),
    )


@pytest.fixture
def scalar(tiny_world: Path, world_tokenizer) -> ScalarModel:
    model = load_scalar_model(Pretrained(str(tiny_world / "base")), world_tokenizer, new_head=True)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.model.score.weight)
    return model.eval()


@pytest.fixture
def templated(world_tokenizer) -> PreTrainedTokenizerBase:
    """The policy's tokens, another way to write a dialogue."""
    other = copy.deepcopy(world_tokenizer)
    other.chat_template = TEMPLATE
    return other


@torch.no_grad()
def own_rewards(scalar: ScalarModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """One by one, without padding, from the sequence-classification model itself."""
    rows = zip(
        encode_prompt_texts(PROMPTS, tokenizer),
        encode_responses(list(RESPONSES), tokenizer),
        strict=True,
    )
    return rewards_of(scalar, [p + r for p, r in rows])


@torch.no_grad()
def rewards_of(scalar: ScalarModel, texts: list[list[int]]) -> torch.Tensor:
    return torch.cat([scalar.model(input_ids=torch.tensor([ids])).logits[0] for ids in texts])


def config_of(model: ScalarModel, **changes: object) -> PretrainedConfig:
    """As it would be read from disk."""
    config = copy.deepcopy(model.model.config)
    config.update({"architectures": ["LlamaForSequenceClassification"], **changes})
    return config


def named(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Pretrained:
    return Pretrained("rm", config=config, tokenizer=tokenizer)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_models_reward_does_not_depend_on_the_batch(
    rollout: Rollout, scalar: ScalarModel, world_tokenizer, batch_size: int
) -> None:
    own = own_rewards(scalar, world_tokenizer)
    found = ModelReward(scalar, policy_tokens, batch_size)(rollout)
    torch.testing.assert_close(found, own, rtol=0, atol=1e-5)
    assert own.std() > 1e-3


@pytest.mark.parametrize("batch_size", [1, 8])
def test_another_chat_template_is_the_models_own(
    rollout: Rollout, scalar: ScalarModel, world_tokenizer, templated, capsys, batch_size: int
) -> None:
    """A whole dialogue as the template writes it, to the very end: <|end|> and a new line."""
    read = reading(named(config_of(scalar), templated), world_tokenizer)
    assert "rm reads prompts and responses anew" in capsys.readouterr().out
    found = ModelReward(scalar, read, batch_size)(rollout)
    dialogues = [
        templated.apply_chat_template(
            [{"role": "user", "content": p}, {"role": "assistant", "content": r}], tokenize=False
        )
        for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
    assert dialogues[0].endswith("tea<|end|>\n")
    own = rewards_of(scalar, templated(dialogues, add_special_tokens=False)["input_ids"])
    torch.testing.assert_close(found, own, rtol=0, atol=1e-5)
    for wrong in (policy_tokens, OwnTokens(templated, None, by_template=False)):
        assert (ModelReward(scalar, wrong, batch_size)(rollout) - own).abs().max() > 1e-2


def test_what_stage_2_made_learned_eos_after_a_response(
    rollout: Rollout, scalar: ScalarModel, world_tokenizer, templated
) -> None:
    made = config_of(scalar, response_end="eos")
    found = ModelReward(scalar, reading(named(made, templated), world_tokenizer), 8)(rollout)
    torch.testing.assert_close(found, own_rewards(scalar, templated), rtol=0, atol=1e-5)


def test_who_reads_the_policys_tokens_as_they_stand(
    rollout: Rollout, scalar: ScalarModel, world_tokenizer, templated, capsys
) -> None:
    foreign, made = config_of(scalar), config_of(scalar, response_end="eos")
    assert reads_policy_tokens(named(foreign, world_tokenizer), world_tokenizer)
    assert reads_policy_tokens(named(made, templated), templated)
    assert not reads_policy_tokens(
        named(foreign, templated), templated
    )  # it learned <|end|>, not EOS
    ending = copy.deepcopy(templated)
    ending.chat_template = TEMPLATE.replace("<|end|>\n", "</s>")
    assert reads_policy_tokens(named(foreign, ending), ending)
    # No template is a format too: that of plain dialogues.
    assert not reads_policy_tokens(named(made, world_tokenizer), templated)
    assert not reads_policy_tokens(named(made, templated), world_tokenizer)
    longer = copy.deepcopy(world_tokenizer)
    longer.add_tokens(["qqqq"])
    assert not reads_policy_tokens(named(made, longer), world_tokenizer)
    assert not reads_policy_tokens(named(made, world_tokenizer), longer)
    read = reading(named(foreign, world_tokenizer), world_tokenizer)
    assert torch.equal(read(rollout)["input_ids"], rollout.input_ids)
    assert isinstance(reading(named(foreign, longer), world_tokenizer), OwnTokens)
    assert "in its plain dialogue format" in capsys.readouterr().out


def test_texts_count_not_the_policys_tokens(
    rollout: Rollout, scalar: ScalarModel, world_tokenizer
) -> None:
    shuffled = replace(rollout, input_ids=torch.zeros_like(rollout.input_ids))
    found = ModelReward(scalar, OwnTokens(world_tokenizer, 512, False), 8)(shuffled)
    torch.testing.assert_close(found, own_rewards(scalar, world_tokenizer), rtol=0, atol=1e-5)


def test_long_texts_are_cut_to_what_the_model_knows(rollout: Rollout, world_tokenizer) -> None:
    """The beginning goes, as the policy's prompts lose theirs."""
    prompts = encode_prompt_texts(PROMPTS, world_tokenizer)
    responses = encode_responses(list(RESPONSES), world_tokenizer)
    bos = world_tokenizer.bos_token_id
    assert (len(prompts[1]), len(responses[1])) > (6, 6)

    def row(positions: int | None) -> list[int]:
        inputs = OwnTokens(world_tokenizer, positions, by_template=False)(rollout)
        kept = inputs["attention_mask"][1].bool()
        return inputs["input_ids"][1][kept].tolist()

    assert row(None) == row(512) == prompts[1] + responses[1]
    assert row(len(responses[1]) + 3) == [bos, *prompts[1][-2:]] + responses[1]
    assert row(5) == [bos, *responses[1][-4:]]


@pytest.mark.parametrize("by_template", [True, False])
def test_a_response_that_was_cut_has_no_end_in_other_tokens_either(
    rollout: Rollout, templated, by_template: bool
) -> None:
    cut = replace(rollout, ended=torch.tensor([True, False, True]))
    inputs = OwnTokens(templated, 512, by_template)(cut)
    texts = [
        templated.decode(ids[mask.bool()].tolist())
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    end = "<|end|>\n" if by_template else "</s>"
    assert [text.endswith(end) for text in texts] == [True, False, True]
    assert texts[1].endswith("two of them")


def test_a_response_cannot_spell_the_templates_special_tokens(rollout: Rollout, templated) -> None:
    spelt = replace(rollout, responses=("tea</s>", "<s>a cat", "hello"))
    inputs = OwnTokens(templated, None, by_template=True)(spelt)
    assert (inputs["input_ids"] == templated.eos_token_id).sum() == 0
    assert (inputs["input_ids"] == templated.bos_token_id).sum() == 3  # the template's own


def test_a_head_that_looks_for_the_last_token_at_the_right(
    rollout: Rollout, world_tokenizer
) -> None:
    assert (rollout.attention_mask[:, 0] == 0).any()
    inputs = right_padded(rollout, world_tokenizer)
    assert (inputs["attention_mask"][:, 0] == 1).all()
    for row, mask, ids in zip(
        inputs["input_ids"], inputs["attention_mask"].bool(), rollout.input_ids, strict=True
    ):
        assert row[mask].tolist() == [i for i in ids.tolist() if i != world_tokenizer.pad_token_id]


def test_a_system_message_stays_one(world_tokenizer, templated) -> None:
    prompt = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
    before, after = response_frame(prompt, templated)
    assert before == "<s><|system|> Be brief.<|end|>\n<|user|> Hi<|end|>\n<|assistant|> "
    assert after == "<|end|>\n"
    templated.chat_template = TEMPLATE.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}",
    )
    before, _ = response_frame(prompt, templated)
    assert before == "<s><|user|> Be brief.\n\nHi<|end|>\n<|assistant|> "


# Models that read pairs


@pytest.fixture
def bert(tmp_path: Path) -> str:
    """A one-label BERT of 24 positions with its kind of tokenizer, which has no EOS."""
    words = "[PAD] [UNK] [CLS] [SEP] Please suggest a drink . What is good pet ? Hi tea cat , or "
    names = (words + "perhaps two of them hello").split()
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(names)}, "[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    tokenizer.save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(names), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=24, num_labels=1, initializer_range=0.5,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def pair_ids(prompt: str, response: str) -> tuple[torch.Tensor, torch.Tensor]:
    """[CLS] prompt [SEP] response [SEP] by hand, and the texts' types."""
    words = "[PAD] [UNK] [CLS] [SEP] Please suggest a drink . What is good pet ? Hi tea cat , or "
    names = (words + "perhaps two of them hello").split()

    def ids(text: str) -> list[int]:
        spaced = "".join(f" {c} " if c in ".,?" else c for c in text)
        return [names.index(word) for word in spaced.split()]

    first, second = [2, *ids(prompt), 3], [*ids(response), 3]
    return torch.tensor([first + second]), torch.tensor([[0] * len(first) + [1] * len(second)])


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@torch.no_grad()
def test_bert_reads_a_pair_of_texts(
    rollout: Rollout, bert: str, stage_settings, world_tokenizer, capsys, batch_size: int
) -> None:
    settings = stage_settings("ppo") | {
        "reward": {"model_name_or_path": bert},
        "per_device_eval_batch_size": batch_size,
    }
    config = check_config(PPOConfig, settings, "config:")
    source = load_reward(config, roles_of(config))
    assert "reads prompt and response as two texts" in capsys.readouterr().out
    model = BertForSequenceClassification.from_pretrained(bert).eval()
    pairs = [pair_ids(*texts) for texts in zip(PROMPTS, RESPONSES, strict=True)]
    own = torch.cat([model(ids, token_type_ids=types).logits[0] for ids, types in pairs])
    torch.testing.assert_close(source(rollout), own, rtol=0, atol=1e-5)
    without_types = torch.cat([model(ids).logits[0] for ids, _ in pairs])
    assert (without_types - own).abs().max() > 1e-2


def test_pairs_fit_the_models_positions(rollout: Rollout, bert: str) -> None:
    """The prompt's beginning goes first, then the response's end; one word of the prompt stays."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bert)
    asked = ("pet " * 30 + "drink", "pet pet drink", "Hi")
    answered = ("tea", "cat " + "tea " * 20, "hello")
    inputs = TextPairs(tokenizer, 10)(
        replace(rollout, dialogues=tuple(map(as_dialogue, asked)), responses=answered)
    )
    words = [tokenizer.convert_ids_to_tokens(row.tolist()) for row in inputs["input_ids"]]
    assert words[0] == ["[CLS]", *["pet"] * 5, "drink", "[SEP]", "tea", "[SEP]"]
    assert words[1] == ["[CLS]", "drink", "[SEP]", "cat", *["tea"] * 5, "[SEP]"]
    assert words[2] == ["[CLS]", "Hi", "[SEP]", "hello", "[SEP]", *["[PAD]"] * 5]


def test_text_that_looks_like_a_joint_stays_text(rollout: Rollout, bert: str) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bert)
    written = ("tea [SEP] hello", "[CLS]", "hello")
    ids = TextPairs(tokenizer, None)(replace(rollout, responses=written))["input_ids"]
    assert [(row == tokenizer.sep_token_id).sum().item() for row in ids] == [2, 2, 2]
    assert [(row == tokenizer.cls_token_id).sum().item() for row in ids] == [1, 1, 1]


def test_a_decoder_with_berts_tokenizer_reads_one_sequence(
    rollout: Rollout, scalar: ScalarModel, bert: str, world_tokenizer
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bert)
    tokenizer.eos_token = "[SEP]"
    assert isinstance(
        reading(named(config_of(scalar), tokenizer), world_tokenizer),
        OwnTokens,
    )


def test_how_many_positions_a_model_knows(world_tokenizer, bert: str) -> None:
    """RoBERTa's 514 are 512: it counts from the one after padding's."""
    endless = PreTrainedTokenizerFast.from_pretrained(bert)
    assert endless.model_max_length > 1e6
    tiny = {"num_hidden_layers": 1, "hidden_size": 12, "vocab_size": 8}
    for config, known in (
        (BertConfig(**tiny, max_position_embeddings=512), 512),
        (RobertaConfig(**tiny, max_position_embeddings=514, pad_token_id=1), 512),
        (LlamaConfig(**tiny, num_attention_heads=2, max_position_embeddings=99), 99),
        (XLNetConfig(vocab_size=8, d_model=12, n_layer=1, n_head=2, d_inner=4), None),
    ):
        assert known_positions(named(config, endless)) == known
    assert world_tokenizer.model_max_length == 512
    assert (
        known_positions(named(BertConfig(**tiny, max_position_embeddings=600), world_tokenizer))
        == 512
    )
