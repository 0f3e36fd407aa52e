"""The bundled world: a synthetic population whose preferences are known exactly.

    python -m training.opinions --output_dir world --seed 1

writes ordinary files that go through the same loaders as a user's own data:

    texts.jsonl              {"prompt", "response"}: what the writers answered; SFT learns from it
    comparisons.jsonl        {"prompt", "chosen", "rejected"}: pairs of distinct answers, judged by
                             the population
    texts_eval.jsonl         the same for held-out phrasings of the questions
    comparisons_eval.jsonl   ... with "bayes_probability", the probability of the recorded choice
    response_sets.jsonl      per held-out prompt the finite response set and what is known about it
    base/                    a sentencepiece tokenizer and a tiny Llama with random weights

The population's utilities r* are the logarithms of its shares, so its Plackett-Luce shares are
softmax(r*), and it prefers answer i to j with probability sigmoid(r*_i - r*_j). The writers' shares
are far from the population's: KL-regularized RLHF ends at softmax(log writers + r*), preference
matching at softmax(r*).
"""

import argparse
import io
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from training.opinions_topics import OPENERS, PHRASINGS, TOPICS, Topic

if TYPE_CHECKING:
    from transformers import LlamaTokenizer

HELD_OUT_PHRASINGS = 4
"""Phrasings of each topic that no training file contains."""

MAX_LENGTH = 512
"""Tokens that the base model can attend to."""


@dataclass(frozen=True)
class WorldSizes:
    """How much of the world is written."""

    texts_per_prompt: int = 40
    comparisons_per_prompt: int = 64
    eval_texts_per_prompt: int = 8
    eval_comparisons_per_prompt: int = 64
    eval_openers: int = 2
    """The first so many openers are used with the held-out phrasings."""
    vocab_size: int = 896

    def __post_init__(self) -> None:
        if not 1 <= self.eval_openers <= len(OPENERS):
            raise ValueError(f"eval_openers: between 1 and {len(OPENERS)}")
        if min(vars(self).values()) < 1:
            raise ValueError("every size is at least 1")


def population_shares(topic: Topic) -> np.ndarray:
    """softmax(r*): the share of the population that prefers each answer, [n_answers]."""
    return np.array([answer.population for answer in topic.answers]) / 100


def writers_shares(topic: Topic) -> np.ndarray:
    """How often the writers give each answer, [n_answers]."""
    return np.array([answer.writers for answer in topic.answers]) / 100


def utilities(topic: Topic) -> np.ndarray:
    """r* = log population shares, which fixes the free constant, [n_answers]."""
    return np.log(population_shares(topic))


def preference_probability(topic: Topic, first: int, second: int) -> float:
    """P(first preferred to second) = sigmoid(r*_first - r*_second)."""
    gap = utilities(topic)[first] - utilities(topic)[second]
    return float(1 / (1 + np.exp(-gap)))


def kl_bias(topic: Topic) -> float:
    """Total variation between KL's optimum for a writers' reference and the population's shares.

    TV(softmax(log writers + r*), softmax(r*)), eq. (5.1) at beta = 1.
    """
    tilted = writers_shares(topic) * population_shares(topic)
    return float(np.abs(tilted / tilted.sum() - population_shares(topic)).sum() / 2)


def held_out(topic_index: int) -> tuple[int, ...]:
    """Indices into PHRASINGS that are this topic's held-out ones.

    They rotate from topic to topic, so that each phrasing is trained on with other topics.
    """
    stride = len(PHRASINGS) // HELD_OUT_PHRASINGS
    return tuple(
        sorted((topic_index + k * stride) % len(PHRASINGS) for k in range(HELD_OUT_PHRASINGS))
    )


def prompts(topic_index: int, evaluation: bool, openers: int = len(OPENERS)) -> list[str]:
    """A topic's training prompts, or those with its held-out phrasings."""
    topic = TOPICS[topic_index]
    with_article = f"{topic.article} {topic.noun}"
    return [
        opener + phrasing.format(a=with_article, noun=topic.noun)
        for index, phrasing in enumerate(PHRASINGS)
        if (index in held_out(topic_index)) == evaluation
        for opener in OPENERS[:openers]
    ]


def true_log_loss(comparisons: Iterable[Mapping[str, Any]]) -> float:
    """Log-loss in nats of the population's own probabilities on lines of comparisons_eval.jsonl."""
    return float(-np.mean([np.log(line["bayes_probability"]) for line in comparisons]))


