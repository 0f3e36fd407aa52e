"""log π_ref(c(y)|x): how probable a response's class is under the reference.

With an answer key it is exact: the sum over the class's responses, each spelled as the tokenizer
spells it. A function's classes, and lengths, are counted in draws of the reference
(../regularizers/classes.py has the estimate). Either way a prompt is measured once, when it first
occurs, and independently of training: a resumed run finds the same shares again.
"""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from step3_rlhf.classes.answer_key import AnswerKey, read_answer_key
from step3_rlhf.classes.labels import Labels, import_labels, labels_of
from step3_rlhf.config import AlignmentConfig, SamplingSettings
from step3_rlhf.prompts import CLASSES
from step3_rlhf.regularizers import Regularizer
from step3_rlhf.regularizers.classes import ClassSettings, log_share
from step3_rlhf.rollout import Rollout, assemble, sample
from training.data import Dialogue, dialogue_text, encode_responses, response_end
from training.errors import UserError
from training.models.lora import WithoutAdapter
from training.runtime import ranks

PromptIds = tuple[int, ...]
Prompts = dict[PromptIds, Dialogue]
"""Prompts by their token ids."""
Shares = dict[str, float]
"""log π_ref(c|x) of a prompt's classes, nats."""
Item = TypeVar("Item")
Result = TypeVar("Result")


class ClassShares(ABC):
    """Knows the class shares of every prompt that has occurred. All ranks call it together."""

    def __init__(
        self,
        reference: nn.Module | WithoutAdapter,
        tokenizer: PreTrainedTokenizerBase,
        config: AlignmentConfig,
    ) -> None:
        self.reference = reference
        self.tokenizer = tokenizer
        self.config = config
        self._known: dict[PromptIds, Shares] = {}

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> Tensor:
        """[B] float64 log π_ref(c(y)|x), nats; −inf outside every class."""
        ids = prompts_of(rollout)
        new = {
            prompt: dialogue
            for prompt, dialogue in zip(ids, rollout.dialogues, strict=True)
            if prompt not in self._known
        }
        everywhere = dict(ranks.gather_objects(list(new.items())))
        self._known |= self.measure(everywhere)
        found = [
            -math.inf if label is None else self._known[prompt].get(label, self.unseen)
            for prompt, label in zip(ids, self.labels(rollout), strict=True)
        ]
        return torch.tensor(found, dtype=torch.float64, device=rollout.input_ids.device)

    @property
    @abstractmethod
    def unseen(self) -> float:
        """log π_ref(c|x) of a class that is not among those measured."""

    @abstractmethod
    def labels(self, rollout: Rollout) -> Labels:
        """The class of each response."""

    @abstractmethod
    def measure(self, prompts: Prompts) -> dict[PromptIds, Shares]:
        """The shares of each prompt's classes; the same prompts on every rank."""


class KeyedShares(ClassShares):
    """Exact shares of the classes in an answer key."""

    unseen = -math.inf

    def __init__(
        self,
        key: AnswerKey,
        reference: nn.Module | WithoutAdapter,
        tokenizer: PreTrainedTokenizerBase,
        config: AlignmentConfig,
    ) -> None:
        super().__init__(reference, tokenizer, config)
        self.key = as_drawn(key, tokenizer)

    def labels(self, rollout: Rollout) -> Labels:
        """A response that was cut is none of the key's, whatever it says."""
        rows = zip(rollout.prompts, rollout.responses, rollout.ended.tolist(), strict=True)
        return [
            self.key.get(prompt, {}).get(text) if ended else None for prompt, text, ended in rows
        ]

    def measure(self, prompts: Prompts) -> dict[PromptIds, Shares]:
        items = [
            (ids, response)
            for ids, dialogue in prompts.items()
            for response in self.key.get(dialogue_text(dialogue), {})
        ]
        logps = over_ranks(items, self.config.per_device_eval_batch_size, self._log_probability)
        found: dict[PromptIds, dict[str, list[float]]] = {ids: {} for ids in prompts}
        for (ids, response), logp in zip(items, logps, strict=True):
            name = self.key[dialogue_text(prompts[ids])][response]
            found[ids].setdefault(name, []).append(logp)
        return {
            ids: {
                name: torch.tensor(values).double().logsumexp(0).item()
                for name, values in classes.items()
            }
            for ids, classes in found.items()
        }

    def _log_probability(self, items: Sequence[tuple[PromptIds, str]]) -> list[float]:
        """log π_ref(y|x) of each response, nats."""
        rollout = assemble(
            [list(ids) for ids, _ in items],
            encode_responses([response for _, response in items], self.tokenizer),
            [""] * len(items),
            self.tokenizer,
            ranks.device(),
            (response_end(self.tokenizer),),
        )
        views = (rollout.input_ids, rollout.attention_mask, rollout.scored_mask)
        logps: list[float] = self.reference(*views)[0].double().sum(-1).tolist()
        return logps


