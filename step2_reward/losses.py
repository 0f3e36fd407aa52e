"""Preference losses: pure functions, in nats, one term per comparison.

They take scores s = log g(r) of the link g (training/preferences/links.py): rewards, if it is e^r.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid

from training.preferences.davidson_luce import davidson_luce_loss
from training.preferences.plackett_luce import plackett_luce_loss

__all__ = ["btl_loss", "davidson_luce_loss", "plackett_luce_loss"]


def btl_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """−log σ(s_w − s_l), eq. (2.2) and §3.4: `plackett_luce_loss` for two responses.

    Args:
        chosen, rejected: [pairs] scores.

    Returns:
        [pairs] losses.
    """
    return -logsigmoid(chosen - rejected)  # (2.2)
