"""How a reward model reads responses: in the policy's tokens, in its own, or as pairs of texts."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
)

from step3_rlhf.rollout import Rollout, encode_prompt_texts
from training.data import (
    Dialogue,
    TemplateRefusal,
    encode_dialogues,
    encode_responses,
    fitting_prompt,
    pad_sequences,
    render_prompt,
    response_frame,
    truncate_prompt,
)
from training.data.templates import UNWRITABLE
from training.models.pretrained import Pretrained, reads_pairs
from training.runtime.tracking import say

Inputs = dict[str, Tensor]
"""Keyword arguments of the model: `input_ids` and `attention_mask`, [B, T] each."""

Reading = Callable[[Rollout], Inputs]
"""Turns B prompts and responses into the inputs of one reward model."""

NO_LIMIT = 10**6
"""A tokenizer without a length limit states one larger than this."""


Form = Literal["tokens", "pairs", "template", "prompt and end"]
"""In what form a reward model reads: the policy's tokens; two texts; the whole dialogue as its chat
template writes it; or the prompt and then the response with one end, as stage 2 trains."""


def form_of(reward: Pretrained, policy_tokenizer: PreTrainedTokenizerBase) -> Form:
    """In what form a reward model reads responses."""
    if reads_policy_tokens(reward, policy_tokenizer):
        return "tokens"
    if reads_pairs(reward.tokenizer) and not reward.has_linear_score:
        return "pairs"
    templated = bool(reward.tokenizer.chat_template) and reward.learned_end is None
    return "template" if templated else "prompt and end"


def reading(reward: Pretrained, policy_tokenizer: PreTrainedTokenizerBase) -> Reading:
    """Choose how a reward model reads responses; prints it unless it is in the policy's tokens."""
    tokenizer, form = reward.tokenizer, form_of(reward, policy_tokenizer)
    if form == "tokens":
        end = tokenizer.eos_token_id if reward.learned_end is None else reward.learned_end
        # Hugging Face's other heads look for the last token at the right end.
        if reward.has_linear_score:
            return partial(policy_tokens, end=end)
        return partial(right_padded, tokenizer=tokenizer, end=end)
    limit = known_positions(reward)
    if form == "pairs":
        say(f"{reward} reads prompt and response as two texts joined by its tokenizer")
        return TextPairs(tokenizer, limit)
    written = "chat template" if tokenizer.chat_template else "plain dialogue format"
    say(f"{reward} reads prompts and responses anew, with its own tokenizer and in its {written}")
    return OwnTokens(tokenizer, limit, form == "template", reward.learned_end)


def refusal(
    reward: Pretrained, policy_tokenizer: PreTrainedTokenizerBase
) -> Callable[[Dialogue], str]:
    """A function that says why the reward model's chat template refuses a dialogue, or ""."""
    form = form_of(reward, policy_tokenizer)

    def why(dialogue: Dialogue) -> str:
        try:
            if form == "template":
                response_frame(dialogue, reward.tokenizer)
            else:
                render_prompt(dialogue, reward.tokenizer)
        except TemplateRefusal as reason:
            return str(reason)
        return ""

    return why if form in ("template", "prompt and end") else lambda dialogue: ""


