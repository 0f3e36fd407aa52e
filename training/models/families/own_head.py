"""From a decoder's last hidden states to logits, as the model's own forward does it.

Most models apply a linear head and nothing else. Some scale or cap the logits afterwards, or keep
their head in another place; what they do is asked of their own code, with the decoder's answer
given.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

LARGEST_LOGIT = 100.0
"""Of the probe: a cap on logits shows only where logits exceed it, and caps are about 30."""
ROUNDING_STEPS = 16
"""Of the head's precision, by which two ways to compute the same logits may differ."""


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The part of a causal language model that turns tokens into hidden states.

    Raises:
        ValueError: no part does.
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

    The parameters are those of `model`, wherever they are now. It is not a module, so that nothing
    counts them twice.
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
    """Stands where the decoder does, and knows its answer."""

    def __init__(self, states: Tensor, replaced: nn.Module) -> None:
        self._decoded = _Decoded(last_hidden_state=states)
        self._replaced = replaced

    def __call__(self, *arguments: Any, **named: Any) -> "_Decoded":
        return self._decoded

    def __getattr__(self, name: str) -> Any:
        """Some models call a part of this part, or read a number from it."""
        if name.startswith("_"):
            raise AttributeError(name)
        value = getattr(self._replaced, name)
        return self if isinstance(value, nn.Module) else value


class _Decoded(BaseModelOutputWithPast):
    """The last hidden states, and None for whatever else is asked for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


@torch.no_grad()
def is_plain(model: PreTrainedModel) -> bool:
    """Whether the logits are the output embeddings' and nothing else.

    It is tried on hidden states that make small and large logits.
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
    except Exception:  # whatever a family raises for states of another width
        return False
    if plain.shape != own.shape:
        return False
    rounding = ROUNDING_STEPS * torch.finfo(weight.dtype).eps * LARGEST_LOGIT
    return bool((plain - own).abs().max() <= rounding)
