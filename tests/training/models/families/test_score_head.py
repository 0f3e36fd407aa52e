"""Reward models as they are published: where their head is, how many labels it has, their code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from training.errors import UserError
from training.models.families.score_head import stored_head
from training.models.loading import load_reward_model, load_scalar_model
from training.models.options import LoadOptions
from training.models.pretrained import Pretrained
from training.models.scalar import Classifier, ScalarModel

IDS = torch.tensor([[1, 5, 6, 7], [1, 9, 8, 7]])
ALL = torch.ones_like(IDS)


def llama(tokenizer: PreTrainedTokenizerBase, **more: object) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )


def written(
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    labels: int = 1,
    rename: dict[str, str] | None = None,
    more: dict[str, torch.Tensor] | None = None,
    **config: object,
) -> tuple[str, torch.Tensor]:
    """A Llama with a head of `labels` rows, stored under other names, and its logits on IDS."""
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(llama(tokenizer, num_labels=labels)).eval()
    with torch.no_grad():
        model.score.weight.normal_()
        logits = model(IDS, ALL).logits
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    file = directory / "model.safetensors"
    weights = {(rename or {}).get(name, name): value for name, value in load_file(file).items()}
    save_file(weights | (more or {}), file, metadata={"format": "pt"})
    saved = json.loads((directory / "config.json").read_text())
    for name, value in config.items():
        saved.pop(name, None) if value is None else saved.update({name: value})
    (directory / "config.json").write_text(json.dumps(saved))
    return str(directory), logits


def loaded(path: str, **more: object) -> ScalarModel | Classifier:
    model = load_reward_model(Pretrained(path, scores_only=True, **more), LoadOptions())
    return model.eval()


@torch.no_grad()
def rewards(model: ScalarModel | Classifier) -> torch.Tensor:
    return model.rewards(IDS, ALL) if isinstance(model, ScalarModel) else model(IDS, ALL)


UNSAID = {"id2label": None, "label2id": None, "num_labels": None}


@pytest.mark.parametrize(
    ("rename", "config"),
    [
        ({}, UNSAID),  # OpenRLHF/Llama-3-8b-rm-*
        ({"score.weight": "value_head.weight"}, {"architectures": ["RewardModel"], **UNSAID}),
        ({"score.weight": "regression_head.weight"}, {"architectures": ["LlamaRewardModel"]}),
        ({"score.weight": "v_head.summary.weight"}, {"architectures": ["LlamaForCausalLM"]}),
    ],
    ids=["labels unsaid", "OpenRLHF", "UltraRM", "TRL"],
)
def test_heads_of_any_name(
    tmp_path: Path, world_tokenizer, rename: dict, config: dict, capsys
) -> None:
    path, own = written(tmp_path, world_tokenizer, rename=rename, **config)
    found = rewards(loaded(path))
    torch.testing.assert_close(found, own[:, 0], rtol=0, atol=1e-6)
    assert "no place" not in capsys.readouterr().out


def test_the_head_of_another_model_would_be_wrong(tmp_path: Path, world_tokenizer) -> None:
    path, own = written(tmp_path, world_tokenizer, rename={"score.weight": "value_head.weight"})
    model = loaded(path)
    model.model.score.weight.data = model.model.score.weight.data.flip(1)
    assert (rewards(model) - own[:, 0]).abs().max() > 0.1


def test_a_bias_counts(tmp_path: Path, world_tokenizer) -> None:
    path, own = written(
        tmp_path,
        world_tokenizer,
        rename={"score.weight": "v_head.summary.weight"},
        more={"v_head.summary.bias": torch.tensor([0.75])},
    )
    model = loaded(path)
    torch.testing.assert_close(rewards(model), own[:, 0] + 0.75, rtol=0, atol=1e-6)
    critic = load_scalar_model(Pretrained(path), world_tokenizer)  # and survives an export
    critic.model.save_pretrained(tmp_path / "critic")
    world_tokenizer.save_pretrained(tmp_path / "critic")
    again = loaded(str(tmp_path / "critic"))
    torch.testing.assert_close(rewards(again), own[:, 0] + 0.75, rtol=0, atol=1e-6)


def test_a_head_in_a_file_of_its_own(tmp_path: Path, world_tokenizer) -> None:
    path, own = written(tmp_path, world_tokenizer, architectures=["LlamaForCausalLM"])
    weights = load_file(tmp_path / "model.safetensors")
    head = {"v_head.summary.weight": weights.pop("score.weight")}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    save_file(head, tmp_path / "value_head.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(rewards(loaded(path)), own[:, 0], rtol=0, atol=1e-6)


def test_a_language_model_has_no_head(tmp_path: Path, world_tokenizer) -> None:
    LlamaForCausalLM(llama(world_tokenizer)).save_pretrained(tmp_path)
    world_tokenizer.save_pretrained(tmp_path)
    assert stored_head(Pretrained(str(tmp_path))) is None
    with pytest.raises(UserError, match="not a sequence-classification model"):
        loaded(str(tmp_path))


def test_several_labels_add_up(tmp_path: Path, world_tokenizer) -> None:
    names = {"0": "helpful", "1": "verbose", "2": "correct"}
    path, own = written(tmp_path, world_tokenizer, labels=3, id2label=names, label2id=None)
    found = rewards(loaded(path, labels={"helpful": 0.5, "verbose": -0.25}))
    torch.testing.assert_close(found, 0.5 * own[:, 0] - 0.25 * own[:, 1], rtol=0, atol=1e-6)
    by_number = rewards(loaded(path, labels={"2": 2.0}))
    torch.testing.assert_close(by_number, 2 * own[:, 2], rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"3 labels; .* some of helpful, verbose, correct"):
        loaded(path)
    with pytest.raises(UserError, match="has no label 'helpfull'; it has helpful, verbose"):
        loaded(path, labels={"helpfull": 1.0})


def test_several_labels_of_an_encoder(tmp_path: Path, world_tokenizer) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(world_tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=2,  # is not written, because it is the default
            pad_token_id=world_tokenizer.pad_token_id,
        )
    ).eval()
    model.classifier.bias.data = torch.tensor([0.5, -1.0])
    model.save_pretrained(tmp_path)
    world_tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        own = model(IDS, ALL).logits
    found = rewards(loaded(str(tmp_path), labels={"LABEL_1": 1.0, "LABEL_0": -1.0}))
    torch.testing.assert_close(found, own[:, 1] - own[:, 0], rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="2 labels"):
        loaded(str(tmp_path))


CODE = '''
import torch
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class GatedReward(LlamaPreTrainedModel):
    """Two objectives, weighted by a gate, as of ArmoRM."""

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.objectives = torch.nn.Linear(config.hidden_size, 2, bias=False)
        self.gate = torch.nn.Linear(config.hidden_size, 2, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **more):
        states = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(-1) - 1 if attention_mask is not None else -1
        state = states[torch.arange(len(states)), last]
        score = (self.objectives(state) * self.gate(state).softmax(-1)).sum(-1)
        return SequenceClassifierOutput(logits=SHAPE)
'''


def own_code(directory: Path, tokenizer, auto: str, shape: str) -> PreTrainedModel:
    """Write a model with code of its own, and return it."""
    space: dict = {"__name__": "gated"}
    exec(CODE.replace("SHAPE", shape), space)
    torch.manual_seed(0)
    model = space["GatedReward"](llama(tokenizer)).eval()
    for layer in (model.objectives, model.gate):
        layer.weight.data.normal_()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "gated.py").write_text(CODE.replace("SHAPE", shape))
    saved = json.loads((directory / "config.json").read_text())
    saved["auto_map"] = {auto: "gated.GatedReward"}
    (directory / "config.json").write_text(json.dumps(saved))
    return model


@pytest.mark.parametrize(
    ("auto", "shape"),
    [("AutoModelForSequenceClassification", "score"), ("AutoModel", "score[:, None]")],
)
def test_reward_models_with_code_of_their_own(
    tmp_path: Path, world_tokenizer, auto: str, shape: str
) -> None:
    model = own_code(tmp_path, world_tokenizer, auto, shape)
    with torch.no_grad():
        own = model(IDS, ALL).logits.reshape(2)
    found = loaded(str(tmp_path), trust_remote_code=True)
    assert isinstance(found, Classifier)
    torch.testing.assert_close(rewards(found), own, rtol=0, atol=1e-6)
    assert own.std() > 1e-3
    with pytest.raises(UserError, match="code of its own, which trust_remote_code=true runs"):
        loaded(str(tmp_path))
    with pytest.raises(UserError, match="gives one number already"):
        loaded(str(tmp_path), trust_remote_code=True, labels={"a": 1.0})


def test_code_that_gives_several_numbers(tmp_path: Path, world_tokenizer) -> None:
    own_code(tmp_path, world_tokenizer, "AutoModel", "self.objectives(state)")
    with pytest.raises(UserError, match="gives 2 numbers for a text; a reward is one"):
        loaded(str(tmp_path), trust_remote_code=True)


def test_an_adapter_alone_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match=r"holds an adapter .*; name a model into which"):
        _ = Pretrained(str(tmp_path)).config
