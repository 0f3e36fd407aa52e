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
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
)

from step3_rlhf.config import PPOConfig
from step3_rlhf.reward_models import (
    ModelReward,
    OwnTokens,
    TextPairs,
    as_it_stands,
    known_positions,
    reading,
    reads_as,
)
from step3_rlhf.rewards import load_reward
from step3_rlhf.rollout import Rollout, assemble, encode_prompt_texts
from training.config import check_config
from training.data import encode_responses
from training.loading import load_scalar_model
from training.models import ScalarModel

PROMPTS = ("Please suggest a drink.", "What is a good pet?", "Hi")
RESPONSES = ("tea", "a cat, or perhaps two of them", "hello")
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }}\n{% endfor %}"
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
    model = load_scalar_model(str(tiny_world / "base"), world_tokenizer, new_head=True)
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
    return torch.cat([scalar.model(input_ids=torch.tensor([p + r])).logits[0] for p, r in rows])


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_models_reward_does_not_depend_on_the_batch(
    rollout: Rollout, scalar: ScalarModel, world_tokenizer, batch_size: int
) -> None:
    own = own_rewards(scalar, world_tokenizer)
    found = ModelReward(scalar, as_it_stands, batch_size)(rollout)
    torch.testing.assert_close(found, own, rtol=0, atol=1e-5)
    assert own.std() > 1e-3


@pytest.mark.parametrize("batch_size", [1, 8])
def test_another_chat_template_is_the_models_own(
    rollout: Rollout, scalar: ScalarModel, world_tokenizer, templated, capsys, batch_size: int
) -> None:
    assert not reads_as(templated, world_tokenizer)
    read = reading("rm", templated, world_tokenizer, None, 64)
    assert "rm reads prompts and responses anew" in capsys.readouterr().out
    found = ModelReward(scalar, read, batch_size)(rollout)
    own = own_rewards(scalar, templated)
    torch.testing.assert_close(found, own, rtol=0, atol=1e-5)
    wrong = ModelReward(scalar, as_it_stands, batch_size)(rollout)  # in the policy's format
    assert (wrong - own).abs().max() > 1e-2


def test_who_reads_the_policys_tokens_as_they_stand(world_tokenizer, templated, capsys) -> None:
    assert reads_as(templated, templated)
    assert reads_as(world_tokenizer, templated)  # no template of its own to differ in
    longer = copy.deepcopy(world_tokenizer)
    longer.add_tokens(["qqqq"])
    assert not reads_as(longer, world_tokenizer)
    assert not reads_as(world_tokenizer, longer)
    assert reading("rm", world_tokenizer, templated, 64, 64) is as_it_stands
    assert isinstance(reading("rm", longer, world_tokenizer, 64, 64), OwnTokens)
    assert "in the plain dialogue format" in capsys.readouterr().out


def test_texts_count_not_the_policys_tokens(
    rollout: Rollout, scalar: ScalarModel, world_tokenizer
) -> None:
    shuffled = replace(rollout, input_ids=torch.zeros_like(rollout.input_ids))
    found = ModelReward(scalar, OwnTokens(world_tokenizer, 512, 64), 8)(shuffled)
    torch.testing.assert_close(found, own_rewards(scalar, world_tokenizer), rtol=0, atol=1e-5)


def test_long_texts_are_cut_to_what_the_model_knows(rollout: Rollout, world_tokenizer) -> None:
    """The prompt's beginning goes first, as the policy's; then the response's end."""
    prompts = encode_prompt_texts(PROMPTS, world_tokenizer)
    responses = encode_responses(list(RESPONSES), world_tokenizer)
    bos = world_tokenizer.bos_token_id
    assert (len(prompts[1]), len(responses[1])) > (6, 6)

    def row(positions: int, max_prompt_length: int) -> list[int]:
        inputs = OwnTokens(world_tokenizer, positions, max_prompt_length)(rollout)
        kept = inputs["attention_mask"][1].bool()
        return inputs["input_ids"][1][kept].tolist()

    assert row(512, 64) == prompts[1] + responses[1]
    assert row(512, 4) == [bos, *prompts[1][-3:]] + responses[1]
    assert row(len(responses[1]) + 3, 64) == [bos, *prompts[1][-2:]] + responses[1]
    assert row(5, 64) == [bos, *responses[1][:4]]


def test_a_response_that_was_cut_has_no_end_in_other_tokens_either(
    rollout: Rollout, world_tokenizer
) -> None:
    cut = replace(rollout, ended=torch.tensor([True, False, True]))
    inputs = OwnTokens(world_tokenizer, 512, 64)(cut)
    last = inputs["attention_mask"].cumsum(-1).argmax(-1)
    ends = inputs["input_ids"].gather(1, last[:, None])[:, 0] == world_tokenizer.eos_token_id
    assert ends.tolist() == [True, False, True]


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
    source = load_reward(config.reward, world_tokenizer, config)
    assert "reads prompt and response as two texts" in capsys.readouterr().out
    model = BertForSequenceClassification.from_pretrained(bert).eval()
    pairs = [pair_ids(*texts) for texts in zip(PROMPTS, RESPONSES, strict=True)]
    own = torch.cat([model(ids, token_type_ids=types).logits[0] for ids, types in pairs])
    torch.testing.assert_close(source(rollout), own, rtol=0, atol=1e-5)
    without_types = torch.cat([model(ids).logits[0] for ids, _ in pairs])
    assert (without_types - own).abs().max() > 1e-2


def test_pairs_fit_the_models_positions(rollout: Rollout, bert: str) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bert)
    long = replace(rollout, prompts=("pet " * 30 + "drink", "Hi", "Hi"))
    ids = TextPairs(tokenizer, 10)(long)["input_ids"]
    assert ids.shape == (3, 10)
    # 10 positions − 3 joints − 1 word of response: the last 6 words of the prompt.
    words = tokenizer.convert_ids_to_tokens(ids[0].tolist())
    assert words == ["[CLS]", *["pet"] * 5, "drink", "[SEP]", "tea", "[SEP]"]


def test_how_many_positions_a_model_knows() -> None:
    """RoBERTa's 514 are 512: it counts from the one after padding's."""
    tiny = {"num_hidden_layers": 1, "hidden_size": 12, "vocab_size": 8}
    for config, known in (
        (BertConfig(**tiny, max_position_embeddings=512), 512),
        (RobertaConfig(**tiny, max_position_embeddings=514, pad_token_id=1), 512),
        (LlamaConfig(**tiny, num_attention_heads=2, max_position_embeddings=99), 99),
        (T5Config(d_model=12, num_layers=1, vocab_size=8, eos_token_id=1), None),
    ):
        assert known_positions(config) == known
