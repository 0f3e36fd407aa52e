"""The losses of direct optimization: DPO literally, rankings, the anchor, fillers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from step3_rlhf.direct.loss import compared_log_mass, direct_loss, implied_pairs
from step3_rlhf.regularizers.registry import parse_regularizer

PAIRS, LENGTH = 6, 5
BOTH = torch.ones(PAIRS, 2, dtype=torch.bool)
ABOVE_ONE: list[dict[str, Any]] = [
    {"name": "kl"},
    {"name": "conditional_pm", "alpha": 1.5},
    {"name": "conditional_pm", "alpha": 1.5, "level": "sequence"},
    {"name": "kl_interpolation", "kappa": 1.0},
    {"name": "f_divergence", "divergence": "reverse_kl"},
]
"""All the spellings of `kl`."""


def token_logps(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """log π, log π_ref [2 · PAIRS, LENGTH] and the mask: chosen and rejected in turn."""
    random = torch.Generator().manual_seed(seed)
    shape = (2 * PAIRS, LENGTH)
    logp, ref_logp = (
        -2.0 * torch.rand(shape, generator=random, dtype=torch.float64) for _ in range(2)
    )
    lengths = torch.randint(1, LENGTH + 1, (2 * PAIRS,), generator=random)
    return logp, ref_logp, torch.arange(LENGTH) < lengths[:, None]


def direct(config: dict[str, Any], logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """[PAIRS] this package's losses."""
    marginal = parse_regularizer(config).marginal(logp, ref_logp, mask)
    return direct_loss(marginal.per_token.sum(-1).view(PAIRS, 2), BOTH)


def dpo(beta: float, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """[PAIRS] Rafailov et al. 2023, eq. (7), word for word."""
    policy = (logp * mask).sum(-1)
    reference = (ref_logp * mask).sum(-1)
    pi_w, pi_l = policy[0::2], policy[1::2]
    ref_w, ref_l = reference[0::2], reference[1::2]
    return -logsigmoid(beta * (pi_w - ref_w) - beta * (pi_l - ref_l))


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.5])
@pytest.mark.parametrize(
    "config", ABOVE_ONE, ids=lambda config: "-".join(map(str, config.values()))
)
def test_kl_is_dpo_in_loss_and_gradient(config: dict[str, Any], beta: float) -> None:
    for seed in range(3):
        logp, ref_logp, mask = token_logps(seed)
        found, expected = (logp.clone().requires_grad_() for _ in range(2))
        ours = direct({**config, "beta": beta}, found, ref_logp, mask)
        theirs = dpo(beta, expected, ref_logp, mask)
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
        ours.sum().backward()
        theirs.sum().backward()
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-13, atol=1e-13)


def test_below_one_it_is_not_dpo() -> None:
    logp, ref_logp, mask = token_logps(0)
    ours = direct({"name": "conditional_pm", "alpha": 0.5}, logp, ref_logp, mask)
    assert (ours - dpo(1.0, logp, ref_logp, mask)).abs().max().item() > 0.1


def test_literal_losses() -> None:
    """One token each: π = (.5, .25), π_ref = (.1, .4)."""
    logp = torch.tensor([[0.5], [0.25]], dtype=torch.float64).log()
    ref_logp = torch.tensor([[0.1], [0.4]], dtype=torch.float64).log()
    mask = torch.ones(2, 1, dtype=torch.bool)
    pair = torch.ones(1, 2, dtype=torch.bool)
    for config, odds in [
        ({"name": "pm"}, 2.0),  # .5/.25
        ({"name": "kl"}, 8.0),  # (.5/.1)/(.25/.4)
        ({"name": "conditional_pm", "alpha": 0.2}, 20.0),  # (.5/.1)/.25
        ({"name": "pm", "beta": 2.0}, 4.0),
        ({"name": "f_divergence", "divergence": "forward_kl"}, math.exp(1.4)),  # 1/u: .2, 1.6
    ]:
        marginal = parse_regularizer(config).marginal(logp, ref_logp, mask)
        found = direct_loss(marginal.per_token.sum(-1)[None], pair)
        assert found.item() == pytest.approx(math.log1p(1 / odds), rel=1e-12)
        wrong = direct_loss(-marginal.per_token.sum(-1)[None], pair)  # rewards +m
        assert wrong.item() == pytest.approx(math.log1p(odds), rel=1e-12)


def test_a_ranking_of_three() -> None:
    """Rewards 1, 0, −1: log(1 + e^-1 + e^-2) + log(1 + e^-1)."""
    marginals = torch.tensor([[-1.0, 0.0, 1.0], [-1.0, 0.0, 7.0]], dtype=torch.float64)
    present = torch.tensor([[True, True, True], [True, True, False]])
    found = direct_loss(marginals, present)
    assert found.tolist() == pytest.approx([0.7208676519626034, 0.3132616875182228], rel=1e-12)


def test_the_compared_mass() -> None:
    pi = [[0.2, 0.3, 0.9], [0.5, 0.9, 0.9], [0.1, 0.1, 0.1]]
    logp = torch.tensor(pi, dtype=torch.float64).log()
    present = torch.tensor([[True, True, False], [True, False, False], [False] * 3])
    logp.requires_grad_()
    found = compared_log_mass(logp, present)
    assert found.tolist() == pytest.approx([math.log(0.5), math.log(0.5), 0.0], rel=1e-12)
    found.sum().backward()
    assert logp.grad[0].tolist() == pytest.approx([0.4, 0.6, 0.0])
    assert logp.grad[2].tolist() == [0.0, 0.0, 0.0]  # a filler, finite


def test_the_pairs_that_rankings_imply() -> None:
    present = torch.tensor([[True, True, True], [True, True, False], [False] * 3])
    row, better, worse = (index.tolist() for index in implied_pairs(present))
    assert list(zip(row, better, worse, strict=True)) == [
        (0, 0, 1), (0, 0, 2), (0, 1, 2), (1, 0, 1),
    ]  # fmt: skip
