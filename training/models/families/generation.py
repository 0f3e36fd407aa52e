"""Generation by transformers, without the defaults that a model brings along."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel


@contextlib.contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model without its generation defaults, such as repetition penalties or bad words.

    Those would change the distribution that is sampled but not the one that is scored.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield model
    finally:
        model.generation_config = own


class Forced(LogitsProcessor):
    """Makes generation draw the given tokens [batch, steps]."""

    def __init__(self, tokens: Tensor, prompt_length: int) -> None:
        self.tokens = tokens
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_length
        return torch.full_like(scores, -torch.inf).scatter(1, self.tokens[:, step : step + 1], 0.0)


def logits_while_drawing(
    model: PreTrainedModel, prompts: Tensor, mask: Tensor, tokens: Tensor, pad: int
) -> Tensor:
    """[batch, steps, vocabulary] logits from which `tokens` [batch, steps] would be drawn, float32.

    Args:
        prompts, mask: [batch, length], padded on the left.
    """
    with plain_generation(model) as plain:
        output = plain.generate(
            input_ids=prompts,
            attention_mask=mask,
            logits_processor=LogitsProcessorList([Forced(tokens, prompts.shape[1])]),
            max_new_tokens=tokens.shape[1],
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=pad,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logits: Tensor = torch.stack(output.logits, dim=1)
    return logits.float()
