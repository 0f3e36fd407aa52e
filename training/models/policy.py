"""The policy: log-probabilities of given tokens from Hugging Face's causal models."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from training.models.families.noise import Quiet
from training.models.families.own_head import OwnHead, decoder_of, is_plain
from training.models.hidden_states import hidden_states, takes_positions
from training.models.logprobs import (
    MOST_KEPT_LOGITS,
    ROWS_PER_CHUNK,
    Statistic,
    chunks_of,
    token_logprobs,
    without_absent,
)
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
        self._vocabulary = model.config.get_text_config().vocab_size
        self.decodes = False
        """Whether `Decoder` draws what this policy's own forward says; found out by comparison."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        scored_mask: Tensor,
        with_entropy: bool = False,
        whole: bool = False,
        statistic: Statistic | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute log π of the tokens that `scored_mask` marks, each given all tokens before it.

        Args:
            input_ids: [batch, length], padded on either side.
            attention_mask: [batch, length], 0 on padding.
            scored_mask: [batch, length] bool; never true in column 0.
            whole: return the whole distributions in place of the entropies. They take memory:
                keep batches small.
            statistic: of the distribution at each scored token, in place of the entropy.

        Returns:
            Log-probabilities [batch, length] float32 in nats, 0 where not scored, and the entropy
            of the distribution at each scored token, or None; with `whole`, the log-probabilities
            [scored tokens, vocabulary] in the order of the mask.
        """
        states = hidden_states(
            decoder_of(self.model),
            input_ids,
            attention_mask,
            self._takes_positions,
            self._packing,
        )
        # Once for both: the host waits for the number of scored tokens.
        rows, columns = scored_mask[:, 1:].nonzero(as_tuple=True)
        hidden = states[rows, columns]
        targets = input_ids[rows, columns + 1]
        chunks = chunks_of(len(targets))
        if is_partitioned(self.model):  # ranks have different numbers of tokens
            chunks = max_over_ranks(chunks)
        if whole:
            rows = self.logits(hidden).log_softmax(-1)
            return _scatter(rows.gather(-1, targets[:, None])[:, 0], scored_mask), rows
        logp, entropy = token_logprobs(
            self._readable(hidden),
            targets,
            self._head,
            with_entropy,
            chunks=chunks,
            absent=self.absent,
            keep_logits=self._keeps(chunks),
            statistic=statistic,
        )
        return _scatter(logp, scored_mask), None if entropy is None else _scatter(
            entropy, scored_mask
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits [rows, vocabulary] float32 of hidden states [rows, hidden]."""
        return without_absent(self._head(self._readable(hidden)).float(), self.absent)

    @property
    def _head(self) -> Callable[[Tensor], Tensor]:
        return self._own_head or self.model.get_output_embeddings()

    def _readable(self, hidden: Tensor) -> Tensor:
        """Some decoders give float32 whatever the head's precision."""
        head = self._head
        return hidden.to(cast(Tensor, head.weight).dtype) if isinstance(head, nn.Module) else hidden

    def _keeps(self, chunks: int) -> bool:
        """Whether the logits are kept for the backward pass, by what all ranks agree on."""
        recomputes = any(
            getattr(module, "gradient_checkpointing", False) for module in self.model.modules()
        )
        return not recomputes and chunks * ROWS_PER_CHUNK * self._vocabulary <= MOST_KEPT_LOGITS


def _scatter(rows: Tensor, mask: Tensor) -> Tensor:
    values = torch.zeros(mask.shape, dtype=rows.dtype, device=rows.device)
    return values.masked_scatter(mask.bool(), rows)
