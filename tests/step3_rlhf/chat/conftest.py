"""Models that answer: a random one, and one whose distribution of answers is known."""

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

KNOWN = {"Tea": 0.7, "Coffee": 0.3}
"""The first token's distribution of the model `two_answers`; the second is always the end."""


@pytest.fixture(scope="session")
def two_answers(
    tmp_path_factory: pytest.TempPathFactory, world_tokenizer: PreTrainedTokenizerBase
) -> Path:
    """A Llama whose layers add nothing: the next token depends on the last one alone.

    Embeddings are unit vectors, which the last norm scales by the root of the width: one vector for
    the two answers, after which the end follows, and one for all other tokens.
    """
    torch.manual_seed(0)
    width = 16
    config = LlamaConfig(
        vocab_size=len(world_tokenizer),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        rms_norm_eps=1e-12,
        pad_token_id=world_tokenizer.pad_token_id,
        bos_token_id=world_tokenizer.bos_token_id,
        eos_token_id=world_tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    tokens = answer_tokens(world_tokenizer)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings, head = model.model.embed_tokens.weight, model.lm_head.weight
        embeddings.zero_()
        embeddings[:, 0] = 1.0
        embeddings[tokens] = torch.eye(width)[1]
        head.zero_()
        head[:, :2] = -60.0
        for token, share in zip(tokens, KNOWN.values(), strict=True):
            head[token, 0] = math.log(share)
        head[world_tokenizer.eos_token_id, 1] = 0.0
        head /= math.sqrt(width)
    directory = tmp_path_factory.mktemp("models") / "two_answers"
    model.save_pretrained(directory)
    world_tokenizer.save_pretrained(directory)
    return directory


def answer_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Two whole words of the vocabulary, which stand for the answers."""
    words = [token for token in sorted(tokenizer.get_vocab()) if token[1:].isalpha()]
    return [tokenizer.convert_tokens_to_ids(word) for word in (words[0], words[-1])]