class DrawnShares(ClassShares):
    """Shares of classes that are only known of drawn responses, estimated from draws."""

    def __init__(
        self,
        classes: ClassSettings,
        reference: nn.Module | WithoutAdapter,
        tokenizer: PreTrainedTokenizerBase,
        config: AlignmentConfig,
    ) -> None:
        super().__init__(reference, tokenizer, config)
        self.labels_of = labels_of(classes)
        self.draws = classes.draws

    @property
    def unseen(self) -> float:
        return log_share(torch.tensor(0), self.draws).item()

    def labels(self, rollout: Rollout) -> Labels:
        return self.labels_of(rollout)

    def measure(self, prompts: Prompts) -> dict[PromptIds, Shares]:
        items = [(ids, prompts[ids], draw) for ids in prompts for draw in range(self.draws)]
        labels = over_ranks(items, self.config.rollout_batch_size, self._drawn_labels)
        counts: dict[PromptIds, Counter[str]] = {ids: Counter() for ids in prompts}
        for (ids, _, _), label in zip(items, labels, strict=True):
            if label is not None:
                counts[ids][label] += 1
        return {
            ids: {
                name: log_share(torch.tensor(count), self.draws).item()
                for name, count in found.items()
            }
            for ids, found in counts.items()
        }

    def _drawn_labels(self, items: Sequence[tuple[PromptIds, Dialogue, int]]) -> Labels:
        """The class of a response that the reference draws, from its own softmax, for each item."""
        config = self.config
        rollout = sample(
            self.reference,
            self.tokenizer,
            [list(ids) for ids, _, _ in items],
            [dialogue for _, dialogue, _ in items],
            [(config.seed, CLASSES, draw, *ids) for ids, _, draw in items],
            SamplingSettings(
                response_length=config.response_length,
                rollout_batch_size=config.rollout_batch_size,
            ),
        )
        return self.labels(rollout)


def class_shares(
    regularizer: Regularizer | None,
    reference: nn.Module | WithoutAdapter,
    tokenizer: PreTrainedTokenizerBase,
    config: AlignmentConfig,
) -> ClassShares | None:
    """What finds the class shares that the regularizer needs; None if it needs none."""
    classes = regularizer.response_classes if regularizer else None
    if classes is None:
        return None
    if classes.answer_key:
        key = read_answer_key(classes.answer_key)
        return KeyedShares(key, reference, tokenizer, config)
    return DrawnShares(classes, reference, tokenizer, config)


def check_classes(
    regularizer: Regularizer | None, tokenizer: PreTrainedTokenizerBase, response_length: int
) -> None:
    """Check where the classes come from, without loading any weights.

    Raises:
        UserError: the function cannot be imported; or the answer key cannot be read, or has
            responses that are longer than those that are drawn, or that read alike.
    """
    classes = regularizer.response_classes if regularizer else None
    if classes is None:
        return
    if classes.function:
        import_labels(classes.function)
    if not classes.answer_key:
        return
    key = read_answer_key(classes.answer_key)
    as_drawn(key, tokenizer)  # for what it refuses
    responses = sorted({y for known in key.values() for y in known})
    lengths = [len(ids) for ids in encode_responses(responses, tokenizer)]
    if max(lengths) > response_length:
        longest = responses[lengths.index(max(lengths))]
        raise UserError(
            f"regularizer.classes.answer_key: the response {longest!r} has {max(lengths)} tokens, "
            f"more than response_length, {response_length}: it is never drawn whole"
        )


def as_drawn(key: AnswerKey, tokenizer: PreTrainedTokenizerBase) -> AnswerKey:
    """The key with its responses as they read when they are drawn: encoded, and decoded again.

    Raises:
        UserError: responses of two classes read alike, because of what the tokenizer leaves out.
    """
    responses = sorted({response for known in key.values() for response in known})
    ids = [row[:-1] for row in encode_responses(responses, tokenizer)]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    drawn = {y: text.strip() for y, text in zip(responses, texts, strict=True)}
    found: AnswerKey = {prompt: {} for prompt in key}
    for prompt, known in key.items():
        for y, name in known.items():
            if found[prompt].setdefault(drawn[y], name) != name:
                raise UserError(
                    f"regularizer.classes.answer_key: the tokenizer writes {y!r} as {drawn[y]!r}, "
                    f"which is in both {found[prompt][drawn[y]]!r} and {name!r} for the prompt "
                    f"{prompt!r}; put them into one class"
                )
    return found


def prompts_of(rollout: Rollout) -> list[PromptIds]:
    """[B] the token ids of each row's prompt, without padding."""
    width = rollout.prompt_length
    rows = zip(
        rollout.input_ids[:, :width].tolist(),
        rollout.attention_mask[:, :width].tolist(),
        strict=True,
    )
    return [tuple(t for t, real in zip(ids, mask, strict=True) if real) for ids, mask in rows]


def over_ranks(
    items: Sequence[Item], batch_size: int, measure: Callable[[Sequence[Item]], Sequence[Result]]
) -> list[Result]:
    """One result for each item, in their order, on every rank; the work is divided over the ranks.

    All ranks make equally many calls with equally many items, so that all reach the collectives
    inside; some items are measured only for that.

    Args:
        items: the same on every rank.
        batch_size: items of one call.
    """
    share = -(-len(items) // ranks.world_size())
    places = range(ranks.rank() * share, (ranks.rank() + 1) * share)
    own = [items[place % len(items)] for place in places]
    results: list[Result] = []
    for first in range(0, share, batch_size):
        results += measure(own[first : first + batch_size])
    return ranks.gather_objects(results)[: len(items)]
