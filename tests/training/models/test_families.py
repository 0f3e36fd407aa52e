"""Every causal family of transformers: as its own forward says, or refused.

Each gets a tiny config, made by shrinking the fields that say sizes, nested ones too. Where a
family scales or caps something, or has noise of its own, it does so here. What is accepted must be
equal in every way in which a policy is used: scored in padded batches, in training mode, and drawn
from.
"""

import dataclasses
import re
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from step3_rlhf.rollout import _plain_generation
from training.data import pad_prompts
from training.errors import UserError
from training.models.loading import as_policy
from training.models.policy import Policy

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

NOT_TINY: dict[str, str] = {}
REFUSED: dict[str, str] = {}


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


class Forced(LogitsProcessor):
    """Draws given tokens."""

    def __init__(self, tokens: list[list[int]], prompt_length: int) -> None:
        self.tokens, self.prompt_length = torch.tensor(tokens), prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_length
        return torch.full_like(scores, -torch.inf).scatter(1, self.tokens[:, step : step + 1], 0.0)


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
    with _plain_generation(policy.eval().model) as plain:
        output = plain.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=2, do_sample=False, use_cache=True,
            pad_token_id=3, eos_token_id=2, output_logits=True, return_dict_in_generate=True,
            logits_processor=LogitsProcessorList([Forced(drawn, 6)]),
        )  # fmt: skip
    for step, logits in enumerate(output.logits):
        for row, prompt in enumerate(prompts):
            found = logits[row].double().log_softmax(-1)
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
