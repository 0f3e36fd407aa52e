"""Draws responses to prompts, the same ones however the prompts are divided over ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from step3_rlhf.config import SamplingSettings
from step3_rlhf.generation.drawing import uniforms
from step3_rlhf.generation.generator import generator_of
from training.data import (
    Dialogue,
    as_dialogue,
    dialogue_text,
    encode_prompts,
    pad_prompts,
    render_prompt,
)
from training.models.lora import WithoutAdapter
from training.models.partitioned import whole_parameters
from training.models.policy import Policy


@dataclass(frozen=True)
class Rollout:
    """Responses to prompts: B rows, P prompt columns (left-padded), R response columns.

    Example, pad 0 and EOS 2, P = 3, R = 3:

        input_ids       0 5 6 | 7 2 0        attention_mask  0 1 1 | 1 1 0
                        3 5 6 | 8 9 4                        1 1 1 | 1 1 1
        response_mask         | 1 1 0        (the second row was cut before its EOS)
                              | 1 1 1
    """

    input_ids: Tensor  # [B, P + R] long
    attention_mask: Tensor  # [B, P + R] long
    response_mask: Tensor  # [B, R] bool
    ended: Tensor  # [B] bool: the response has its end
    dialogues: tuple[Dialogue, ...]  # the prompts as messages
    responses: tuple[str, ...]  # without special tokens and surrounding whitespace
    drawn_logp: Tensor | None = None  # [B, R] log π as drawing computed it, nats; None: unknown

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts as people and reward functions read them."""
        return tuple(dialogue_text(dialogue) for dialogue in self.dialogues)

    @property
    def prompt_length(self) -> int:
        return self.input_ids.shape[1] - self.response_mask.shape[1]

    @property
    def prompt_tokens(self) -> Tensor:
        """[] tokens of all prompts, padding left out."""
        return self.attention_mask[:, : self.prompt_length].sum()

    @property
    def lengths(self) -> Tensor:
        """[B] response tokens, EOS included."""
        return self.response_mask.sum(-1)

    @property
    def scored_mask(self) -> Tensor:
        """[B, P + R] bool: `response_mask`, with False on the prompts."""
        outside = self.response_mask.new_zeros(len(self), self.prompt_length)
        return torch.cat([outside, self.response_mask], dim=1)

    def response_part(self, values: Tensor) -> Tensor:
        """[B, R]: the response columns of values [B, P + R] such as each token's log π."""
        return values[:, self.prompt_length :]

    def state_part(self, values: Tensor) -> Tensor:
        """[B, R]: of values [B, P + R], those of the state before each response token.

        The value in column t has seen token t, so the state before that token is one column
        earlier.
        """
        return values[:, self.prompt_length - 1 : -1]

    def readable(self) -> dict[str, object]:
        """All fields by name, for the dump of a batch that went wrong."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"prompts": self.prompts}

    def rows(self, first: int, last: int) -> "Rollout":
        """Rows first … last − 1, trimmed to the longest prompt and response among them."""
        attention, drawn = self.attention_mask[first:last], self.drawn_logp
        width = self.prompt_length
        left = int(width - attention[:, :width].sum(-1).max())
        responses = int(self.response_mask[first:last].sum(-1).max())
        return replace(
            self,
            input_ids=self.input_ids[first:last, left : width + responses],
            attention_mask=attention[:, left : width + responses],
            response_mask=self.response_mask[first:last, :responses],
            ended=self.ended[first:last],
            dialogues=self.dialogues[first:last],
            responses=self.responses[first:last],
            drawn_logp=None if drawn is None else drawn[first:last, :responses],
        )


@torch.no_grad()
def sample(
    policy: nn.Module | WithoutAdapter,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[list[int]],
    prompts: Sequence[Dialogue | str],
    seeds: list[tuple[int, ...]],
    settings: SamplingSettings,
) -> Rollout:
    """Draw one response to each prompt, `rollout_batch_size` prompts at a time.

    Args:
        policy: a Policy, the DeepSpeed engine around one, or one with its adapter switched off.
        prompt_ids: [B] the prompts as token ids.
        prompts: [B] the same as messages, or as texts that a user wrote.
        seeds: [B] one per prompt; the same seed draws the same response.
    """
    responses: list[list[int]] = []
    logps: list[Tensor | None] = []
    with whole_parameters(policy) as module:
        assert isinstance(module, Policy)
        device, pad = module.model.device, tokenizer.pad_token_id
        ends = module.ends or (tokenizer.eos_token_id,)
        generator = generator_of(module)
        for start in range(0, len(prompt_ids), settings.rollout_batch_size):
            part = slice(start, start + settings.rollout_batch_size)
            ids, mask = pad_prompts(prompt_ids[part], pad)
            draws = uniforms(seeds[part], settings.response_length)
            drawn = generator(module, ids, mask, draws, settings, ends, pad)
            responses += drawn.tokens
            logps.append(drawn.logp)
    rollout = assemble(prompt_ids, responses, prompts, tokenizer, device, ends)
    known = [logp for logp in logps if logp is not None]
    if len(known) < len(logps):
        return rollout
    return replace(rollout, drawn_logp=torch.cat(known)[:, : rollout.response_mask.shape[1]])


def assemble(
    prompt_ids: list[list[int]],
    response_ids: list[list[int]],
    prompts: Sequence[Dialogue | str],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    ends: tuple[int, ...] = (),
) -> Rollout:
    """Build a Rollout from token ids; tokens after a response's first end are dropped.

    Args:
        prompts: [B] messages, or texts that a user wrote.
        ends: the ids that end a response; () is the tokenizer's EOS alone.
    """
    ends, pad = ends or (tokenizer.eos_token_id,), tokenizer.pad_token_id
    kept = [_until_its_end(row, ends) for row in response_ids]
    whole = [row[-1] in ends for row in kept]
    length = max(len(row) for row in kept)
    ids, mask = pad_prompts(prompt_ids, pad)
    responses = torch.tensor([row + [pad] * (length - len(row)) for row in kept])
    response_mask = torch.tensor([[t < len(row) for t in range(length)] for row in kept])
    spelt = [row[:-1] if end else row for row, end in zip(kept, whole, strict=True)]
    texts = tokenizer.batch_decode(spelt, skip_special_tokens=True)
    return Rollout(
        input_ids=torch.cat([ids, responses], dim=1).to(device),
        attention_mask=torch.cat([mask.long(), response_mask.long()], dim=1).to(device),
        response_mask=response_mask.to(device),
        ended=torch.tensor(whole).to(device),
        dialogues=tuple(as_dialogue(prompt) for prompt in prompts),
        responses=tuple(text.strip() for text in texts),
    )


def _until_its_end(row: list[int], ends: tuple[int, ...]) -> list[int]:
    first = next((place for place, token in enumerate(row) if token in ends), len(row))
    return row[: first + 1]


def encode_prompt_texts(
    prompts: Sequence[Dialogue | str], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Token ids of messages, or texts that a user wrote, rendered in the chat template.

    Raises:
        TemplateRefusal: the chat template does not take one of them.
    """
    rendered = [render_prompt(as_dialogue(prompt), tokenizer) for prompt in prompts]
    return encode_prompts(rendered, tokenizer)
