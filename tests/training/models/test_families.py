"""Every causal family of transformers: as its own forward says, or refused.

Each gets a tiny config, made by shrinking the fields that say sizes, nested ones too. Where a
family scales or caps something, or adds noise, it does so here. What is accepted must be
equal in every way in which a policy is used: scored in padded batches, in training mode, and drawn
from.
"""

import copy
import dataclasses
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from training.data import pad_prompts
from training.errors import UserError
from training.models.families.generation import logits_while_drawing
from training.models.loading import as_policy, load_reward_model, load_scalar_model
from training.models.options import LoadOptions
from training.models.partitioned import is_partitioned
from training.models.policy import Policy
from training.models.pretrained import Pretrained
from training.models.scalar import Classifier
from training.runtime import engine
from training.runtime.random_states import random_states
from training.stage_config import LoraSettings

SIZES = {
    64: "vocab_size max_position_embeddings n_positions n_ctx max_seq_len context_length "
    "vocab_size_per_layer_input max_source_positions max_target_positions "
    "pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab ngram_vocab_size_base "
    "index_topk rel_extent prompt_mid_dim sliding_window_size unpadded_vocab_size",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner "
    "intermediate_size_mlp ffn_hidden_size dense_intermediate_size feed_forward_size",
    32: "hidden_size d_model n_embd emb_dim dim kv_lora_rank q_lora_rank embedding_size "
    "input_embedding_size output_embedding_size o_lora_rank word_embed_proj_dim "
    "backbone_hidden_size num_centroids router_hidden_size hc_lowrank adapter_rank lru_width "
    "hidden_size_global",
    16: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "shared_experts_intermediate_size moe_shared_expert_intermediate_size "
    "expert_ffn_hidden_size swa_head_dim linear_key_head_dim linear_value_head_dim "
    "index_head_dim linear_head_dim laurel_rank hidden_size_per_layer_input state_size "
    "ssm_state_size mamba_d_state gated_norm_rank centroid_intermediate_top_k "
    "pronunciation_embed_dim shape_embed_dim attention_window_size ffn_round_up_to_multiple_of "
    "chunk_size mamba_chunk_size global_head_dim local_attn_chunk_length lsh_attn_chunk_length "
    "d_rel indexer_head_dim",
    8: "head_dim dim_head qk_rope_head_dim qk_nope_head_dim v_head_dim rotary_dim "
    "attention_head_size kv_channels num_mel_bins",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
    "encoder_attention_heads attention_heads num_decoder_attention_heads "
    "num_encoder_attention_heads swa_num_attention_heads num_experts n_routed_experts "
    "num_local_experts moe_num_experts index_n_heads linear_num_key_heads linear_num_value_heads "
    "linear_num_heads mamba_num_heads mamba_n_heads n_mamba_heads zero_expert_num",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
    "num_encoder_layers num_decoder_layers num_key_value_heads swa_num_key_value_heads "
    "num_experts_per_tok moe_topk moe_k o_groups n_groups n_layers_per_attn_res_block "
    "index_topk_blocks heads_per_ngram split_ngram_parts mamba_n_groups layer_group_size",
    1: "n_group topk_group num_ngram_embeddings",
}  # fmt: skip
SIZE_OF = {name: size for size, names in SIZES.items() for name in names.split()}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
AS_POLICY = {"is_decoder": True, "add_cross_attention": False}
ODD = {
    r".*(softcap|soft_cap).*": 2.0,
    r".*(lm_head_multiplier|logit_scale|logits_scaling|embedding_multiplier)": 0.4,
    r".*jitter.*": 0.3,
}
"""What families do to logits, states or routers, by the names of the fields that say so."""


def tiny(cls: type[PretrainedConfig]) -> dict[str, Any]:
    """Arguments that make a config small, odd and a decoder's."""
    chosen: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        name, default = field.name, field.default
        if name in SIZE_OF and isinstance(default, int):
            chosen[name] = SIZE_OF[name]
        elif name in TOKENS or name in AS_POLICY:
            chosen[name] = (TOKENS | AS_POLICY)[name]
        elif "drop" in name and isinstance(default, float):
            chosen[name] = 0.0  # as `load_policy` reads it
        for pattern, value in ODD.items():
            if re.fullmatch(pattern, name):
                chosen[name] = value
    if "kv_lora_rank" in chosen:  # as many keys as queries
        chosen["num_key_value_heads"] = 4
    for name, sub in cls.sub_configs.items():
        if dataclasses.is_dataclass(sub):
            chosen[name] = tiny(sub)
    return chosen


