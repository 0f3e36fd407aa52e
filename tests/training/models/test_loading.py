"""What is loaded is whole, of the right kind, and has an EOS that it can learn."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForSequenceClassification,
)

from training.errors import UserError
from training.models.checks import (
    check_policy,
    check_positions,
    check_scalar,
    require_same_tokens,
)
from training.models.loading import load_policy, load_reward_model, load_scalar_model
from training.models.options import LoadOptions
from training.models.pretrained import Pretrained, reads_pairs
from training.models.scalar import ScalarModel

PAD, EOS = 3, 2


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
    tokenizer = Pretrained(str(tmp_path)).tokenizer
    assert tokenizer.pad_token_id == 5 != tokenizer.eos_token_id == 2
    before = LlamaForCausalLM.from_pretrained(tmp_path)
    for loaded in (
        load_policy(Pretrained(str(tmp_path)), tokenizer),
        load_scalar_model(Pretrained(str(tmp_path)), tokenizer, new_head=True),
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
    tokenizer = Pretrained(str(tmp_path)).tokenizer
    assert (tokenizer.pad_token_id, len(tokenizer)) == (1, 5)
    assert (
        load_policy(Pretrained(str(tmp_path)), tokenizer)
        .model.get_input_embeddings()
        .num_embeddings
        == 5
    )


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, pad_token="<s>")
    with pytest.raises(UserError, match="has no EOS token"):
        _ = Pretrained(str(tmp_path)).tokenizer


def test_directories_that_hold_nothing_usable(tmp_path: Path, world_tokenizer) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        _ = Pretrained(str(tmp_path)).tokenizer
    with pytest.raises(UserError, match="no model config could be loaded"):
        load_policy(Pretrained(str(tmp_path)), world_tokenizer)


def test_pickled_weights_are_refused(tmp_path: Path, world_tokenizer) -> None:
    write_model(tmp_path)
    weights = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="no model could be loaded"):
        load_policy(Pretrained(str(tmp_path)), world_tokenizer)


def test_a_quantized_model_is_refused_before_its_weights_are_loaded(
    tiny_world: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_world / "base", model)
    saved = json.loads((model / "config.json").read_text())
    saved["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (model / "config.json").write_text(json.dumps(saved))
    (model / "model.safetensors").unlink()
    for check in (check_policy, lambda name: check_scalar(name, new_head=True)):
        with pytest.raises(UserError, match=r"is quantized \(gptq\)"):
            check(Pretrained(str(model)))


def test_a_new_reward_head_prefers_nothing(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, eos_token="</s>", pad_token="<s>")
    write_model(tmp_path)
    model = load_scalar_model(
        Pretrained(str(tmp_path)), Pretrained(str(tmp_path)).tokenizer, new_head=True
    )
    ids = torch.tensor([[3, 4, 2], [4, 4, 2]])
    assert model.rewards(ids, torch.ones_like(ids)).tolist() == [0.0, 0.0]


def test_a_language_model_is_no_reward_model_and_the_reverse(
    tmp_path: Path, world_tokenizer
) -> None:
    write_model(tmp_path / "causal")
    write_model(tmp_path / "scalar", LlamaForSequenceClassification, num_labels=1)
    with pytest.raises(UserError, match="not a sequence-classification model"):
        load_scalar_model(Pretrained(str(tmp_path / "causal")), world_tokenizer)
    with pytest.raises(UserError, match="not a language model"):
        load_policy(Pretrained(str(tmp_path / "scalar")), world_tokenizer)


def test_a_trained_reward_head_is_kept(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, eos_token="</s>", pad_token="<s>")
    write_model(tmp_path, LlamaForSequenceClassification, num_labels=1)
    own = LlamaForSequenceClassification.from_pretrained(tmp_path).score.weight
    loaded = load_scalar_model(
        Pretrained(str(tmp_path)), Pretrained(str(tmp_path)).tokenizer
    ).model.score.weight
    assert own.abs().max() > 0
    assert torch.equal(own, loaded)


def test_a_classifier_of_two_labels_is_no_reward_model(tmp_path: Path, world_tokenizer) -> None:
    write_model(tmp_path, LlamaForSequenceClassification, num_labels=2)
    with pytest.raises(UserError, match="2 labels; a reward model has one"):
        load_scalar_model(Pretrained(str(tmp_path)), world_tokenizer)


def test_dropout_is_off_unless_asked_for(
    tiny_opt: PreTrainedModel, tmp_path: Path, world_tokenizer
) -> None:
    tiny_opt.save_pretrained(tmp_path)
    input_ids = torch.tensor([[1, 17, 33, 9, 40, 2], [1, 21, 50, 8, 60, 2]])
    attention_mask = torch.ones_like(input_ids)
    scored = attention_mask.cumsum(-1) > 1

    def twice(dropout: bool) -> tuple[torch.Tensor, torch.Tensor]:
        policy = load_policy(
            Pretrained(str(tmp_path)), world_tokenizer, LoadOptions(dropout=dropout)
        ).train()
        return tuple(policy(input_ids, attention_mask, scored)[0] for _ in range(2))

    assert torch.equal(*twice(dropout=False))
    assert not torch.equal(*twice(dropout=True))


def test_gradient_checkpointing_changes_no_gradient(
    tiny_llama: PreTrainedModel, tmp_path: Path, world_tokenizer
) -> None:
    tiny_llama.save_pretrained(tmp_path)
    input_ids = torch.tensor([[1, 17, 33, 9, 40, 2], [1, 21, 50, 8, 60, 2]])
    attention_mask = torch.ones_like(input_ids)
    scored = attention_mask.cumsum(-1) > 1
    gradients = []
    for checkpointing in (False, True):
        policy = load_policy(
            Pretrained(str(tmp_path)),
            world_tokenizer,
            LoadOptions(gradient_checkpointing=checkpointing),
        )
        policy.train()(input_ids, attention_mask, scored)[0].sum().backward()
        gradients.append(policy.model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*gradients)


def test_the_worlds_base_model_loads(tiny_world: Path, world_tokenizer) -> None:
    assert AutoTokenizer.from_pretrained(tiny_world / "base").pad_token_id == PAD
    assert (
        load_policy(Pretrained(str(tiny_world / "base")), world_tokenizer).model.config.pad_token_id
        == PAD
    )


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
    model = load_scalar_model(
        Pretrained(str(tmp_path)), world_tokenizer, LoadOptions(dtype=torch.bfloat16)
    )
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
    check_positions(Pretrained(str(tmp_path)), {"a": known})
    with pytest.raises(UserError, match=rf"knows {known} positions:\n  - b is {known + 1} tokens$"):
        check_positions(Pretrained(str(tmp_path)), {"a": known, "b": known + 1})


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
            load(Pretrained(str(tmp_path)), world_tokenizer, **head)


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
        load_policy(Pretrained(str(tmp_path)), world_tokenizer)


def words(directory: Path, *names: str, eos: str = "</s>", added: tuple[str, ...] = ()) -> str:
    """A model directory with a tokenizer of these words, and of added tokens after them."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, "<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token=eos, pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    write_model(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def test_other_words_and_ends_are_refused_but_not_other_names_of_added_tokens(
    tmp_path: Path,
) -> None:
    usual = ("<unk>", "<pad>", "</s>", "yes", "no")
    policy = Pretrained(words(tmp_path / "policy", *usual, added=("<a>", "<b>"))).tokenizer

    def renamed(name: str, *names: str, **options: Any) -> set[str]:
        path = words(tmp_path / name, *names, **options)
        named = Pretrained("policy", tokenizer=policy)
        return require_same_tokens(Pretrained(path), named, "reference")

    assert renamed("same", *usual, added=("<a>", "<b>")) == set()
    assert renamed("reserved", *usual, added=("<reserved_0>", "<b>")) == {"<a>"}
    assert renamed("fewer", *usual, added=("<a>",)) == {"<b>"}
    assert renamed("more", *usual, added=("<a>", "<b>", "<c>")) == set()
    for name, added in (("moved", ("<b>", "<a>")), ("among others", ("<new>", "<a>"))):
        with pytest.raises(UserError, match=r"another vocabulary than .*; '<[ab]>' is one"):
            renamed(name, *usual, added=added)
    with pytest.raises(UserError, match=r"reference: .* has another vocabulary.*'maybe'"):
        renamed("another word", *usual[:-1], "maybe", added=("<a>", "<b>"))
    with pytest.raises(UserError, match=r"reference: .* has another vocabulary.*'no'"):
        renamed("swapped", *usual[:3], "no", "yes", added=("<a>", "<b>"))
    with pytest.raises(UserError, match=r"another vocabulary than .*: its BOS or EOS"):
        renamed("another end", *usual, eos="no", added=("<a>", "<b>"))


def tiny_bert(directory: Path) -> str:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32, num_labels=1,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(directory)
    return str(directory)


def test_a_reward_model_may_have_a_head_of_any_kind_a_critic_may_not(tmp_path: Path) -> None:
    tokenizer = Pretrained(_short(tmp_path), scores_only=True).tokenizer
    path = tiny_bert(tmp_path / "bert")
    ids = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    own = BertForSequenceClassification.from_pretrained(path)(ids, mask).logits[:, 0]
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.02)):
        model = load_reward_model(
            Pretrained(path, scores_only=True, tokenizer=tokenizer), LoadOptions(dtype=dtype)
        ).to(dtype)
        found = model(ids, mask)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, own, rtol=0, atol=tolerance)
    assert not torch.equal(found, found.bfloat16().float())  # finer than bfloat16 can say
    with pytest.raises(UserError, match="has no linear head named 'score'"):
        load_scalar_model(Pretrained(path), tokenizer)
    assert not Pretrained(path).has_linear_score
    write_model(tmp_path / "llama", LlamaForSequenceClassification, num_labels=1)
    assert Pretrained(str(tmp_path / "llama")).has_linear_score
    assert isinstance(
        load_reward_model(
            Pretrained(str(tmp_path / "llama"), scores_only=True, tokenizer=tokenizer),
            LoadOptions(),
        ),
        ScalarModel,
    )


