"""Policies that answer: loaded with the checks of training, drawn from as training draws."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from step3_rlhf.chat.sources import Source
from step3_rlhf.config import SamplingSettings
from step3_rlhf.generation.drawing import uniforms
from step3_rlhf.generation.streaming import stream
from step3_rlhf.rollout import assemble, encode_prompt_texts, sample
from training.data import Dialogue, Message, TemplateRefusal
from training.data.chat_template import ChatTemplate
from training.errors import UserError
from training.models.checks import check_policy
from training.models.loading import load_policy
from training.models.options import LoadOptions
from training.models.policy import Policy
from training.models.pretrained import Pretrained
from training.runtime import ranks

Seed = tuple[int, ...]
WatchText = Callable[[str], None]
"""Is given the text so far, again and again."""


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    text: str
    """Without special tokens and surrounding whitespace."""
    ended: bool
    """It has its end, and was not cut for its length."""

    def __str__(self) -> str:
        return self.text if self.ended else f"{self.text} [cut]"


@dataclass(frozen=True)
class Speaker:
    """One model of the conversation."""

    name: str
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    settings: SamplingSettings

    def answer(self, dialogue: Dialogue, seed: Seed, watch: WatchText) -> Answer:
        """Draw one answer, the same as `answers` with this seed.

        Raises:
            UserError: the chat template refuses the dialogue, or the dialogue is too long.
        """
        ids, settings = self._prepared(dialogue)
        ends, pad = self._ends, self.tokenizer.pad_token_id

        def watch_tokens(tokens: list[int]) -> None:
            watch(self._assembled(ids, tokens, dialogue).text.rstrip("\ufffd"))  # half a character

        draws = uniforms([seed], settings.response_length)
        tokens = stream(self.policy, ids, draws, settings, ends, pad, watch_tokens)
        return self._assembled(ids, tokens, dialogue)

    def answers(self, dialogue: Dialogue, seeds: Sequence[Seed]) -> list[Answer]:
        """Draw one answer per seed, all of them in one batch; raises as `answer` does."""
        ids, settings = self._prepared(dialogue)
        count = len(seeds)
        settings = settings.model_copy(update={"rollout_batch_size": count})
        drawn = sample(
            self.policy, self.tokenizer, [ids] * count, [dialogue] * count, list(seeds), settings
        )
        return [
            Answer(text, ended)
            for text, ended in zip(drawn.responses, drawn.ended.tolist(), strict=True)
        ]

    @property
    def _ends(self) -> tuple[int, ...]:
        return self.policy.ends or (self.tokenizer.eos_token_id,)

    def _assembled(self, ids: list[int], tokens: list[int], dialogue: Dialogue) -> Answer:
        device = torch.device("cpu")
        made = assemble([ids], [tokens], [dialogue], self.tokenizer, device, self._ends)
        return Answer(made.responses[0], bool(made.ended[0]))

    def _prepared(self, dialogue: Dialogue) -> tuple[list[int], SamplingSettings]:
        """The prompt's ids, and the settings with as many tokens as the model has positions for."""
        ids = encoded(dialogue, self.tokenizer, self.name)
        length = self.settings.response_length
        config = self.policy.model.config.get_text_config()
        if known := getattr(config, "max_position_embeddings", None):
            length = min(length, known - len(ids))
        if length < 1:
            raise UserError(
                f"{self.name} knows {known} positions, and the dialogue has {len(ids)} tokens; "
                "shorten the question, or begin a new dialogue"
            )
        return ids, self.settings.model_copy(update={"response_length": length})


def encoded(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
    """Token ids of a dialogue up to where the answer begins.

    Raises:
        UserError: the chat template refuses it.
    """
    try:
        return encode_prompt_texts([dialogue], tokenizer)[0]
    except TemplateRefusal as refusal:
        raise UserError(f"{name}: its chat template refuses the dialogue: {refusal}") from None


def load_speakers(
    sources: Sequence[Source],
    settings: SamplingSettings,
    beginning: Sequence[Message] = (),
    bf16: bool = False,
    template: ChatTemplate | None = None,
    trust_remote_code: bool = False,
) -> list[Speaker]:
    """Load the models, on the GPU if there is one; every fault that configs show comes first.

    Args:
        beginning: the system message that every dialogue will have.

    Raises:
        UserError: a model is no policy, cannot be loaded, or refuses the beginning.
    """
    models = [Pretrained(source.path, trust_remote_code, template=template) for source in sources]
    for source, model in zip(sources, models, strict=True):
        check_policy(model)
        encoded((*beginning, {"role": "user", "content": "Hi"}), model.tokenizer, source.name)
    options = LoadOptions(torch.bfloat16 if bf16 else torch.float32)
    speakers = []
    for source, model in zip(sources, models, strict=True):
        policy = load_policy(model, model.tokenizer, options).eval().to(ranks.device())
        speakers.append(Speaker(source.name, policy, model.tokenizer, settings))
    return speakers
