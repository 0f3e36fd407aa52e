"""The certificate of the optimum, on trees of responses that can be enumerated."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from step3_rlhf import ppo
from step3_rlhf.config import EarlyStoppingSettings
from step3_rlhf.evaluation.metrics import kl_divergence
from step3_rlhf.iteration_metrics import EarlyStopping
from step3_rlhf.regularizers import Regularizer, ResponseSet, parse_regularizer
from step3_rlhf.regularizers.optimality import certificate, kl_to_optimum, spread
from step3_rlhf.regularizers.optimum import optimum
from step3_rlhf.rewards.mixture import log_sums_of_others, mixture_reward

EOS, A, B = 0, 1, 2
RESPONSES = [
    [EOS],
    *([x, EOS] for x in (A, B)),
    *([x, y, z] for x, y, z in itertools.product((A, B), (A, B), (EOS, A, B))),
]
BY_NAME: dict[str, dict[str, Any]] = {
    "none": {"name": "none"},
    "kl": {"name": "kl", "beta": 0.5},
    "pm": {"name": "pm", "beta": 2.0},
    "maximum_entropy": {"name": "maximum_entropy", "tau": 0.5},
    "conditional_pm-token": {"name": "conditional_pm", "alpha": 0.3},
    "conditional_pm-sequence": {"name": "conditional_pm", "alpha": 0.05, "level": "sequence"},
    "conditional_pm-epsilon": {
        "name": "conditional_pm", "alpha": 0.05, "level": "sequence", "epsilon": 1e-3,
    },
    "kl_interpolation": {"name": "kl_interpolation", "kappa": 0.4},
    "reverse_kl": {"name": "f_divergence", "divergence": "reverse_kl"},
    "reverse_kl-token": {"name": "f_divergence", "divergence": "reverse_kl", "level": "token"},
    "forward_kl": {"name": "f_divergence", "divergence": "forward_kl"},
    "js_divergence": {"name": "f_divergence", "divergence": "js_divergence"},
    "alpha_divergence": {"name": "f_divergence", "divergence": "alpha_divergence", "alpha": 0.4},
    "chi_squared": {"name": "f_divergence", "divergence": "chi_squared"},
    "hellinger": {"name": "f_divergence", "divergence": "hellinger"},
    "exponential": {"name": "generalized_pl", "g": "exponential"},
    "softplus": {"name": "generalized_pl", "g": "softplus"},
    "power": {"name": "generalized_pl", "g": "power", "exponent": 2.0, "beta": 4.0},
    "sigmoid": {"name": "generalized_pl", "g": "sigmoid"},
    "softplus-luce": {"name": "generalized_pl", "g": "softplus", "target": "luce", "beta": 0.5},
}  # fmt: skip
LOG_LINEAR = [name for name, s in BY_NAME.items() if parse_regularizer(s).is_log_linear]


def by_token(log_pi: Tensor) -> Tensor:
    """[K, 3] log π_t of a distribution over the tree: mass through a token over mass before it."""
    found = torch.zeros(len(RESPONSES), 3, dtype=torch.float64)
    mass = {
        prefix: torch.logsumexp(log_pi[[tuple(y[: len(prefix)]) == prefix for y in RESPONSES]], 0)
        for y in RESPONSES
        for prefix in (tuple(y[:t]) for t in range(len(y) + 1))
    }
    for row, y in enumerate(RESPONSES):
        for t in range(len(y)):
            found[row, t] = mass[tuple(y[: t + 1])] - mass[tuple(y[:t])]
    return found


def tree(seed: int = 0) -> ResponseSet:
    """All responses of one to three tokens, with a random reference and normal rewards."""
    generator = torch.Generator().manual_seed(seed)
    count = len(RESPONSES)
    log_ref = torch.randn(count, generator=generator).double().log_softmax(0)
    tokens = torch.tensor([y + [EOS] * (3 - len(y)) for y in RESPONSES])
    mask = torch.tensor([[t < len(y) for t in range(3)] for y in RESPONSES])
    rewards = torch.randn(count, generator=generator).double()
    return ResponseSet(tokens, by_token(log_ref), mask, rewards)


def credits(regularizer: Regularizer, responses: ResponseSet, log_pi: Tensor) -> Tensor:
    """[K] a(y) of every response."""
    marginal = regularizer.marginal(by_token(log_pi), responses.ref_logp, responses.mask)
    return regularizer.effective_reward(responses.rewards) + marginal.per_token.sum(-1)


def exact(values: Tensor, log_pi: Tensor, beta: float) -> dict[str, float]:
    """What `certificate` estimates, from the whole distribution."""
    pi = log_pi.exp()
    mean = (pi * values).sum()
    variance = (pi * (values - mean) ** 2).sum() / beta**2
    kl = torch.logsumexp(log_pi + values / beta, 0) - mean / beta
    return {"gap": beta * variance.item() / 2, "spread": variance.item(), "kl": kl.item()}


def largest_advantage(values: Tensor) -> float:
    """The largest |A_i| of RLOO in one group that has every response twice."""
    group = values.repeat(2)[:, None]
    mask = torch.ones(group.shape, dtype=torch.bool)
    return ppo.leave_one_out(group, mask, each=len(group))[0].abs().max().item()


# At the optimum


@pytest.mark.parametrize("name", BY_NAME)
def test_every_optimum_has_one_credit(name: str) -> None:
    regularizer, responses = parse_regularizer(BY_NAME[name]), tree()
    best = optimum(regularizer, responses)
    given = best > -math.inf  # power, chi_squared and none give some responses nothing
    values = credits(regularizer, responses, torch.where(given, best, -700.0))[given]
    found = certificate(values[None, :].repeat(1, 2), regularizer)
    assert found["spread"].item() <= 1e-24  # a deviation of 1e-12
    assert found["gap"].item() <= 1e-24
    assert ("kl" in found) == (name in LOG_LINEAR)
    if "kl" in found:
        assert abs(found["kl"].item()) <= 1e-12
    assert largest_advantage(values) <= 1e-12
    # Elsewhere it is not: the reference, which has all responses.
    elsewhere = credits(regularizer, responses, responses.sequence_ref_logp)
    assert certificate(elsewhere[None], regularizer)["gap"].item() > 0.02
    assert largest_advantage(elsewhere) > 0.1


@pytest.mark.parametrize("name", ["forward_kl", "chi_squared", "js_divergence", "power"])
def test_with_r_in_place_of_the_marginal_it_would_not_be_constant(name: str) -> None:
    """The wrong variant: r + R, which is what objectives report."""
    regularizer, responses = parse_regularizer(BY_NAME[name]), tree()
    best = optimum(regularizer, responses)
    given = best > -math.inf
    logp = by_token(torch.where(given, best, -700.0))
    wrong = responses.rewards + regularizer.value(logp, responses.ref_logp, responses.mask)
    assert certificate(wrong[given][None], regularizer)["spread"].item() > 1e-4


def test_what_has_no_certificate() -> None:
    """f' of total variation is a step; token-level divergences are an approximation."""
    for settings in (
        {"divergence": "total_variation"},
        {"divergence": "hellinger", "level": "token"},
        {"divergence": "chi_squared", "level": "token"},
    ):
        regularizer = parse_regularizer({"name": "f_divergence", **settings})
        assert certificate(torch.zeros(1, 2), regularizer) == {}
    # With total variation the optimum's credits do differ.
    regularizer = parse_regularizer({"name": "f_divergence", "divergence": "total_variation"})
    responses = tree()
    best = optimum(regularizer, responses)
    given = best > -math.inf
    values = credits(regularizer, responses, torch.where(given, best, -700.0))[given]
    assert spread(values[None], 1.0).item() > 0.01


