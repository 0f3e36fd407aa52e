"""What direct optimization determines: the optimum of every regularizer, and nothing outside.

The population's loss is the expectation of the loss of a comparison of two responses under the
Bradley–Terry–Luce model, over the pairs of a connected graph; a tabular softmax minimizes it.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lbfgs import lowest
from torch import Tensor

from step3_rlhf.direct.loss import compared_log_mass, direct_loss
from step3_rlhf.regularizers.base import Regularizer
from step3_rlhf.regularizers.divergences import DIVERGENCES
from step3_rlhf.regularizers.optimum import optimum_of
from step3_rlhf.regularizers.registry import REGULARIZERS, parse_regularizer

NO_BOUND = {"max_marginal": 1e9}
CONFIGURATIONS: list[dict[str, Any]] = [
    {"name": "kl"},
    {"name": "pm"},
    {"name": "maximum_entropy", "tau": 0.7},
    {"name": "conditional_pm", "alpha": 0.2},
    {"name": "conditional_pm", "level": "sequence", "alpha": 0.2},
    {"name": "conditional_pm", "level": "sequence", "alpha": 0.2, "epsilon": 0.01},
    {"name": "kl_interpolation", "kappa": 0.4},
    *(
        {"name": "f_divergence", "divergence": name, **NO_BOUND}
        for name in DIVERGENCES
        if name not in ("total_variation", "alpha_divergence")
    ),
    *(
        {"name": "f_divergence", "divergence": "alpha_divergence", "alpha": alpha, **NO_BOUND}
        for alpha in (0.02, 0.3, 0.8)
    ),
    {"name": "generalized_pl", "g": "exponential"},
    {"name": "generalized_pl", "g": "softplus"},
    {"name": "generalized_pl", "g": "power", "exponent": 2.0, "beta": 4.0},
    {"name": "generalized_pl", "g": "sigmoid", **NO_BOUND},
]
REWARDS = torch.tensor([0.5, -0.4, 0.9, 0.0], dtype=torch.float64)
REF_LOGP = torch.tensor([0.45, 0.25, 0.1, 0.2], dtype=torch.float64).log()
PATH = ((0, 1), (1, 2), (2, 3))
EVERY_PAIR = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
Loss = Callable[[Tensor], Tensor]


def spelled(config: dict[str, Any]) -> str:
    return "-".join(map(str, config.values()))


def population_loss(
    regularizer: Regularizer,
    pairs: tuple[tuple[int, int], ...],
    rewards: Tensor = REWARDS,
    ref_logp: Tensor = REF_LOGP,
) -> Loss:
    """log π [K] -> the mean loss over `pairs`, each answered as often as the rewards say."""
    first, second = torch.tensor(pairs).T
    both = torch.ones(len(pairs), 2, dtype=torch.bool)
    share = (rewards[first] - rewards[second]).sigmoid()

    def loss(logp: Tensor) -> Tensor:
        every = torch.ones(len(logp), 1, dtype=torch.bool)
        m = regularizer.marginal(logp[:, None], ref_logp[:, None], every).per_token.sum(-1)
        won = direct_loss(torch.stack([m[first], m[second]], -1), both)
        lost = direct_loss(torch.stack([m[second], m[first]], -1), both)
        return (share * won + (1 - share) * lost).mean()

    return loss


def minimizer(loss: Loss, size: int = 4) -> Tensor:
    """[K] π that minimizes `loss(log π)`."""
    search = {"iterations": 2000, "tolerance": 1e-13, "rounds": 3}
    return lowest(lambda logits: loss(logits.log_softmax(0)), size, **search).softmax(0)


def distance(p: Tensor, q: Tensor) -> float:
    return (p - q).abs().sum().item() / 2


@pytest.mark.parametrize("config", CONFIGURATIONS, ids=spelled)
def test_the_population_minimizer_is_the_optimum(config: dict[str, Any]) -> None:
    """On a path, which is connected with as few comparisons as possible."""
    regularizer = parse_regularizer(config)
    expected = optimum_of(regularizer, REWARDS, REF_LOGP).exp()
    assert expected.min().item() > 1e-3  # no corner, at which a softmax never arrives
    assert distance(minimizer(population_loss(regularizer, PATH)), expected) <= 1e-6


def test_all_regularizers_with_a_gradient_are_covered() -> None:
    flat = {name for name, kind in REGULARIZERS.items() if name == "none"}
    assert {config["name"] for config in CONFIGURATIONS} == REGULARIZERS.keys() - flat
    divergences = {config.get("divergence") for config in CONFIGURATIONS} - {None}
    assert divergences == DIVERGENCES.keys() - {"total_variation"}


@pytest.mark.parametrize("divergence", ["total_variation", None])
def test_a_flat_marginal_teaches_nothing(divergence: str | None) -> None:
    config = {"name": "none"}
    if divergence:
        config = {"name": "f_divergence", "divergence": divergence}
    regularizer = parse_regularizer(config)
    assert regularizer.is_flat
    logits = torch.tensor([0.1, -0.3, 0.2, 0.5], dtype=torch.float64, requires_grad=True)
    loss = population_loss(regularizer, PATH)(logits.log_softmax(0))
    gradient = (
        torch.autograd.grad(loss, logits, allow_unused=True)[0] if loss.requires_grad else None
    )
    assert gradient is None or not gradient.any()


def test_the_value_in_place_of_the_marginal_ends_elsewhere() -> None:
    """The wrong variant: R instead of R + πR′."""
    regularizer = parse_regularizer({"name": "f_divergence", "divergence": "chi_squared"})
    expected = optimum_of(regularizer, REWARDS, REF_LOGP).exp()
    first, second = torch.tensor(PATH).T
    both = torch.ones(len(PATH), 2, dtype=torch.bool)
    share = (REWARDS[first] - REWARDS[second]).sigmoid()

    def loss(logp: Tensor) -> Tensor:
        every = torch.ones(len(logp), 1, dtype=torch.bool)
        value = regularizer.value(logp[:, None], REF_LOGP[:, None], every)
        won = direct_loss(torch.stack([value[first], value[second]], -1), both)
        lost = direct_loss(torch.stack([value[second], value[first]], -1), both)
        return (share * won + (1 - share) * lost).mean()

    assert distance(minimizer(loss), expected) > 0.02


def test_what_is_not_connected_is_not_determined() -> None:
    """0 with 1, 2 with 3: the ratio of the parts stays where it was."""
    regularizer = parse_regularizer({"name": "pm"})
    found = minimizer(population_loss(regularizer, ((0, 1), (2, 3))))
    expected = REWARDS.softmax(0)
    for pair in ([0, 1], [2, 3]):
        assert (
            distance(found[pair] / found[pair].sum(), expected[pair] / expected[pair].sum()) < 1e-6
        )
    assert abs(found[:2].sum() - expected[:2].sum()) > 0.05


@pytest.mark.parametrize("config", [{"name": "pm"}, {"name": "kl"}], ids=spelled)
def test_mass_outside_the_compared_set_is_free(config: dict[str, Any]) -> None:
    """The same loss and gradient at support masses .9998, .91 and .025: the last is a collapse."""
    regularizer = parse_regularizer(config)
    on_set = optimum_of(regularizer, REWARDS, REF_LOGP)
    loss = population_loss(regularizer, EVERY_PAIR)
    losses, gradients = [], []
    for mass in (0.9998, 0.91, 0.025):
        logp = (on_set + torch.tensor(mass).log()).requires_grad_()
        losses.append(loss(logp))
        gradients.append(torch.autograd.grad(losses[-1], logp)[0].abs().max().item())
    assert max(losses).item() - min(losses).item() <= 1e-12
    assert max(gradients) <= 1e-12
    anchored = [loss(logp).item() - torch.tensor(mass).log().item() for mass in (0.9998, 0.025)]
    assert anchored[1] > anchored[0] + 3.0


def anchored_minimizer(term: Loss, weight: float) -> Tensor:
    """[5] the minimizer with weight · term, on four compared responses and one that is not."""
    regularizer = parse_regularizer({"name": "pm"})
    compared = population_loss(regularizer, EVERY_PAIR)
    return minimizer(lambda logp: compared(logp[:4]) + weight * term(logp), size=5)


@pytest.mark.parametrize("weight", [0.1, 1.0, 10.0])
def test_the_anchor_moves_nothing_but_the_mass(weight: float) -> None:
    whole = torch.tensor([[True] * 4])
    found = anchored_minimizer(lambda logp: -compared_log_mass(logp[None, :4], whole)[0], weight)
    assert found[4].item() < 1e-3
    assert distance(found[:4] / found[:4].sum(), REWARDS.softmax(0)) <= 1e-6


def test_an_sft_term_on_the_chosen_response_moves_the_ratios() -> None:
    """The wrong anchor: a response that wins more often is also given more often."""
    first, second = torch.tensor(EVERY_PAIR).T
    share = (REWARDS[first] - REWARDS[second]).sigmoid()

    def chosen(logp: Tensor) -> Tensor:
        return -(share * logp[first] + (1 - share) * logp[second]).mean()

    found = anchored_minimizer(chosen, weight=1.0)
    assert found[4].item() < 1e-3
    assert distance(found[:4], REWARDS.softmax(0)) > 0.03


def test_the_mass_of_the_pair_alone_moves_the_ratios() -> None:
    """Another wrong anchor, which draws all responses together: the whole set is needed."""
    first, second = torch.tensor(EVERY_PAIR).T

    def pairs(logp: Tensor) -> Tensor:
        both = torch.stack([logp[first], logp[second]], -1)
        return -compared_log_mass(both, torch.ones_like(both, dtype=torch.bool)).mean()

    found = anchored_minimizer(pairs, weight=1.0)
    assert distance(found[:4], REWARDS.softmax(0)) > 0.03
