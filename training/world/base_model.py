"""The base model of the bundled world: a sentencepiece tokenizer and a tiny Llama."""

import io
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from training.world.prompts import prompts
from training.world.topics import TOPICS

if TYPE_CHECKING:
    from transformers import LlamaTokenizer

MAX_LENGTH = 512
"""Tokens that the base model can attend to."""

VOCABULARY_SIZE = 896


def build_tokenizer(vocab_size: int = VOCABULARY_SIZE) -> "LlamaTokenizer":
    """Build a Llama tokenizer with distinct pad, BOS, EOS and unknown tokens."""
    from transformers import LlamaTokenizer

    with tempfile.TemporaryDirectory() as directory:
        # Read from the sentencepiece file, as AutoTokenizer does for any Llama.
        (Path(directory) / "tokenizer.model").write_bytes(sentencepiece_model(vocab_size))
        return LlamaTokenizer.from_pretrained(
            directory, pad_token="<pad>", add_bos_token=True, model_max_length=MAX_LENGTH
        )


def write_base_model(directory: Path, seed: int, vocab_size: int) -> None:
    """Write the tokenizer and a randomly initialised Llama of about 0.8 M parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(sentencepiece_model(vocab_size))
    tokenizer = build_tokenizer(vocab_size)
    tokenizer.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(directory)


@lru_cache(maxsize=4)
def sentencepiece_model(vocab_size: int) -> bytes:
    """Train a byte-fallback BPE model on the training prompts and the answers.

    Nothing is normalised, so decoding an encoded text restores it.
    """
    import sentencepiece

    corpus = [
        f"\n\nHuman: {prompt}\n\nAssistant: {answer.text}"
        for index, topic in enumerate(TOPICS)
        for prompt in prompts(index, evaluation=False)
        for answer in topic.answers
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        pad_piece="<pad>",
        minloglevel=2,
    )
    return model.getvalue()
