"""The policy: log-probabilities of given tokens from Hugging Face's causal models."""

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from training.models.families.noise import Quiet
from training.models.families.own_head import OwnHead, decoder_of, is_plain
from training.models.hidden_states import hidden_states, takes_positions
from training.models.logprobs import Statistic, chunks_of, token_logprobs
from training.models.partitioned import is_partitioned
from training.runtime.ranks import max_over_ranks


class Policy(Quiet):
    """A causal language model that returns log-probabilities of given tokens, not logits."""

    def __init__(
        self,
        model: PreTrainedModel,
        packing: bool = False,
        absent: Tensor | None = None,
        ends: tuple[int, ...] = (),
    ) -> None:
        """
        Args:
            absent: [vocabulary] bool, ids that no token has: they are neither drawn nor scored.
                None where there are none.
            ends: the ids that end a response; the tokenizer's EOS alone where none are given.
        """
        super().__init__()
        self.model = model
        self.ends = ends
        self.absent: Tensor | None
        self.register_buffer("absent", absent, persistent=False)
        self._takes_positions = takes_positions(decoder_of(model))
        self._packing = packing
        self._own_head = None if is_plain(model) else OwnHead(model)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        scored_mask: Tensor,
        with_entropy: bool = False,
        statistic: Statistic | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute log π of the tokens that `scored_mask` marks, each given all tokens before it.

        Args:
            input_ids: [batch, length], padded on either side.
            attention_mask: [batch, length], 0 on padding.
            scored_mask: [batch, length] bool; never true in column 0.
            statistic: of the distribution at each scored token, in place of the entropy.

        Returns:
            Log-probabilities [batch, length] float32 in nats, 0 where not scored, and the entropy
            of the distribution at each scored token, or None.
        """
        states = hidden_states(
            decoder_of(self.model),
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
        head = self._own_head or self.model.get_output_embeddings()
        if isinstance(head, nn.Module):  # some decoders give float32 whatever the head's precision
            hidden = hidden.to(cast(Tensor, head.weight).dtype)
        logp, entropy = token_logprobs(
            hidden,
            targets,
            head,
            with_entropy,
            chunks=chunks,
            absent=self.absent,
            statistic=statistic,
        )
        return _scatter(logp, scored_mask), None if entropy is None else _scatter(
            entropy, scored_mask
        )


def _scatter(rows: Tensor, mask: Tensor) -> Tensor:
    values = torch.zeros(mask.shape, dtype=rows.dtype, device=rows.device)
    return values.masked_scatter(mask.bool(), rows)