def _short(directory: Path) -> str:
    """A tokenizer as BERT's, without an EOS."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, "[UNK]"))
    BertTokenizerFast(tokenizer_object=backend).save_pretrained(directory / "pairs")
    return str(directory / "pairs")


def test_added_words_are_words(tmp_path: Path) -> None:
    usual = ("<unk>", "<pad>", "</s>", "yes", "no")
    policy, other = (words(tmp_path / name, *usual) for name in ("policy", "other"))
    for path, word in ((policy, "zebra"), (other, "horse")):
        tokenizer = Pretrained(path).tokenizer
        tokenizer.add_tokens([word])
        tokenizer.save_pretrained(path)
    with pytest.raises(UserError, match=r"another vocabulary than .*policy; 'horse' is one"):
        require_same_tokens(Pretrained(other), Pretrained(policy), "reference")


def test_what_cannot_be_a_reward_model_is_said(tmp_path: Path, world_tokenizer) -> None:
    T5ForSequenceClassification(
        T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, num_labels=1)
    ).save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match="t5 is an encoder-decoder"):
        load_reward_model(
            Pretrained(str(tmp_path / "t5"), scores_only=True, tokenizer=world_tokenizer),
            LoadOptions(),
        )
    with pytest.raises(UserError, match="a mamba model has no AutoModelForSequenceClassification"):
        _ = Pretrained("m", config=MambaConfig(num_hidden_layers=1, hidden_size=8)).has_linear_score


def edited(directory: Path, file: str, **changes: object) -> Pretrained:
    """A Llama with its tokenizer, some of whose settings are other ones."""
    write_tokenizer(directory, bos_token="<s>", eos_token="</s>", pad_token="<unk>")
    write_model(directory)
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return Pretrained(str(directory))


@pytest.mark.parametrize("pad", [-1, 5, 32000])
def test_a_pad_token_beyond_the_embeddings_is_not_the_models(tmp_path: Path, pad: int) -> None:
    """Llamas of the first year: config.json says 32000 or −1, and there are 32,000 tokens."""
    pretrained = edited(tmp_path, "config.json", pad_token_id=pad)
    policy = load_policy(pretrained, pretrained.tokenizer)
    assert policy.model.config.pad_token_id == pretrained.tokenizer.pad_token_id == 0


def test_settings_of_generation_that_could_not_be_saved(tmp_path: Path, capsys) -> None:
    """transformers refuses them when a changed model is saved: at the end of the run."""
    pretrained = edited(tmp_path, "config.json")
    contradictory = {"do_sample": False, "temperature": 0.9, "top_p": 0.6}  # as Llama-2 had
    (tmp_path / "generation_config.json").write_text(json.dumps(contradictory))
    as_it_is = LlamaForCausalLM.from_pretrained(tmp_path)
    as_it_is.generation_config.eos_token_id = EOS
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        as_it_is.save_pretrained(tmp_path / "as it is")
    policy = load_policy(pretrained, pretrained.tokenizer)
    assert "generation_config.json is left out of exports" in capsys.readouterr().out
    policy.model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == EOS
    assert "temperature" not in saved


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "auto"}, "no model config could be loaded from"),
        (
            {"vocab_size": 4},
            r"could be loaded .*: model\.embed_tokens\.weight is \[5, 8\], and config\.json "
            r"says \[4, 8\]",
        ),
    ],
)
def test_configs_that_are_not_of_these_weights(
    tmp_path: Path, world_tokenizer, changes: dict, message: str
) -> None:
    pretrained = edited(tmp_path, "config.json", **changes)
    with pytest.raises(UserError, match=message):
        load_policy(pretrained, world_tokenizer)


def test_a_config_that_is_a_list(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="no model config could be loaded"):
        _ = Pretrained(str(tmp_path)).config


def test_a_tokenizer_that_joins_pairs_needs_no_end(tmp_path: Path) -> None:
    assert reads_pairs(Pretrained(_short(tmp_path), scores_only=True).tokenizer)
    with pytest.raises(UserError, match="has no EOS token"):
        _ = Pretrained(_short(tmp_path)).tokenizer


def test_weights_without_a_place_are_said(
    tiny_llama: PreTrainedModel, world_tokenizer, tmp_path: Path, capsys
) -> None:
    file = damaged(tiny_llama, world_tokenizer, tmp_path)
    load_policy(Pretrained(str(tmp_path)), world_tokenizer)
    load_scalar_model(
        Pretrained(str(tmp_path)), world_tokenizer, new_head=True
    )  # lm_head is expected
    assert capsys.readouterr().out == ""
    weights = load_file(file) | {"v_head.summary.weight": torch.ones(1, 32)}
    save_file(weights, file, metadata={"format": "pt"})
    load_policy(Pretrained(str(tmp_path)), world_tokenizer)
    assert "1 weights have no place in the model: v_head.summary.weight" in capsys.readouterr().out
