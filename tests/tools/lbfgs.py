"""Minimizes a smooth function of logits: the proofs compare where it ends with a closed form."""

from collections.abc import Callable

import torch
from torch import Tensor


def lowest(
    loss: Callable[[Tensor], Tensor],
    *shape: int,
    start: Tensor | None = None,
    iterations: int = 400,
    tolerance: float = 1e-11,
    rounds: int = 1,
) -> Tensor:
    """[shape] float64: the logits at the end of L-BFGS, which starts from 0 or from `start`.

    Args:
        loss: logits -> [].
        tolerance: the search ends at a gradient as small as this.
        rounds: how often the search is started again from where it ended.
    """
    first = torch.zeros(shape, dtype=torch.float64) if start is None else start.clone()
    logits = first.requires_grad_()
    search = torch.optim.LBFGS(
        [logits],
        max_iter=iterations,
        tolerance_grad=tolerance,
        tolerance_change=1e-5 * tolerance,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        search.zero_grad()
        value = loss(logits)
        value.backward()
        return value

    for _ in range(rounds):
        search.step(closure)
    return logits.detach()
