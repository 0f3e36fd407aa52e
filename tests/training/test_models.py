"""Policy and scalar models against Hugging Face's own; padding; pad and EOS tokens."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from training.data import pad_prompts, pad_sequences
from training.errors import UserError
from training.models import (
    Policy,
    ScalarModel,
    check_positions,
    last_token,
    load_policy,
    load_scalar_model,
    load_tokenizer,
    require_same_tokens,
)

PAD, EOS = 3, 2
ROWS = ([1, 17, 33, 9, 40, EOS], [1, 21, 50], [1, 8, 60, 5])


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    if side == "left":
        return pad_prompts(ROWS, PAD)
    batch = pad_sequences(ROWS, [[]] * len(ROWS), PAD)
    return batch.input_ids, batch.attention_mask


def everything_after_the_first(attention_mask: torch.Tensor) -> torch.Tensor:
    return (attention_mask == 1) & (attention_mask.cumsum(-1) > 1)


def own_logps(model: PreTrainedModel, row: list[int]) -> torch.Tensor:
    """log π of a row's tokens after the first, from the model's own logits, without padding."""
    logits = model(input_ids=torch.tensor([row])).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None]).squeeze(1)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_policy_equals_the_models_own_logits_whatever_the_padding(
    any_model: PreTrainedModel, side: str
) -> None:
    input_ids, attention_mask = padded(side)
    scored = everything_after_the_first(attention_mask)
    logp, entropy = Policy(any_model)(input_ids, attention_mask, scored)
    assert entropy is None
    assert (logp[~scored] == 0).all()
    for row, ids in enumerate(ROWS):
        expected = own_logps(any_model, ids)
        torch.testing.assert_close(
            logp[row][scored[row]].double(), expected, rtol=0, atol=1e-5, msg=f"row {row}"
        )


@torch.no_grad()
def test_left_padding_without_positions_would_be_wrong(tiny_opt: PreTrainedModel) -> None:
    """The trap that `position_ids` avoid: positions that count padding."""
    input_ids, attention_mask = padded("left")
    shifted = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    hidden = tiny_opt.get_decoder()(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=shifted
    ).last_hidden_state
    logp = tiny_opt.lm_head(hidden)[1, -2].log_softmax(-1)[ROWS[1][-1]]
    assert abs(logp - own_logps(tiny_opt, ROWS[1])[-1]) > 1e-3


@torch.no_grad()
def test_policy_scores_only_what_is_asked_for(tiny_llama: PreTrainedModel) -> None:
    input_ids, attention_mask = padded("right")
    scored = torch.zeros_like(input_ids, dtype=torch.bool)
    scored[0, 4:6] = True
    rows: list[int] = []
    tiny_llama.lm_head.register_forward_hook(lambda m, given, logits: rows.append(logits.shape[0]))
    logp, entropy = Policy(tiny_llama)(input_ids, attention_mask, scored, with_entropy=True)
    assert rows == [2]
    torch.testing.assert_close(
        logp[0, 4:6].double(), own_logps(tiny_llama, ROWS[0])[3:5], atol=1e-5, rtol=0
    )
    full = tiny_llama(input_ids=torch.tensor([ROWS[0]])).logits[0, 3].double().log_softmax(-1)
    assert entropy[0, 4].item() == pytest.approx(-(full.exp() * full).sum().item(), abs=1e-5)


def test_a_batch_of_fillers_gives_zero_and_no_gradient(tiny_llama: PreTrainedModel) -> None:
    input_ids, attention_mask = padded("right")
    nothing = torch.zeros_like(input_ids, dtype=torch.bool)
    logp, _ = Policy(tiny_llama)(input_ids, attention_mask, nothing)
    logp.sum().backward()
    assert logp.sum() == 0
    gradients = [p.grad for p in tiny_llama.parameters() if p.grad is not None]
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.fixture
def scalar_model(any_model: PreTrainedModel, tmp_path: Path) -> PreTrainedModel:
    """The same body with one random label."""
    any_model.save_pretrained(tmp_path / "body")
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "body", num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    return model.eval()


@torch.no_grad()
def test_rewards_equal_the_sequence_classification_models_own(
    scalar_model: PreTrainedModel,
) -> None:
    input_ids, attention_mask = padded("right")
    own = scalar_model(input_ids=input_ids, attention_mask=attention_mask).logits.squeeze(-1)
    ours = ScalarModel(scalar_model)
    torch.testing.assert_close(ours.rewards(input_ids, attention_mask), own, rtol=0, atol=1e-5)
    on_the_left = ours.rewards(*padded("left"))
    torch.testing.assert_close(on_the_left, own, rtol=0, atol=1e-5)
    one_early = ours(input_ids, attention_mask)[torch.arange(3), attention_mask.sum(-1) - 2]
    assert (one_early - own).abs().max() > 1e-3


def test_last_token_on_either_side() -> None:
    values = torch.arange(8.0).reshape(2, 4)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    assert last_token(values, mask).tolist() == [1.0, 7.0]


# Loading


def write_tokenizer(directory: Path, **special: str) -> None:
    words = ["<unk>", "<s>", "</s>", "yes", "no"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special).save_pretrained(
        directory
    )


def write_model(
    directory: Path, kind: type[PreTrainedModel] = LlamaForCausalLM, **more: object
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=5,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )
    kind(config).save_pretrained(directory)


@pytest.mark.parametrize("special", [{}, {"pad_token": "</s>"}], ids=["no pad", "pad is EOS"])
def test_pad_is_never_eos_and_the_embeddings_hold_it(tmp_path: Path, special: dict) -> None:
    write_tokenizer(tmp_path, bos_token="<s>", eos_token="</s>", **special)
    write_model(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token_id == 5 != tokenizer.eos_token_id == 2
    before = LlamaForCausalLM.from_pretrained(tmp_path)
    for loaded in (
        load_policy(str(tmp_path), tokenizer),
        load_scalar_model(str(tmp_path), tokenizer, new_head=True),
    ):
        model = loaded.model
        assert model.get_input_embeddings().num_embeddings == len(tokenizer) == 6
        assert model.config.pad_token_id == 5
        rows = model.get_input_embeddings().weight
        assert torch.equal(rows[:5], before.get_input_embeddings().weight)
        # The new row is the same in every process and in every copy.
        torch.testing.assert_close(rows[5], rows[:5].mean(0))


def test_a_pad_token_of_its_own_is_kept(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, eos_token="</s>", pad_token="<s>")
    write_model(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.pad_token_id, len(tokenizer)) == (1, 5)
    assert load_policy(str(tmp_path), tokenizer).model.get_input_embeddings().num_embeddings == 5


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, pad_token="<s>")
    with pytest.raises(UserError, match="has no EOS token"):
        load_tokenizer(str(tmp_path))


def test_directories_that_hold_nothing_usable(tmp_path: Path, world_tokenizer) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="no model config could be loaded"):
        load_policy(str(tmp_path), world_tokenizer)


def test_pickled_weights_are_refused(tmp_path: Path, world_tokenizer) -> None:
    write_model(tmp_path)
    weights = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="no model could be loaded"):
        load_policy(str(tmp_path), world_tokenizer)


def test_a_new_reward_head_prefers_nothing(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, eos_token="</s>", pad_token="<s>")
    write_model(tmp_path)
    model = load_scalar_model(str(tmp_path), load_tokenizer(str(tmp_path)), new_head=True)
    ids = torch.tensor([[3, 4, 2], [4, 4, 2]])
    assert model.rewards(ids, torch.ones_like(ids)).tolist() == [0.0, 0.0]


def test_a_language_model_is_no_reward_model_and_the_reverse(
    tmp_path: Path, world_tokenizer
) -> None:
    write_model(tmp_path / "causal")
    write_model(tmp_path / "scalar", LlamaForSequenceClassification, num_labels=1)
    with pytest.raises(UserError, match="not a sequence-classification model"):
        load_scalar_model(str(tmp_path / "causal"), world_tokenizer)
    with pytest.raises(UserError, match="not a language model"):
        load_policy(str(tmp_path / "scalar"), world_tokenizer)


def test_a_trained_reward_head_is_kept(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, eos_token="</s>", pad_token="<s>")
    write_model(tmp_path, LlamaForSequenceClassification, num_labels=1)
    own = LlamaForSequenceClassification.from_pretrained(tmp_path).score.weight
    loaded = load_scalar_model(str(tmp_path), load_tokenizer(str(tmp_path))).model.score.weight
    assert own.abs().max() > 0
    assert torch.equal(own, loaded)


def test_a_classifier_of_two_labels_is_no_reward_model(tmp_path: Path, world_tokenizer) -> None:
    write_model(tmp_path, LlamaForSequenceClassification, num_labels=2)
    with pytest.raises(UserError, match="2 labels; a reward model has one"):
        load_scalar_model(str(tmp_path), world_tokenizer)


def test_models_that_rescale_their_logits_are_refused(tmp_path: Path, world_tokenizer) -> None:
    write_model(tmp_path, final_logit_softcapping=30.0)
    with pytest.raises(UserError, match="final_logit_softcapping"):
        load_policy(str(tmp_path), world_tokenizer)


def test_dropout_is_off_unless_asked_for(
    tiny_opt: PreTrainedModel, tmp_path: Path, world_tokenizer
) -> None:
    tiny_opt.save_pretrained(tmp_path)
    input_ids, attention_mask = padded("right")
    scored = everything_after_the_first(attention_mask)

    def twice(dropout: bool) -> tuple[torch.Tensor, torch.Tensor]:
        policy = load_policy(str(tmp_path), world_tokenizer, dropout=dropout).train()
        return tuple(policy(input_ids, attention_mask, scored)[0] for _ in range(2))

    assert torch.equal(*twice(dropout=False))
    assert not torch.equal(*twice(dropout=True))


def test_gradient_checkpointing_changes_no_gradient(
    tiny_llama: PreTrainedModel, tmp_path: Path, world_tokenizer
) -> None:
    tiny_llama.save_pretrained(tmp_path)
    input_ids, attention_mask = padded("right")
    scored = everything_after_the_first(attention_mask)
    gradients = []
    for checkpointing in (False, True):
        policy = load_policy(str(tmp_path), world_tokenizer, gradient_checkpointing=checkpointing)
        policy.train()(input_ids, attention_mask, scored)[0].sum().backward()
        gradients.append(policy.model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*gradients)


def test_the_worlds_base_model_loads(tiny_world: Path, world_tokenizer) -> None:
    assert AutoTokenizer.from_pretrained(tiny_world / "base").pad_token_id == PAD
    assert load_policy(str(tiny_world / "base"), world_tokenizer).model.config.pad_token_id == PAD


def test_a_bfloat16_reward_model_gives_float32_rewards(tmp_path: Path, world_tokenizer) -> None:
    """In bfloat16 a reward near 10 would be a multiple of 1/16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(world_tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=world_tokenizer.pad_token_id,
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    world_tokenizer.save_pretrained(tmp_path)
    model = load_scalar_model(str(tmp_path), world_tokenizer, torch.bfloat16)
    with torch.no_grad():
        model.model.score.weight.fill_(1.0)
        values = model(torch.arange(5, 25)[None], torch.ones(1, 20, dtype=torch.long))
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())  # finer than bfloat16 can say


