"""Preference losses: pure functions of rewards, in nats, one term per comparison."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from training.models.plackett_luce import plackett_luce_loss

__all__ = ["btl_loss", "plackett_luce_loss"]


def btl_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """−log σ(r(x, y_w) − r(x, y_l)), eq. (2.2): `plackett_luce_loss` for two responses.

    Args:
        chosen, rejected: [pairs] rewards.

    Returns:
        [pairs] losses.
    """
    return -logsigmoid(chosen - rejected)  # (2.2)