def reads_policy_tokens(reward: Pretrained, policy_tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the reward model would turn the texts into the policy's token ids with one end.

    A model from stage 2 states in its config which token ended the responses that it learned. Any
    other model learned what its chat template writes after a response.
    """
    tokenizer = reward.tokenizer
    same = (
        tokenizer.get_vocab() == policy_tokenizer.get_vocab()
        and tokenizer.eos_token_id == policy_tokenizer.eos_token_id
        and tokenizer.chat_template == policy_tokenizer.chat_template
    )
    if not same or not tokenizer.chat_template or reward.learned_end is not None:
        return same
    _, after = response_frame([{"role": "user", "content": "Hi"}], tokenizer)
    return bool(after == tokenizer.eos_token)


def policy_tokens(rollout: Rollout, end: int | None = None) -> Inputs:
    """The policy's own token ids, prompts padded on the left and responses on the right.

    Args:
        end: replaces the token that ended a response. A policy may have several such tokens; a
            reward model has learned one. None keeps the policy's.
    """
    ids = rollout.input_ids
    if end is not None:
        columns = torch.arange(ids.shape[1], device=ids.device)
        last = (columns * rollout.attention_mask).argmax(-1, keepdim=True)
        ids = torch.where((columns == last) & rollout.ended[:, None], end, ids)
    return {"input_ids": ids, "attention_mask": rollout.attention_mask}


def right_padded(
    rollout: Rollout, tokenizer: PreTrainedTokenizerBase, end: int | None = None
) -> Inputs:
    """The policy's own token ids, all padding moved to the right; `end` as in `policy_tokens`."""
    input_ids = policy_tokens(rollout, end)["input_ids"]
    rows = zip(input_ids, rollout.attention_mask.bool(), strict=True)
    return _padded([ids[mask].tolist() for ids, mask in rows], tokenizer, rollout)


def _padded(texts: list[list[int]], tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> Inputs:
    batch = pad_sequences(texts, [[] for _ in texts], tokenizer.pad_token_id)
    batch = batch.to(rollout.input_ids.device)
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


class OwnTokens:
    """Prompt and response as one sequence, in the model's own format and tokens.

    A sequence longer than the model's positions loses the prompt's oldest turns, then the beginning
    of what is left. A response that was cut before
    its EOS gets no end in these tokens either.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        positions: int | None,
        by_template: bool,
        end: int | None = None,
    ) -> None:
        """
        Args:
            positions: the most tokens that the model can read; None is no limit.
            by_template: write the whole dialogue with the chat template, including what it writes
                after a response. Otherwise write the prompt as stage 2 does, and `end` after the
                response.
            end: None is the token that ends responses in training data.
        """
        self.tokenizer = tokenizer
        self.positions = positions
        self.by_template = by_template
        self.end = end

    def __call__(self, rollout: Rollout) -> Inputs:
        ended = rollout.ended.tolist()
        texts = self._encoded(rollout.dialogues, rollout.responses, ended)
        if self.positions is not None:
            rows = zip(texts, rollout.dialogues, rollout.responses, ended, strict=True)
            texts = [self._fitting(*row, self.positions) for row in rows]
        return _padded(texts, self.tokenizer, rollout)

    def _encoded(
        self, dialogues: Sequence[Dialogue], responses: Sequence[str], ended: Sequence[bool]
    ) -> list[list[int]]:
        if self.by_template:
            return encode_dialogues(dialogues, responses, ended, self.tokenizer)
        prompts = encode_prompt_texts(dialogues, self.tokenizer)
        answers = encode_responses(list(responses), self.tokenizer, self.end)
        return [
            prompt + (answer if whole else answer[:-1])
            for prompt, answer, whole in zip(prompts, answers, ended, strict=True)
        ]

    def _fitting(
        self, ids: list[int], dialogue: Dialogue, response: str, ended: bool, positions: int
    ) -> list[int]:
        if len(ids) <= positions:
            return ids

        def length(shorter: Dialogue) -> int:
            try:
                return len(self._encoded([shorter], [response], [ended])[0])
            except TemplateRefusal:  # it takes the whole, but not what is left of it
                return UNWRITABLE

        shorter = fitting_prompt(dialogue, positions, self.tokenizer, length)
        if shorter is None:  # even without any text in the prompt
            return truncate_prompt(ids, positions, self.tokenizer.bos_token_id)
        return self._encoded([shorter], [response], [ended])[0]


class TextPairs:
    """[CLS] prompt [SEP] response [SEP] with token types, as BERT and its relatives read.

    If the model has too few positions, the prompt loses its beginning first, then the response its
    end. Text that spells a special token stays text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> None:
        tokenizer.padding_side = "right"
        self.tokenizer = tokenizer
        self.positions = positions

    def __call__(self, rollout: Rollout) -> Inputs:
        pairs = list(zip(rollout.prompts, rollout.responses, strict=True))
        if self.positions is not None and self.tokenizer.is_fast:  # only these know offsets
            pairs = [self._fitting(*pair, self.positions) for pair in pairs]
        encoded = self.tokenizer(
            [prompt for prompt, _ in pairs],
            [response for _, response in pairs],
            padding=True,
            truncation=self.positions is not None,
            max_length=self.positions,
            split_special_tokens=True,
            return_tensors="pt",
        )
        return dict(encoded.to(rollout.input_ids.device))

    def _fitting(self, prompt: str, response: str, positions: int) -> tuple[str, str]:
        """The two texts, cut so that their tokens fit; at least one token of the prompt stays."""
        room = positions - self.tokenizer.num_special_tokens_to_add(pair=True)
        prompt_spans, response_spans = self._spans(prompt), self._spans(response)
        kept = min(len(response_spans), room - 1)
        left = max(1, room - kept)
        if len(prompt_spans) > left:
            prompt = prompt[prompt_spans[-left][0] :]
        if len(response_spans) > kept:
            response = response[: response_spans[kept - 1][1]]
        return prompt, response

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """First and last character (exclusive) of each token in `text`."""
        encoded = self.tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        spans: list[tuple[int, int]] = encoded["offset_mapping"]
        return spans


def known_positions(reward: Pretrained) -> int | None:
    """The most tokens that a classification model can read; None is no limit."""
    limits = [
        reward.tokenizer.model_max_length,
        getattr(reward.config, "max_position_embeddings", None),
    ]
    for name, module in reward.on_meta(AutoModelForSequenceClassification).named_modules():
        # RoBERTa and its relatives count positions from the one after the padding's.
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            limits.append(int(module.num_embeddings - padding - 1))
    return min((limit for limit in limits if limit and 0 < limit < NO_LIMIT), default=None)
