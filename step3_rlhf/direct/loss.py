"""The losses of direct optimization: pure functions, in nats, one term per comparison.

At the optimum of a regularizer the first-order condition says r(x, y) = λ(x) − m(y), with the
marginal m = R + πR′ (eq. 3.6). A comparison of responses to one prompt sees only differences of
rewards, in which λ(x) cancels: −m takes the place of the reward in the Plackett–Luce likelihood
(Assumption A.1). `kl` gives DPO (Rafailov et al. 2023), `f_divergence` f-DPO (Wang et al. 2023).

Shapes: C comparisons of up to K responses each, best first.
"""

import torch
from torch import Tensor

from training.preferences.plackett_luce import plackett_luce_loss


def direct_loss(marginals: Tensor, present: Tensor) -> Tensor:
    """The Plackett–Luce loss with rewards −m; of a pair −log σ(m(y_l) − m(y_w)).

    Args:
        marginals: [C, K] m(y) summed over the response's tokens, in units of reward.
        present: [C, K] bool; False after the last response of a shorter ranking.

    Returns:
        [C] losses; 0 for a comparison without responses.
    """
    return plackett_luce_loss(-marginals, present)  # r = λ(x) − m(y)


def compared_log_mass(logp: Tensor, present: Tensor) -> Tensor:
    """log Σ_y π(y|x) over a prompt's compared responses, whose negative the anchor adds.

    It is the same for all ratios of these responses, so that it moves none that comparisons
    determine.

    Args:
        logp: [C, S] log π(y|x).
        present: [C, S] bool.

    Returns:
        [C]; 0 for a prompt without responses.
    """
    some = present.any(-1)
    logp = logp.masked_fill(~present, -torch.inf).masked_fill(~some[:, None], 0.0)
    return torch.where(some, logp.logsumexp(-1), 0.0)


def implied_pairs(present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs that rankings imply, as indices (comparison, better, worse), [pairs] each."""
    count = present.shape[-1]
    better, worse = torch.triu_indices(count, count, offset=1, device=present.device)
    row, pair = (present[:, better] & present[:, worse]).nonzero(as_tuple=True)
    return row, better[pair], worse[pair]