def nested(kind: str, **more: Any) -> dict[str, Any]:
    """A nested config of a kind that the outer one leaves open."""
    return {"model_type": kind, **tiny(CONFIG_MAPPING[kind]), **more}


INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 32,
    "indexer_compress_ratio": 4,
}
ONE_LAYER_OF_EACH = ["linear_attention", "hybrid"]
MORE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "fuyu": {"text_config": nested("persimmon")},
    "gemma3": {"vision_config": nested("siglip_vision_model")},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "got_ocr2": {"text_config": nested("qwen2")},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "inkling2_text": {"vocab_size": 72},
    "jamba": {"num_hidden_layers": 8},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm3": {"num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "moshi": {"audio_vocab_size": 64},
    "gemma4_unified_assistant": {"text_config": nested("gemma4_unified_text")},
    "moss_transcribe_diarize": {"text_config": nested("qwen3")},
    "nemotron": {"num_key_value_heads": 2},
    "qwen3_5": {"text_config": nested("qwen3_5_text", num_hidden_layers=4)},
    "qwen3_5_moe": {"text_config": nested("qwen3_5_moe_text", num_hidden_layers=4)},
    "qwen3_5_moe_text": {"num_hidden_layers": 4},
    "qwen3_5_text": {"num_hidden_layers": 4},
    "qwen3_next": {"num_hidden_layers": 4},
    "qwen4_exp": {"text_config": nested("qwen4_exp_text", num_hidden_layers=4, **INDEXER)},
    "qwen4_exp_text": {"num_hidden_layers": 4, **INDEXER},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (16, 16),
        "attn_layers": ["local", "lsh"],
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ONE_LAYER_OF_EACH * 2},
    "zamba2": {"layers_block_type": ONE_LAYER_OF_EACH},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family needs beside small sizes."""

DRAFTER = "drafts for another model, from that model's own states"
MUSIC = "continues codebooks of sound; its own config has no text decoder"
NOT_TINY = {
    "dots3_note": "its config insists on settings of layers that a small one does not have",
    "gemma3n": "needs timm for pictures; gemma3n_text is its language model",
    "gemma4_assistant": DRAFTER,
    "gemma4_unified_assistant": DRAFTER,
    "musicgen": MUSIC,
    "musicgen_melody": MUSIC,
}
"""What cannot be made small, or not without another library."""

LEFT = "padded on the left differ"
"""Its positions or its state count the padding."""
REFUSED = {
    **dict.fromkeys(
        "bart bigbird_pegasus blenderbot blenderbot-small blt cpmant marian mbart mvp pegasus "
        "plbart recurrent_gemma rwkv trocr xlm xlnet xlstm".split(),
        LEFT,
    ),
    # Their positions begin after the padding token's id.
    **dict.fromkeys(
        "camembert data2vec-text roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl "
        "xmod".split(),
        "without padding differ",
    ),
    **dict.fromkeys(["git", "whisper"], "tokens that are drawn after prompts of different lengths"),
    "prophetnet": "cannot be computed as they are in training: IndexError",
    "reformer": "cannot be computed in training mode: ValueError: If training",
}
"""With a part of the message."""


def build(family: str, **changes: Any) -> PreTrainedModel:
    """A random model with distributions that are not almost uniform."""
    cls = CONFIG_MAPPING[family]
    config = cls(**tiny(cls) | MORE.get(family, {}) | changes)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
            elif "bias" in name:
                parameter.normal_(std=0.3)
    return model


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """A word for every id."""
    words = ["<unk>", "<s>", "</s>", "<pad>", *(f"w{k}" for k in range(4, 64))]
    backend = Tokenizer(WordLevel({word: k for k, word in enumerate(words)}, "<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


TEXT = [5, 33, 17, 60 - 1, 8, 41, 26, 12, 50]


@torch.no_grad()
def largest_difference(model: PreTrainedModel, policy: Policy) -> float:
    """In nats, between the model's own logits and whatever a policy is used for."""
    own = model.eval()(input_ids=torch.tensor([TEXT])).logits[0].double().log_softmax(-1)
    expected = own[:-1].gather(1, torch.tensor(TEXT[1:])[:, None]).squeeze(1)
    rows = [TEXT, TEXT[:5], TEXT[:7]]
    gaps = []
    ids, mask = pad_prompts(rows, 3)
    for left in (True, False):
        if not left:  # the same on the right
            ids = torch.stack([row.roll(int(m.sum())) for row, m in zip(ids, mask, strict=True)])
            mask = mask.flip(1)
        scored = (mask == 1) & (mask.cumsum(-1) > 1)
        for training in (False, True):
            logp, entropy = policy.train(training)(ids, mask, scored, with_entropy=True)
            for row, text in enumerate(rows):
                found = logp[row][scored[row]].double()
                gaps.append((found - expected[: len(text) - 1]).abs().max())
                entropies = -(own.exp() * own).sum(-1)[: len(text) - 1]
                gaps.append((entropy[row][scored[row]] - entropies).abs().max())
    prompts, drawn = [TEXT[:6], TEXT[:4]], [TEXT[6:8], TEXT[4:6]]
    ids, mask = pad_prompts(prompts, 3)
    drawing = logits_while_drawing(policy.eval().model, ids, mask, torch.tensor(drawn), 3)
    for row, prompt in enumerate(prompts):
        for step in range(2):
            found = drawing[row, step].double().log_softmax(-1)
            gaps.append((found - own[len(prompt) - 1 + step]).abs().max())
    return torch.stack([gap.double() for gap in gaps]).max().item()