# What it estimates


@pytest.mark.parametrize("name", LOG_LINEAR)
def test_the_kl_is_that_to_the_optimum(name: str) -> None:
    """log E e^{a/β} − E a/β = KL(π ‖ π*), whatever π is."""
    regularizer, responses = parse_regularizer(BY_NAME[name]), tree()
    log_pi = torch.randn(len(RESPONSES), generator=torch.Generator().manual_seed(1)).double()
    log_pi = log_pi.log_softmax(0)
    values = credits(regularizer, responses, log_pi)
    wanted = kl_divergence(log_pi, optimum(regularizer, responses)).item()
    found = exact(values, log_pi, regularizer.coefficient)["kl"]
    assert found == pytest.approx(wanted, abs=1e-12)
    assert wanted > 0.05


def test_by_hand() -> None:
    """Credits 0 and 2 at β = 2: z = ±½; Var = 2/4; log cosh ½, and twice that by the jackknife."""
    credit = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    found = certificate(credit, parse_regularizer({"name": "kl", "beta": 2.0}))
    assert found["spread"].item() == pytest.approx(0.5, rel=1e-12)
    assert found["gap"].item() == pytest.approx(0.5, rel=1e-12)
    assert found["kl"].item() == pytest.approx(2 * math.log(math.cosh(0.5)), rel=1e-12)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_means_over_all_draws(count: int) -> None:
    """Every tuple of `count` responses with its probability: the spread is unbiased, and the
    jackknife leaves a fraction of the plain estimate's bias."""
    log_pi = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    values = torch.tensor([0.0, 0.4, -0.6], dtype=torch.float64)
    rows = torch.tensor(list(itertools.product(range(3), repeat=count)))
    chances = log_pi[rows].sum(-1).exp()
    wanted = exact(values, log_pi, 1.0)
    drawn = values[rows]
    assert (chances @ spread(drawn, 1.0)).item() == pytest.approx(wanted["spread"], rel=1e-12)
    plain = drawn.logsumexp(-1) - math.log(count) - drawn.mean(-1)
    bias = abs((chances @ kl_to_optimum(drawn, 1.0)).item() - wanted["kl"])
    assert bias < 0.15 * abs((chances @ plain).item() - wanted["kl"])
    assert kl_to_optimum(drawn, 1.0).min() >= -1e-15


