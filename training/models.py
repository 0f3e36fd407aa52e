"""Policy and scalar models (reward, critic), on top of Hugging Face's."""

import inspect

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from training.engine import is_partitioned
from training.logprobs import chunks_of, position_ids, token_logprobs
from training.packing import pack
from training.ranks import max_over_ranks


class Policy(nn.Module):
    """A causal language model that gives log-probabilities of given tokens, not logits."""

    def __init__(self, model: PreTrainedModel, packing: bool = False) -> None:
        super().__init__()
        self.model = model
        self._takes_positions = _takes_positions(model.get_decoder())
        self._packing = packing

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        scored_mask: Tensor,
        with_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """log π of the tokens that `scored_mask` marks, each given all that stands before it.

        Args:
            input_ids: [batch, length], padded on either side.
            attention_mask: [batch, length], 0 on padding.
            scored_mask: [batch, length] bool; never true in column 0.

        Returns:
            log-probabilities [batch, length] float32 in nats, 0 where not scored, and, if asked
            for, the entropy of the distribution from which each scored token was drawn.
        """
        states = _hidden_states(
            self.model.get_decoder(),
            input_ids,
            attention_mask,
            self._takes_positions,
            self._packing,
        )
        predicting = scored_mask[:, 1:].bool()
        hidden = states[:, :-1][predicting]
        targets = input_ids[:, 1:][predicting]
        chunks = chunks_of(len(targets))
        if is_partitioned(self.model):  # ranks have different numbers of tokens
            chunks = max_over_ranks(chunks)
        logp, entropy = token_logprobs(
            hidden, targets, self.model.get_output_embeddings(), with_entropy, chunks=chunks
        )
        return _scatter(logp, scored_mask), None if entropy is None else _scatter(
            entropy, scored_mask
        )


def _scatter(rows: Tensor, mask: Tensor) -> Tensor:
    values = torch.zeros(mask.shape, dtype=rows.dtype, device=rows.device)
    return values.masked_scatter(mask.bool(), rows)


class ScalarModel(nn.Module):
    """A sequence-classification model with one label: the reward model, and the critic."""

    def __init__(self, model: PreTrainedModel, packing: bool = False) -> None:
        super().__init__()
        self.model = model
        self._takes_positions = _takes_positions(model.base_model)
        self._packing = packing

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Values [batch, length] float32: the head's scalar after each token."""
        decoder, takes_positions = self.model.base_model, self._takes_positions
        states = _hidden_states(decoder, input_ids, attention_mask, takes_positions, self._packing)
        return self.model.score(states).squeeze(-1)

    def rewards(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Rewards [batch]: the scalar after each row's last token."""
        return last_token(self(input_ids, attention_mask), attention_mask)


class Classifier(nn.Module):
    """A one-label sequence-classification model of any build, asked as Hugging Face builds it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **more: Tensor) -> Tensor:
        """Rewards [batch] float32.

        Args:
            input_ids: [batch, length], padded on the right.
            more: what else the model's tokenizer gives, as token_type_ids.
        """
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, **more).logits
        return logits.squeeze(-1).float()


class Float32Head(nn.Linear):
    """A linear head whose output is float32 whatever the weights are.

    In bfloat16 a reward of 10 is known to 0.06 only, and rewards are what preferences are made of.
    """

    @classmethod
    def like(cls, head: nn.Linear) -> "Float32Head":
        """The same weights under the same names."""
        own = cls(head.in_features, head.out_features, bias=head.bias is not None)
        own.weight, own.bias = head.weight, head.bias
        return own

    def forward(self, hidden: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(hidden.float(), self.weight.float(), bias)


def last_token(values: Tensor, attention_mask: Tensor) -> Tensor:
    """[batch] entries of `values` [batch, length] at each row's last attended token."""
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (columns * attention_mask.long()).argmax(dim=-1)
    return values.gather(1, last.unsqueeze(1)).squeeze(1)


def _takes_positions(model: nn.Module) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _hidden_states(
    decoder: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    takes_positions: bool,
    packing: bool,
) -> Tensor:
    """[batch, length, hidden] states after each token; on padding, anything."""
    if packing:
        packed = pack(input_ids, attention_mask)
        decoded = decoder(
            input_ids=packed.input_ids,
            attention_mask=packed.attention_mask,
            position_ids=packed.position_ids,
            use_cache=False,
        )
        return packed.unpacked(decoded.last_hidden_state)
    positions = {"position_ids": position_ids(attention_mask)} if takes_positions else {}
    decoded = decoder(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions
    )
    states: Tensor = decoded.last_hidden_state
    return states
