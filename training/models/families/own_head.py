"""Computes logits from a decoder's last hidden states as the model's own forward does.

Most models apply a linear head and nothing else. Some scale or cap the logits, or keep their head
elsewhere; for those the model's own forward runs with the decoder's output already given.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

LARGEST_LOGIT = 100.0
"""Of the hidden states that are tried: a cap on logits, about 30, shows only beyond it."""
ROUNDING_STEPS = 16
"""Units of the head's precision by which two ways to compute the same logits may differ."""


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Find the part of a causal language model that turns tokens into hidden states.

    Raises:
        ValueError: there is no such part.
    """
    embeddings = model.get_input_embeddings()
    around = (c for c in model.children() if c is not embeddings and embeddings in c.modules())
    no_decoders = (None, model, model.get_output_embeddings())  # some name their head "decoder"
    for candidate in (model.get_decoder(), model.base_model, *around):
        if all(candidate is not other for other in no_decoders):
            found: nn.Module = candidate
            return found
    raise ValueError(f"no part of a {type(model).__name__} gives its hidden states")


class OwnHead:
    """Everything that a model's own forward does after its decoder.

    It uses the parameters of `model` wherever they are now, and is not a module itself, so that
    nothing counts them twice.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        decoder = decoder_of(model)
        self.child = next(
            name for name, child in model.named_children() if decoder in set(child.modules())
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocabulary] of hidden states [rows, hidden]."""
        rows = len(hidden)
        states = hidden if rows else hidden.new_zeros(1, hidden.shape[-1]) + hidden.sum()
        after = copy.copy(self.model)
        given = _Given(states[None], self.model._modules[self.child])
        after.__dict__["_modules"] = {**self.model._modules, self.child: given}
        ids = torch.zeros(1, len(states), dtype=torch.long, device=hidden.device)
        logits: Tensor = after.forward(input_ids=ids).logits[0]
        return logits[:rows]


class _Given:
    """Takes the decoder's place and returns the given states."""

    def __init__(self, states: Tensor, replaced: nn.Module) -> None:
        self._decoded = _Decoded(last_hidden_state=states)
        self._replaced = replaced

    def __call__(self, *arguments: Any, **named: Any) -> "_Decoded":
        return self._decoded

    def __getattr__(self, name: str) -> Any:
        """Some models call a part of the decoder, or read a number from it."""
        if name.startswith("_"):
            raise AttributeError(name)
        value = getattr(self._replaced, name)
        return self if isinstance(value, nn.Module) else value


class _Decoded(BaseModelOutputWithPast):
    """The last hidden states; any other field is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


@torch.no_grad()
def is_plain(model: PreTrainedModel) -> bool:
    """Whether the output embeddings alone make the logits.

    They are compared on hidden states that make small and large logits.
    """
    head = model.get_output_embeddings()
    if head is None:
        return False
    weight = head.weight
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, weight.shape[1], generator=generator).to(weight)
    hidden *= LARGEST_LOGIT / head(hidden).abs().max().clamp(min=1e-6)
    hidden = torch.cat([hidden, hidden / LARGEST_LOGIT])
    try:
        plain, own = head(hidden).float(), OwnHead(model)(hidden).float()
    except Exception:  # families raise anything for states of another width
        return False
    if plain.shape != own.shape:
        return False
    rounding = ROUNDING_STEPS * torch.finfo(weight.dtype).eps * LARGEST_LOGIT
    return bool((plain - own).abs().max() <= rounding)
