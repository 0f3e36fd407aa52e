"""The policy: log-probabilities of given tokens from Hugging Face's causal models."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from training.models.hidden_states import hidden_states, takes_positions
from training.models.logprobs import chunks_of, token_logprobs
from training.models.partitioned import is_partitioned
from training.runtime.ranks import max_over_ranks


class Policy(nn.Module):
    """A causal language model that returns log-probabilities of given tokens, not logits."""

    def __init__(self, model: PreTrainedModel, packing: bool = False) -> None:
        super().__init__()
        self.model = model
        self._takes_positions = takes_positions(model.get_decoder())
        self._packing = packing

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        scored_mask: Tensor,
        with_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute log π of the tokens that `scored_mask` marks, each given all tokens before it.

        Args:
            input_ids: [batch, length], padded on either side.
            attention_mask: [batch, length], 0 on padding.
            scored_mask: [batch, length] bool; never true in column 0.

        Returns:
            Log-probabilities [batch, length] float32 in nats, 0 where not scored, and the entropy
            of the distribution at each scored token, or None.
        """
        states = hidden_states(
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