@cache
def outcome(family: str) -> tuple[str, str]:
    """What becomes of a family, and why or how well."""
    try:
        model = build(family)
    except Exception as error:
        return "not tiny", f"{type(error).__name__}: {error}"
    try:
        policy = as_policy(model, family, tokenizer())
    except UserError as error:
        return "refused", str(error)
    how = "" if policy._own_head is None else "own head, "
    how += "noise off, " if policy.noiseless else ""
    return "accepted", f"{how}{largest_difference(model, policy):.0e}"


FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
TIGHT = 1e-4
"""Nats, in float32."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_as_its_own_forward_says_or_refused(family: str) -> None:
    result, detail = outcome(family)
    if family in NOT_TINY:
        assert result == "not tiny", detail
    elif family in REFUSED:
        assert result == "refused", detail
        assert detail.startswith(f"{family}: ")
        assert REFUSED[family] in detail
    else:
        assert result == "accepted", detail
        assert float(detail.split(", ")[-1]) < TIGHT


def test_all_families_are_accounted_for() -> None:
    """`-s` shows the table."""
    table = {family: outcome(family) for family in FAMILIES}
    for family, (result, detail) in table.items():
        print(f"{family:26} {result:9} {NOT_TINY.get(family, detail)}")
    counts = Counter(result for result, _ in table.values())
    print(dict(counts))
    assert counts["not tiny"] == len(NOT_TINY)
    assert counts["refused"] == len(REFUSED)
    assert counts["accepted"] == len(FAMILIES) - len(NOT_TINY) - len(REFUSED) >= 150
    own_heads = {family for family, (_, detail) in table.items() if "own head" in detail}
    assert own_heads >= {
        "cohere", "cohere2", "falcon_h1", "gemma2", "gemma3_text", "gemma3n_text", "gemma4",
        "granite", "granitemoe", "nanochat", "vaultgemma",
    }  # fmt: skip
    quiet = {family for family, (_, detail) in table.items() if "noise off" in detail}
    assert quiet >= {"minimax", "minimax_m2", "mixtral", "phimoe"}
    assert not quiet & {"llama", "gpt2", "qwen2", "qwen3", "mistral", "gemma2"}


def wrong_difference(policy: Policy) -> float:
    """Without what the family does after its head."""
    policy._own_head = None
    return largest_difference(policy.model, policy)


@pytest.mark.parametrize("family", ["cohere", "falcon_h1", "gemma2", "gemma3n_text", "granite"])
def test_a_plain_head_would_be_wrong(family: str) -> None:
    policy = as_policy(build(family), family, tokenizer())
    assert wrong_difference(policy) > 0.01


def test_logits_that_are_capped_far_above_what_they_are_now() -> None:
    """A cap of 30 changes nothing of small logits; training makes them large."""
    model = build("gemma2", final_logit_softcapping=30.0)
    policy = as_policy(model, "gemma2", tokenizer())
    assert policy._own_head is not None


@pytest.mark.parametrize("family", ["cohere", "gemma2", "falcon_h1", "xlstm", "electra"])
def test_gradients_are_those_of_the_own_forward(family: str) -> None:
    """Through the checkpointed head, to the embeddings."""
    model = build(family)
    ids = torch.tensor([TEXT])
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[0, 0] = False
    gradients = []
    for own in (True, False):
        model.zero_grad()
        if own:
            logits = model.train()(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            logits.gather(1, ids[0, 1:, None]).sum().backward()
        else:
            Policy(model).train()(ids, torch.ones_like(ids), scored)[0].sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad.clone())
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_a_batch_without_anything_scored_has_a_graph() -> None:
    """Ranks with fillers only take part in the backward pass, with an own head as well."""
    policy = Policy(build("cohere"))
    ids = torch.tensor([TEXT])
    logp, _ = policy.train()(ids, torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool))
    logp.sum().backward()
    assert logp.sum() == 0
    assert all((p.grad == 0).all() for p in policy.parameters() if p.grad is not None)


def test_a_decoder_that_sees_what_comes_is_refused() -> None:
    """BERT without `is_decoder` reads both ways: a token's log-probability knows the token."""
    with pytest.raises(UserError, match=r"^bert: log-probabilities of a text padded on the left"):
        as_policy(build("bert", is_decoder=False), "bert", tokenizer())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mamba", "mixtral", "recurrent_gemma"])
