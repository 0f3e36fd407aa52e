"""Rewards from sequence-classification models, each of which reads texts in its own way."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from step3_rlhf.rollout import Rollout, assemble, encode_prompt_texts
from training import engine, ranks
from training.data import encode_responses, truncate_prompt
from training.loading import on_meta, reads_pairs
from training.models import last_token
from training.tracking import say

Inputs = dict[str, Tensor]
Reading = Callable[[Rollout], Inputs]
"""What a model is given of some responses: `input_ids` and `attention_mask`, [B, T] each."""


class ModelReward:
    """The scalar of a reward model after the response's last token, or of the whole text."""

    def __init__(self, model: nn.Module, read: Reading, batch_size: int) -> None:
        self.model = model
        self.read = read
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> Tensor:
        wanted = -(-len(rollout) // self.batch_size)
        forwards = ranks.max_over_ranks(wanted) if engine.is_partitioned(self.model) else wanted
        parts = []
        for number in range(forwards):
            first = number * self.batch_size if number < wanted else 0  # the rest keep step
            inputs = self.read(rollout.rows(first, first + self.batch_size))
            values = self.model(**inputs)
            if values.dim() == 2:  # one after each token
                values = last_token(values, inputs["attention_mask"])
            parts.append(values)
        return torch.cat(parts[:wanted])


def reading(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    policy_tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    max_prompt_length: int,
) -> Reading:
    """How a reward model reads what the policy wrote, which is said where it is not as it stands.

    Args:
        name: the model's, for the message.
        tokenizer: the model's.
        positions: that the model knows; None is any number.
        max_prompt_length: tokens; longer prompts lose their beginning, as the policy's do.
    """
    if reads_as(tokenizer, policy_tokenizer):
        return as_it_stands
    limit = min(positions or tokenizer.model_max_length, tokenizer.model_max_length)
    same_words = tokenizer.get_vocab() == policy_tokenizer.get_vocab()
    if reads_pairs(tokenizer) and not same_words:
        say(f"{name} reads prompt and response as two texts joined by its tokenizer")
        return TextPairs(tokenizer, limit)
    template = "its own chat template" if tokenizer.chat_template else "the plain dialogue format"
    say(f"{name} reads prompts and responses anew, by its own tokenizer, in {template}")
    return OwnTokens(tokenizer, limit, max_prompt_length)


def reads_as(tokenizer: PreTrainedTokenizerBase, policy: PreTrainedTokenizerBase) -> bool:
    """Whether the policy's ids are what the model would read the texts as.

    A model with the same tokens and no chat template has none to differ in.
    """
    return (
        tokenizer.get_vocab() == policy.get_vocab()
        and tokenizer.eos_token_id == policy.eos_token_id
        and tokenizer.chat_template in (None, policy.chat_template)
    )


def as_it_stands(rollout: Rollout) -> Inputs:
    return {"input_ids": rollout.input_ids, "attention_mask": rollout.attention_mask}


class OwnTokens:
    """The texts in the model's own format and tokens, prompt and response one sequence."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, positions: int, max_prompt_length: int
    ) -> None:
        self.tokenizer = tokenizer
        self.positions = positions
        self.max_prompt_length = max_prompt_length

    def __call__(self, rollout: Rollout) -> Inputs:
        prompts = encode_prompt_texts(rollout.prompts, self.tokenizer)
        responses = encode_responses(list(rollout.responses), self.tokenizer)
        rows = [
            self._fitting(prompt, ids if ended or len(ids) == 1 else ids[:-1])
            for prompt, ids, ended in zip(prompts, responses, rollout.ended.tolist(), strict=True)
        ]  # a response that was cut has no end in the other tokenizer either
        own = assemble(
            [prompt for prompt, _ in rows],
            [response for _, response in rows],
            rollout.prompts,
            self.tokenizer,
            rollout.input_ids.device,
        )
        return as_it_stands(own)

    def _fitting(self, prompt: list[int], response: list[int]) -> tuple[list[int], list[int]]:
        """The end of the prompt and the beginning of the response, as far as there is room."""
        response = response[: self.positions - 1]
        room = min(self.max_prompt_length, self.positions - len(response))
        return truncate_prompt(prompt, room, self.tokenizer.bos_token_id), response


class TextPairs:
    """As BERT and its kin read: [CLS] prompt [SEP] response [SEP], with types of their own.

    What exceeds the model's positions is taken from the beginning of the longer of the two.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, positions: int) -> None:
        tokenizer.truncation_side = "left"
        tokenizer.padding_side = "right"
        self.tokenizer = tokenizer
        self.positions = positions

    def __call__(self, rollout: Rollout) -> Inputs:
        encoded = self.tokenizer(
            list(rollout.prompts),
            list(rollout.responses),
            padding=True,
            truncation="longest_first",
            max_length=self.positions,
            return_tensors="pt",
        )
        return dict(encoded.to(rollout.input_ids.device))


def known_positions(config: PretrainedConfig, trust_remote_code: bool = False) -> int | None:
    """Positions that a classification model knows, as far as it is built with a number of them."""
    model = on_meta(AutoModelForSequenceClassification, config, trust_remote_code)
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from the one after padding's.
        if (
            name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ):
            return int(module.num_embeddings - module.padding_idx - 1)
    found: int | None = getattr(config, "max_position_embeddings", None)
    return found