@pytest.mark.parametrize("name", ["kl", "pm", "conditional_pm-token", "conditional_pm-sequence"])
def test_it_falls_with_the_exact_kl_along_a_run(name: str) -> None:
    """Exact policy gradients from the reference: each figure falls in every step, and sampled ones
    from 8 responses to each of 4,000 prompts agree with the exact KL."""
    regularizer, responses = parse_regularizer(BY_NAME[name]), tree()
    best, beta = optimum(regularizer, responses), regularizer.coefficient
    logits = responses.sequence_ref_logp.clone()
    generator = torch.Generator().manual_seed(0)
    found: list[tuple[float, ...]] = []
    for step in range(400):
        log_pi = logits.log_softmax(0)
        values = credits(regularizer, responses, log_pi)
        if step % 40 == 0:
            figures = exact(values, log_pi, beta)
            kl = kl_divergence(log_pi, best).item()
            rows = torch.multinomial(log_pi.exp(), 32_000, replacement=True, generator=generator)
            sampled = certificate(values[rows].view(4000, 8), regularizer)
            assert sampled["kl"].mean().item() == pytest.approx(kl, rel=0.2, abs=1e-9)
            found.append((kl, figures["kl"], figures["gap"], figures["spread"]))
        logits = logits + 0.3 * log_pi.exp() * (values - (log_pi.exp() * values).sum()) / beta
    for before, after in itertools.pairwise(found):
        assert all(y < x for x, y in zip(before, after, strict=True))
    assert found[-1][0] < 0.1 * found[0][0]


# Early stopping


def test_a_run_ends_after_enough_iterations_in_a_row() -> None:
    settings = EarlyStoppingSettings(optimum_gap=0.01, patience=2)
    early = EarlyStopping(settings)
    arrived = []
    for gap in (0.5, 0.01, 0.02, 0.009, 0.0):
        early.observe({"optimum/gap": gap})
        arrived.append(early.has_arrived())
    assert arrived == [False, False, False, False, True]
    resumed = EarlyStopping(settings, iterations=1)
    resumed.observe({"optimum/gap": 0.0})
    assert resumed.has_arrived()
    never = EarlyStopping(None)
    never.observe({})
    assert not never.has_arrived()


# Of a mixture

OPPOSITE = torch.tensor([[0.89, 0.01], [0.10, 0.10], [0.01, 0.89]], dtype=torch.float64).log()
"""[3, 2]: rewards of two groups, half of the people each; their mixture is (.45, .10, .45)."""
HALVES = (0.5, 0.5)


def averaged(figure: Any, log_pi: Tensor, count: int) -> float:
    """The mean of a figure of credits [tuples, count, 2] over every tuple of `count` responses."""
    rows = torch.tensor(list(itertools.product(range(3), repeat=count)))
    values = OPPOSITE[rows] - log_pi[rows][..., None]
    return (log_pi[rows].sum(-1).exp() @ figure(values)).item()


def test_a_mixture_of_one_group_is_no_mixture() -> None:
    values = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double()
    regularizer = parse_regularizer({"name": "pm", "beta": 0.7})
    plain = certificate(values, regularizer)
    mixed = certificate(values[..., None], regularizer, (1.0,))
    alike = certificate(values[..., None].expand(5, 4, 2), regularizer, (0.3, 0.7))
    for name, expected in plain.items():
        torch.testing.assert_close(mixed[name], expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(alike[name], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("count", "largest"), [(4, 0.1), (7, 0.03)])
def test_at_the_optimum_of_a_mixture_it_is_nearly_zero_on_average(
    count: int, largest: float
) -> None:
    best = torch.tensor([0.45, 0.10, 0.45], dtype=torch.float64).log()

    def of_the_mixture(values: Tensor) -> Tensor:
        return kl_to_optimum(values, 1.0, HALVES)

    def under_its_own_rewards(values: Tensor) -> Tensor:
        """The wrong variant: each response's reward has other normalizers, from the others."""
        log_z = log_sums_of_others(values)
        credit = mixture_reward(values, log_z, torch.tensor(HALVES).double(), 1.0)
        return kl_to_optimum(credit, 1.0)

    found = averaged(of_the_mixture, best, count)
    wrong = averaged(under_its_own_rewards, best, count)
    gaps = averaged(lambda values: 0.5 * spread(values, 1.0, HALVES), best, count)
    print(f"{count} responses: KL {found:.4f}, gap {gaps:.4f}; with own normalizers {wrong:.4f}")
    assert abs(found) < largest < 0.25 * wrong
    # Elsewhere it is about the exact KL.
    for shares in ([0.3, 0.4, 0.3], [0.7, 0.2, 0.1]):
        log_pi = torch.tensor(shares, dtype=torch.float64).log()
        exact = kl_divergence(log_pi, best).item()
        elsewhere = averaged(of_the_mixture, log_pi, count)
        print(f"  at {shares}: {elsewhere:.3f} of {exact:.3f}")
        assert elsewhere == pytest.approx(exact, rel=0.35)