def test_reduced_precision_is_neither_refused_nor_an_excuse(
    family: str, dtype: torch.dtype
) -> None:
    model = build(family).to(dtype)
    if family in REFUSED:
        with pytest.raises(UserError, match=f"{LEFT} by up to"):
            as_policy(model, family, tokenizer())
    else:
        assert as_policy(model, family, tokenizer()).model.dtype == dtype


def passes(policy: Policy) -> list[torch.Tensor]:
    ids = torch.tensor([TEXT, TEXT[::-1]])
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, 0] = False
    with torch.no_grad():
        return [policy.train()(ids, torch.ones_like(ids), scored)[0] for _ in range(2)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_noise_of_routers_is_off_in_training(checkpointing: bool) -> None:
    model = build("phimoe")
    first, second = passes(Policy(model))
    assert (first - second).abs().max() > 1e-3  # what the family does by itself
    options = LoadOptions(gradient_checkpointing=checkpointing)
    policy = as_policy(model, "phimoe", tokenizer(), options)
    assert torch.equal(*passes(policy))
    assert policy.training
    ids = torch.tensor([TEXT])
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[0, 0] = False
    policy(ids, torch.ones_like(ids), scored)[0].sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().max() > 0


def test_noise_that_a_few_tokens_do_not_show_is_off_too() -> None:
    """Routers with a clear choice take another expert now and then only."""
    model = build("phimoe", router_jitter_noise=0.001)
    policy = as_policy(model, "phimoe", tokenizer())
    assert policy.noiseless
    first, second = passes(policy)
    assert torch.equal(first, second)


def test_dropout_of_an_adapter_stays() -> None:
    """At first an adapter adds 0, and its dropout shows nothing."""
    lora = LoraSettings(r=2, lora_alpha=4, lora_dropout=0.5)
    policy = as_policy(build("llama"), "llama", tokenizer(), LoadOptions(lora=lora))
    assert not policy.noiseless


def test_noise_that_is_asked_for_stays() -> None:
    policy = as_policy(build("phimoe"), "phimoe", tokenizer(), LoadOptions(dropout=True))
    first, second = passes(policy)
    assert (first - second).abs().max() > 1e-3


class Restless(torch.nn.Module):
    """Noise that does not ask whether it is training."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.norm(states) + 0.05 * torch.randn_like(states)


def test_noise_that_cannot_be_switched_off_is_refused() -> None:
    model = build("llama")
    model.model.norm = Restless(model.model.norm)
    with pytest.raises(UserError, match=r"^m: log-probabilities of .* nats"):
        as_policy(model, "m", tokenizer())


class Growing(Restless):
    """Does something else in training, the same each time."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.norm(states) * (1.5 if self.norm.training or self.training else 1.0)


def test_another_computation_in_training_mode_is_off_too() -> None:
    model = build("llama")
    model.model.norm = Growing(model.model.norm)
    policy = as_policy(model, "m", tokenizer())
    assert policy.noiseless
    assert largest_difference(model, policy) < TIGHT


def test_the_comparison_leaves_nothing_behind() -> None:
    """No random number is drawn, no mode changed."""
    model = build("phimoe")
    model.train()
    model.model.norm.eval()
    before = random_states()
    modes = [part.training for part in model.modules()]
    as_policy(model, "phimoe", tokenizer())
    assert torch.equal(random_states()["torch"], before["torch"])
    assert random_states()["python"] == before["python"]
    assert [part.training for part in model.modules()] == modes


@pytest.mark.parametrize("packing", [False, True])
def test_packed_and_adapted_models_are_compared_as_they_run(packing: bool) -> None:
    lora = LoraSettings(r=2, lora_alpha=4)
    policy = as_policy(
        build("llama"), "llama", tokenizer(), LoadOptions(packing=packing, lora=lora)
    )
    assert policy._packing == packing


def test_packing_that_mixes_rows_is_refused() -> None:
    """Mamba's state runs through a packed row, whatever the mask; it gets no position either."""
    with pytest.raises(UserError, match=r"^mamba: (log-probabilities|a few tokens)"):
        as_policy(build("mamba"), "mamba", tokenizer(), LoadOptions(packing=True))


def test_logits_of_fewer_ids_than_the_tokenizer_has() -> None:
    model = build("inkling2_text", unpadded_vocab_size=50)
    with pytest.raises(UserError, match="logits for 50 token ids, and its tokenizer has 64"):
        as_policy(model, "m", tokenizer())


# Reward models


def scalar(kind: str, **changes: Any) -> PreTrainedModel:
    cls = CONFIG_MAPPING[kind]
    config = cls(
        **tiny(cls) | MORE.get(kind, {}) | {"num_labels": 1, "is_decoder": False} | changes
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model


def saved(model: PreTrainedModel, directory: Path) -> Pretrained:
    model.save_pretrained(directory)
    return Pretrained(str(directory), tokenizer=copy.deepcopy(tokenizer()))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3", "mixtral", "bert", "deberta-v2"])
def test_reward_models_give_their_own_rewards(kind: str, tmp_path: Path) -> None:
    model = scalar(kind)
    reward = load_reward_model(saved(model, tmp_path), LoadOptions())
    own = model(input_ids=torch.tensor([TEXT])).logits[0]
    ids, mask = torch.tensor([[*TEXT, 3, 3], [3, 3, *TEXT][:11]]), torch.ones(2, 11).long()
    mask[0, 9:], mask[1, :2] = 0, 0
    with torch.no_grad():
        if isinstance(reward, Classifier):
            found = reward(ids[:1], mask[:1])
        else:
            found = reward.rewards(ids, mask)
    torch.testing.assert_close(found, own.expand(len(found)), rtol=0, atol=1e-4)


def test_a_reward_model_that_is_computed_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own forward scales the scalar, which a head on hidden states does not know."""
    pretrained = saved(scalar("llama"), tmp_path)
    real = LlamaForSequenceClassification.forward

    def scaled(self: PreTrainedModel, *arguments: Any, **named: Any) -> Any:
        output = real(self, *arguments, **named)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", scaled)
    with pytest.raises(UserError, match=r"rewards of a text without padding differ by up to \d"):
        load_reward_model(pretrained, LoadOptions())


def test_a_new_head_is_compared_before_it_is_zero(tmp_path: Path) -> None:
    pretrained = saved(build("opt", word_embed_proj_dim=32), tmp_path)
    critic = load_scalar_model(pretrained, tokenizer(), new_head=True)
    assert not critic.model.score.weight.any()


@pytest.mark.parametrize("family", ["cohere", "gemma2"])
def test_an_own_head_of_a_partitioned_model(process_group: None, family: str) -> None:
    """ZeRO-3 gathers its parameters where they are used."""
    ids = torch.tensor([TEXT])
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[0, 0] = False
    policy = as_policy(build(family), family, tokenizer())
    with torch.no_grad():
        own, _ = policy(ids, torch.ones_like(ids), scored)
    section = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    frozen = engine.frozen(policy, section, torch.float32)
    assert is_partitioned(frozen)
    with torch.no_grad():
        found, _ = frozen(ids, torch.ones_like(ids), scored)
    torch.testing.assert_close(found, own, rtol=0, atol=1e-5)
