"""Token log-probabilities from hidden states, and helpers for masks.

The log-softmax runs in float32 over a block of rows at a time, and only over rows that are scored.
One tensor [rows, vocabulary] is kept for the backward pass, which turns it into its gradient in
place; beyond `MOST_KEPT_LOGITS`, or if activations are recomputed anyway, none is kept.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROWS_PER_CHUNK = 1024
MOST_KEPT_LOGITS = 2**27
"""Logits that are kept between forward and backward pass: 0.5 GiB in float32."""
BLOCK = 2**22
"""Logits that are normalized at the same time: 16 MiB in float32."""

Statistic = Callable[[Tensor, Tensor], Tensor]
"""From logits [rows, vocabulary] and log Σ e^logit [rows] to one number per row."""


def token_logprobs(
    hidden: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    with_entropy: bool = False,
    rows_per_chunk: int = ROWS_PER_CHUNK,
    chunks: int | None = None,
    absent: Tensor | None = None,
    keep_logits: bool = False,
    statistic: Statistic | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute log π(target | hidden) for each row, in nats.

    Args:
        hidden: [rows, hidden_size], the states from which the targets are predicted.
        targets: [rows] token ids.
        head: maps hidden states to logits.
        with_entropy: also return the entropy of each row's distribution.
        rows_per_chunk: rows whose logits exist at the same time.
        chunks: number of calls of the head, at least as many as the rows need; some may be empty.
            If the call is a collective operation (ZeRO-3), every rank must make the same number.
        absent: [vocabulary] bool, ids that no token has; their probability is 0.
        keep_logits: keep them for the backward pass, which computes them again otherwise. Every
            rank must choose the same if the head is a collective operation.
        statistic: returned in place of the entropy.

    Returns:
        log-probabilities [rows] float32, and entropies [rows] float32 (nats) or None.
    """
    logps, entropies = [], []
    how = head, with_entropy, absent, statistic
    for number in range(chunks or chunks_of(len(targets), rows_per_chunk)):
        part = slice(number * rows_per_chunk, (number + 1) * rows_per_chunk)
        rows, wanted = hidden[part], targets[part]
        if torch.is_grad_enabled() and not keep_logits:
            logp, entropy = checkpoint(_score_rows, rows, wanted, *how, use_reentrant=False)
        else:
            logp, entropy = _score_rows(rows, wanted, *how)
        logps.append(logp)
        entropies.append(entropy)
    return torch.cat(logps), torch.cat(entropies) if with_entropy or statistic else None


def chunks_of(rows: int, rows_per_chunk: int = ROWS_PER_CHUNK) -> int:
    """Number of chunks for `rows`; one for no rows at all, so that there is a graph."""
    return max(1, -(-rows // rows_per_chunk))


def _score_rows(
    hidden: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    with_entropy: bool,
    absent: Tensor | None,
    statistic: Statistic | None,
) -> tuple[Tensor, Tensor | None]:
    logits = head(hidden)
    if not isinstance(head, torch.nn.Module):  # its last operation may need its own result
        logits = logits.clone()
    if statistic is not None:
        logits = without_absent(logits.float(), absent)
        log_normalizer = logits.logsumexp(dim=-1)
        logp = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - log_normalizer
        return logp, statistic(logits, log_normalizer)
    logp, entropy = _Scores.apply(logits, targets, absent, with_entropy)
    return logp, entropy if with_entropy else None


class _Scores(torch.autograd.Function):
    """log π of the targets and entropies, [rows] float32 each, from logits [rows, vocabulary].

    The backward pass writes the gradient over the logits, and so can run only once.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, absent: Tensor | None, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        log_normalizer = logits.new_empty(len(logits), dtype=torch.float32)
        entropy = torch.zeros_like(log_normalizer)
        for part in _blocks(logits):
            rows = without_absent(logits[part].float(), absent)
            largest = rows.amax(-1, keepdim=True)
            weights = (rows - largest).exp_()
            total = weights.sum(-1)
            log_normalizer[part] = total.log() + largest.squeeze(-1)
            if with_entropy:  # H = log Z − Σ p·logit
                expected_logit = weights.mul_(rows).sum(-1) / total
                entropy[part] = log_normalizer[part] - expected_logit
        logp = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1).float() - log_normalizer
        ctx.absent = absent
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, targets, log_normalizer, entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None, None, None]:
        of_logp, of_entropy = gradients
        logits, targets, log_normalizer, entropy = ctx.saved_tensors
        for part in _blocks(logits):
            rows = without_absent(logits[part].float(), ctx.absent)
            logp = rows - log_normalizer[part, None]
            slope = torch.zeros_like(log_normalizer[part, None])
            if of_logp is not None:  # ∂log π(target)/∂logit = 1(target) − p
                slope = slope - of_logp[part, None]
            if of_entropy is not None:  # ∂H/∂logit = −p (log p + H)
                slope = slope - of_entropy[part, None] * (logp + entropy[part, None])
            gradient = logp.exp_().mul_(slope)
            if of_logp is not None:
                gradient.scatter_add_(-1, targets[part, None], of_logp[part, None])
            logits[part] = gradient
        return logits, None, None, None


def _blocks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK // max(1, logits.shape[-1]))
    for first in range(0, len(logits), rows):
        yield slice(first, first + rows)


def without_absent(logits: Tensor, absent: Tensor | None) -> Tensor:
    """Logits [rows, vocabulary] with which ids that do not exist have probability 0.

    Args:
        absent: [vocabulary] bool; None where every id exists.
    """
    if absent is None:
        return logits
    # Not −∞, of which the entropy would make 0 · ∞.
    return logits.masked_fill(absent, torch.finfo(logits.dtype).min)


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum `values` where `mask` is true; masked values cannot leak, not even as NaN."""
    kept = values.masked_fill(~mask.bool(), 0)
    return kept.sum() if dim is None else kept.sum(dim)


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions [batch, length] that count attended tokens only, so padding does not shift them."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