def write_world(output_dir: str | Path, seed: int, sizes: WorldSizes | None = None) -> None:
    """Write the files and the base model; the same seed and sizes give the same bytes."""
    sizes = sizes or WorldSizes()
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines: dict[str, list[dict[str, Any]]] = {
        "texts": [],
        "comparisons": [],
        "texts_eval": [],
        "comparisons_eval": [],
        "response_sets": [],
    }
    for index, topic in enumerate(TOPICS):
        for prompt in prompts(index, evaluation=False):
            lines["texts"] += _texts(topic, prompt, sizes.texts_per_prompt, rng)
            for line in _comparisons(topic, prompt, sizes.comparisons_per_prompt, rng):
                del line["bayes_probability"]
                lines["comparisons"].append(line)
        for prompt in prompts(index, evaluation=True, openers=sizes.eval_openers):
            lines["texts_eval"] += _texts(topic, prompt, sizes.eval_texts_per_prompt, rng)
            lines["comparisons_eval"] += _comparisons(
                topic, prompt, sizes.eval_comparisons_per_prompt, rng
            )
            lines["response_sets"].append(_response_set(topic, prompt))
    for name, content in lines.items():
        rng.shuffle(content)  # type: ignore[arg-type]
        text = "".join(json.dumps(line) + "\n" for line in content)
        (output / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")
    write_base_model(output / "base", seed, sizes.vocab_size)


def _texts(topic: Topic, prompt: str, count: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    drawn = rng.choice(len(topic.answers), size=count, p=writers_shares(topic))
    return [{"prompt": prompt, "response": topic.answers[i].text} for i in drawn]


def _comparisons(
    topic: Topic, prompt: str, count: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    drawn = []
    for _ in range(count):
        first, second = (int(i) for i in rng.choice(len(topic.answers), size=2, replace=False))
        if rng.random() >= preference_probability(topic, first, second):
            first, second = second, first
        drawn.append(
            {
                "prompt": prompt,
                "chosen": topic.answers[first].text,
                "rejected": topic.answers[second].text,
                "bayes_probability": preference_probability(topic, first, second),
            }
        )
    return drawn


def _response_set(topic: Topic, prompt: str) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "topic": topic.name,
        "responses": [answer.text for answer in topic.answers],
        "opinions": [answer.opinion for answer in topic.answers],
        "population": population_shares(topic).tolist(),
        "writers": writers_shares(topic).tolist(),
        "utilities": utilities(topic).tolist(),
    }


def build_tokenizer(vocab_size: int = WorldSizes.vocab_size) -> "LlamaTokenizer":
    """A Llama tokenizer from `sentencepiece_model`; pad, BOS, EOS and unknown are distinct."""
    from transformers import LlamaTokenizer

    with tempfile.TemporaryDirectory() as directory:
        # Read from the sentencepiece file, as AutoTokenizer reads any Llama's.
        (Path(directory) / "tokenizer.model").write_bytes(sentencepiece_model(vocab_size))
        return LlamaTokenizer.from_pretrained(
            directory, pad_token="<pad>", add_bos_token=True, model_max_length=MAX_LENGTH
        )


def write_base_model(directory: Path, seed: int, vocab_size: int) -> None:
    """The tokenizer and a randomly initialised Llama of about 0.8 M parameters."""
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
    """A byte-fallback BPE model of the training prompts and the answers.

    Nothing is normalised, so that decoding an encoded text gives the text back.
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


def main(arguments: list[str] | None = None) -> None:
    """Command line: --output_dir DIR --seed N and one option per size."""
    parser = argparse.ArgumentParser(prog="python -m training.opinions", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seed", type=int, default=42)
    for name, default in vars(WorldSizes()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = vars(parser.parse_args(arguments))
    output_dir, seed = options.pop("output_dir"), options.pop("seed")
    try:
        sizes = WorldSizes(**options)
    except ValueError as error:
        parser.error(str(error))
    write_world(output_dir, seed, sizes)
    bias = np.mean([kl_bias(topic) for topic in TOPICS])
    print(f"{len(TOPICS)} topics written to {output_dir}; KL's bias (mean TV): {bias:.3f}")


if __name__ == "__main__":
    main()
