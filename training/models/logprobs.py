"""Token log-probabilities from hidden states, and helpers for masks.

The log-softmax runs in float32 over a few rows at a time, and only over rows that are scored. No
float32 tensor [batch, length, vocabulary] ever exists, not even in the backward pass.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROWS_PER_CHUNK = 1024

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
        statistic: returned in place of the entropy.

    Returns:
        log-probabilities [rows] float32, and entropies [rows] float32 (nats) or None.
    """
    statistic = statistic or (entropy_of if with_entropy else None)
    logps, entropies = [], []
    for number in range(chunks or chunks_of(len(targets), rows_per_chunk)):
        part = slice(number * rows_per_chunk, (number + 1) * rows_per_chunk)
        rows, wanted = hidden[part], targets[part]
        if torch.is_grad_enabled():
            logp, entropy = checkpoint(
                _score_rows, rows, wanted, head, statistic, absent, use_reentrant=False
            )
        else:
            logp, entropy = _score_rows(rows, wanted, head, statistic, absent)
        logps.append(logp)
        entropies.append(entropy)
    return torch.cat(logps), torch.cat(entropies) if statistic else None


def chunks_of(rows: int, rows_per_chunk: int = ROWS_PER_CHUNK) -> int:
    """Number of chunks for `rows`; one for no rows at all, so that there is a graph."""
    return max(1, -(-rows // rows_per_chunk))


def _score_rows(
    hidden: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    statistic: Statistic | None,
    absent: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    logits = without_absent(head(hidden).float(), absent)
    log_normalizer = logits.logsumexp(dim=-1)
    logp = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - log_normalizer
    return logp, statistic(logits, log_normalizer) if statistic else None


def entropy_of(logits: Tensor, log_normalizer: Tensor) -> Tensor:
    """[rows] H = log Z − Σ p·logit, nats."""
    return log_normalizer - (logits.softmax(dim=-1) * logits).sum(dim=-1)


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
    kept = torch.where(mask.bool(), values, torch.zeros((), dtype=values.dtype).to(values))
    return kept.sum() if dim is None else kept.sum(dim)


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions [batch, length] that count attended tokens only, so padding does not shift them."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
