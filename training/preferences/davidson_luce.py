"""The Davidson–Luce model of choices with ties, and the Plackett–Luce model of partial rankings.

Someone who chooses among the responses A may name a set C ⊆ A of n equally good ones, which has the
geometric mean of their worths v = e^s and a prevalence δ_n of ties of its size, δ_1 = 1 (Davidson
1970 for pairs; Firth, Kosmidis and Turner 2019, "Davidson–Luce model for multi-item choice with
ties"; Turner et al. 2020, the R package PlackettLuce):

    (T.1)  f(C) = δ_n (Π_{i∈C} v_i)^{1/n}
    (T.2)  P(C | A) = f(C) / Σ_{n≤D} Σ_{S⊆A, |S|=n} f(S),        D the size of the largest tie

and a ranking with ties is the sequence of such choices from what is left. For a pair (T.2) is
Davidson's v_i/(v_i + v_j + δ_2 √(v_i v_j)), the tie has δ_2 √(v_i v_j) over the same sum. Without
ties (D = 1) it is Plackett–Luce. Two consequences make it the right one for preference matching:
the probabilities of all outcomes add up to 1, so that the worths are estimated consistently; and of
those who decide, v_i/(v_i + v_j) choose i, Luce's axiom, so that softmax(s) is still what a policy
has to match. Efron's (1977) approximation, known from survival analysis, needs no δ. But its tie of
a pair has 2 v_i v_j/(v_i + v_j)² beside the two decisions, which add up to 1 without it; it is for
orders that exist and were not recorded, and draws worths together where people call a tie.

Such unrecorded orders are partial rankings: "the best k of n" says nothing about the order of the
others, all orders of which together have probability 1, so that

    (T.3)  P(C_1 ≻ … ≻ C_k ≻ the others) = Π_{j≤k} P(C_j | what C_1 … C_{j−1} left)
"""

import torch
from torch import Tensor

NOTHING = -1e30
"""The logarithm of 0; finite, so that no gradient is NaN."""


def davidson_luce_loss(
    scores: Tensor, level: Tensor, ranked: Tensor, present: Tensor, log_ties: Tensor, order: Tensor
) -> Tensor:
    """−log P of rankings with ties (T.2), or of the best of more responses (T.3), in nats.

    Args:
        scores: [rankings, K] s, best first; tied responses stand beside one another.
        level: [rankings, K] long, the same number for tied responses, other ones otherwise.
        ranked: [rankings, K] bool, False for responses that come after the others in unknown order.
        present: [rankings, K] bool, False after the last response of a shorter ranking.
        log_ties: [D − 1] log δ_n for n = 2 … D.
        order: [rankings] long, the largest tie that could be given, 1 for none; at most D.

    Returns:
        [rankings] losses; 0 for a ranking without responses.
    """
    first = torch.ones_like(ranked)
    first[:, 1:] = level[:, 1:] != level[:, :-1]
    tied = level[:, :, None] == level[:, None, :]
    tied = tied & (ranked & present)[:, None, :]
    size = tied.sum(-1).clamp(min=1)
    log_delta = torch.cat([log_ties.new_zeros(1), log_ties])
    mean = (tied * scores[:, None, :]).sum(-1) / size  # the mean of log v over C
    chosen = log_delta[size - 1] + mean  # (T.1)
    losses = log_normalizers(scores, present, log_delta, order) - chosen  # (T.2)
    return torch.where(first & ranked & present, losses, 0.0).sum(-1)  # (T.3)


def log_normalizers(scores: Tensor, present: Tensor, log_delta: Tensor, order: Tensor) -> Tensor:
    """[rankings, K] the logarithm of (T.2)'s sum over the sets of responses i, i + 1, …

    For ties of n it is the elementary symmetric polynomial e_n of the v^{1/n}, which grows by one
    response at a time: e_m(A ∪ {i}) = e_m(A) + v_i^{1/n} e_{m−1}(A).

    Args:
        log_delta: [D] log δ_n for n = 1 … D.
        order: as in `davidson_luce_loss`.
    """
    rankings, count = scores.shape
    sizes = range(1, len(log_delta) + 1)
    start = scores.new_full((rankings, 1), NOTHING)
    polynomials = [[scores.new_zeros(rankings, 1)] + [start] * n for n in sizes]
    found = []
    for place in reversed(range(count)):
        here = present[:, place, None]
        s = scores[:, place, None]
        for n, e in zip(sizes, polynomials, strict=True):
            for m in range(n, 0, -1):
                grown = torch.logaddexp(e[m], s / n + e[m - 1])
                e[m] = torch.where(here, grown, e[m])
        of_size = torch.cat([e[n] for n, e in zip(sizes, polynomials, strict=True)], dim=-1)
        allowed = torch.arange(1, len(log_delta) + 1, device=order.device) <= order[:, None]
        found.append((of_size + log_delta).masked_fill(~allowed, NOTHING).logsumexp(-1))
    return torch.stack(found[::-1], dim=-1)