def test_lengths_beyond_the_models_positions_are_refused(
    tiny_opt: PreTrainedModel, tmp_path: Path
) -> None:
    tiny_opt.config.save_pretrained(tmp_path)
    known = tiny_opt.config.max_position_embeddings
    check_positions(str(tmp_path), {"a": known})
    with pytest.raises(UserError, match=rf"knows {known} positions:\n  - b is {known + 1} tokens$"):
        check_positions(str(tmp_path), {"a": known, "b": known + 1})


def damaged(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> Path:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory / "model.safetensors"


def test_weights_that_are_missing_are_not_made_up(
    tiny_llama: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = damaged(tiny_llama, world_tokenizer, tmp_path)
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    for load in (load_policy, load_scalar_model):
        head = {"new_head": True} if load is load_scalar_model else {}
        with pytest.raises(UserError, match=r"lacks weights.*: model\.layers\.1\.mlp\.up_proj"):
            load(str(tmp_path), world_tokenizer, **head)


@pytest.mark.parametrize("how", ["cut off", "empty", "another shape"])
def test_files_that_are_no_weights(
    tiny_llama: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, how: str
) -> None:
    file = damaged(tiny_llama, world_tokenizer, tmp_path)
    if how == "another shape":
        weights = load_file(file)
        weights["lm_head.weight"] = weights["lm_head.weight"][:, 1:].contiguous()
        save_file(weights, file, metadata={"format": "pt"})
    else:
        file.write_bytes(file.read_bytes()[:5000] if how == "cut off" else b"")
    with pytest.raises(UserError, match="no model could be loaded from"):
        load_policy(str(tmp_path), world_tokenizer)


def test_another_vocabulary_is_refused(
    tiny_world: Path, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    other = copy.deepcopy(world_tokenizer)
    other.add_tokens(["<another>"])
    base = str(tiny_world / "base")
    require_same_tokens(base, world_tokenizer, "reference", "policy")
    with pytest.raises(UserError, match=r"reference: .*base has another vocabulary than policy"):
        require_same_tokens(base, other, "reference", "policy")
