"""How a reward model reads the texts: in the policy's tokens, in its own, or as pairs."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
)

from step3_rlhf.rollout import Rollout, encode_prompt_texts
from training.data import (
    encode_dialogues,
    encode_responses,
    pad_sequences,
    prompt_messages,
    response_frame,
    truncate_prompt,
)
from training.models.pretrained import Pretrained, reads_pairs
from training.runtime.tracking import say

Inputs = dict[str, Tensor]


Reading = Callable[[Rollout], Inputs]
"""What a model is given of some responses: `input_ids` and `attention_mask`, [B, T] each."""


NO_LIMIT = 10**6
"""Tokenizers that know no limit name one beyond this."""


def reading(reward: Pretrained, policy_tokenizer: PreTrainedTokenizerBase) -> Reading:
    """How a reward model reads what the policy wrote; any other way than token by token is said."""
    tokenizer = reward.tokenizer
    if reads_policy_tokens(reward, policy_tokenizer):
        end = tokenizer.eos_token_id if reward.learned_end is None else reward.learned_end
        # Hugging Face's own heads look for the last token at the right.
        if reward.has_linear_score:
            return partial(as_it_stands, end=end)
        return partial(right_padded, tokenizer=tokenizer, end=end)
    limit = known_positions(reward)
    if reads_pairs(tokenizer) and not reward.has_linear_score:
        say(f"{reward} reads prompt and response as two texts joined by its tokenizer")
        return TextPairs(tokenizer, limit)
    by_template = bool(tokenizer.chat_template) and reward.learned_end is None
    form = "chat template" if tokenizer.chat_template else "plain dialogue format"
    say(f"{reward} reads prompts and responses anew, by its own tokenizer, in its {form}")
    return OwnTokens(tokenizer, limit, by_template, reward.learned_end)


def reads_policy_tokens(reward: Pretrained, policy_tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the reward model would read the texts as the policy's token ids with one end.

    A model of stage 2 says in its config with which token the responses ended that it learned;
    others learned what their chat template writes after a response.
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


def as_it_stands(rollout: Rollout, end: int | None = None) -> Inputs:
    """The policy's own ids.

    Args:
        end: in place of whatever ended the responses, since a policy may have several ends and a
            reward model has learned one.
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
    input_ids = as_it_stands(rollout, end)["input_ids"]
    rows = zip(input_ids, rollout.attention_mask.bool(), strict=True)
    return _padded([ids[mask].tolist() for ids, mask in rows], tokenizer, rollout)


def _padded(texts: list[list[int]], tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> Inputs:
    batch = pad_sequences(texts, [[] for _ in texts], tokenizer.pad_token_id)
    batch = batch.to(rollout.input_ids.device)
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


class OwnTokens:
    """The texts in the model's own format and tokens, prompt and response one sequence.

    Prompts are read whole; what exceeds the model's positions is lost at the beginning. A response
    that was cut has no end in other tokens either.
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
            positions: that the model knows; None is any number.
            by_template: all that the chat template writes, also after a response; otherwise the
                prompt in stage 2's format and `end` after the response.
            end: by default that of training data.
        """
        self.tokenizer = tokenizer
        self.positions = positions
        self.by_template = by_template
        self.end = end

    def __call__(self, rollout: Rollout) -> Inputs:
        texts = self._encoded(rollout, rollout.ended.tolist())
        if self.positions is not None:
            bos = self.tokenizer.bos_token_id
            texts = [truncate_prompt(ids, self.positions, bos) for ids in texts]
        return _padded(texts, self.tokenizer, rollout)

    def _encoded(self, rollout: Rollout, ended: list[bool]) -> list[list[int]]:
        if self.by_template:
            messages = [prompt_messages(prompt) for prompt in rollout.prompts]
            return encode_dialogues(messages, rollout.responses, ended, self.tokenizer)
        prompts = encode_prompt_texts(rollout.prompts, self.tokenizer)
        responses = encode_responses(list(rollout.responses), self.tokenizer, self.end)
        return [
            prompt + (response if whole else response[:-1])
            for prompt, response, whole in zip(prompts, responses, ended, strict=True)
        ]


class TextPairs:
    """As BERT and its kin read: [CLS] prompt [SEP] response [SEP], with types of their own.

    Where there is too little room the prompt loses its beginning, then the response its end. Text
    that looks like a special token stays text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> None:
        tokenizer.padding_side = "right"
        self.tokenizer = tokenizer
        self.positions = positions

    def __call__(self, rollout: Rollout) -> Inputs:
        pairs = list(zip(rollout.prompts, rollout.responses, strict=True))
        if self.positions is not None and self.tokenizer.is_fast:  # others cannot say what is where
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
        room = positions - self.tokenizer.num_special_tokens_to_add(pair=True)
        asked, answered = self._places(prompt), self._places(response)
        kept = min(len(answered), room - 1)
        left = max(1, room - kept)
        if len(asked) > left:
            prompt = prompt[asked[-left][0] :]
        if len(answered) > kept:
            response = response[: answered[kept - 1][1]]
        return prompt, response

    def _places(self, text: str) -> list[tuple[int, int]]:
        """Where in `text` each of its tokens stands."""
        encoded = self.tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        places: list[tuple[int, int]] = encoded["offset_mapping"]
        return places


def known_positions(reward: Pretrained) -> int | None:
    """Tokens that a classification model can read; None is any number."""
    limits = [
        reward.tokenizer.model_max_length,
        getattr(reward.config, "max_position_embeddings", None),
    ]
    for name, module in reward.on_meta(AutoModelForSequenceClassification).named_modules():
        # RoBERTa and its relatives count positions from the one after padding's.
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            limits.append(int(module.num_embeddings - padding - 1))
    return min((limit for limit in limits if limit and 0 < limit < NO_LIMIT), default=None)
