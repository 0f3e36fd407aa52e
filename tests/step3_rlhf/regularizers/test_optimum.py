"""The exact optimum: closed forms, first-order conditions, gradient ascent, the prefix tree."""

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from lbfgs import lowest
from torch import Tensor

from step3_rlhf.regularizers.base import Marginal, NoOptimumError, Regularizer, ResponseSet
from step3_rlhf.regularizers.divergences import DIVERGENCES
from step3_rlhf.regularizers.optimum import optimum, optimum_of
from step3_rlhf.regularizers.registry import parse_regularizer
from step3_rlhf.regularizers.solvers import decreasing_root

LOG_LINEAR: list[dict[str, Any]] = [
    {"name": "kl"},
    {"name": "pm"},
    {"name": "maximum_entropy", "tau": 0.7},
    {"name": "conditional_pm", "alpha": 0.2},
    {"name": "conditional_pm", "level": "sequence", "alpha": 0.2},
    {"name": "conditional_pm", "level": "sequence", "alpha": 0.2, "epsilon": 0.01},
    {"name": "kl_interpolation", "kappa": 0.4},
]
SMOOTH_F = [
    {"name": "f_divergence", "divergence": name, "max_marginal": 1e9}
    for name in DIVERGENCES
    if name not in ("total_variation", "alpha_divergence")
] + [
    {"name": "f_divergence", "divergence": "alpha_divergence", "max_marginal": 1e9, "alpha": alpha}
    for alpha in (0.02, 0.3, 0.8)  # each of the forms in which it is computed
]
TOTAL_VARIATION = {"name": "f_divergence", "divergence": "total_variation"}
GENERALIZED: list[dict[str, Any]] = [
    {"name": "generalized_pl", "g": "exponential"},
    {"name": "generalized_pl", "g": "softplus"},
    {"name": "generalized_pl", "g": "power", "exponent": 2.0},
    {"name": "generalized_pl", "g": "sigmoid", "max_marginal": 1e9},
    {"name": "generalized_pl", "g": "exponential", "target": "luce"},
    {"name": "generalized_pl", "g": "softplus", "target": "luce"},
    {"name": "generalized_pl", "g": "sigmoid", "target": "luce"},
]
SMOOTH = [*LOG_LINEAR, *SMOOTH_F, *GENERALIZED]

quick = settings(
    max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
thorough = settings(quick, max_examples=40)


def spelled(config: dict[str, Any]) -> str:
    return "-".join(str(value) for value in config.values())


def every(configs: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("config", configs, ids=spelled)


def at_beta(config: dict[str, Any], beta: float) -> Regularizer:
    beta = 1.0 if config["name"] == "maximum_entropy" else beta
    return parse_regularizer({**config, "beta": beta})


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def problems(size: int, spread: float, bias: float) -> st.SearchStrategy[tuple[Tensor, Tensor]]:
    """(rewards [K], reference log-probabilities [K], normalized), 2 ≤ K ≤ `size`."""
    pair = st.tuples(st.floats(-spread, spread), st.floats(-bias, bias))
    pairs = st.lists(pair, min_size=2, max_size=size, unique=True)
    return pairs.map(
        lambda rows: (
            vector(*(row[0] for row in rows)),
            vector(*(row[1] for row in rows)).log_softmax(0),
        )
    )


def objective(regularizer: Regularizer, logp: Tensor, ref_logp: Tensor, rewards: Tensor) -> Tensor:
    mask = torch.ones(len(rewards), 1, dtype=torch.bool)
    value = regularizer.value(logp[:, None], ref_logp[:, None], mask)
    return (logp.exp() * (regularizer.effective_reward(rewards) + value)).sum()


def total_variation(log_p: Tensor, log_q: Tensor) -> float:
    return (log_p.exp() - log_q.exp()).abs().sum().item() / 2


def gradient_ascent(regularizer: Regularizer, ref_logp: Tensor, rewards: Tensor) -> Tensor:
    """[K] log π at the end of L-BFGS on the logits, from the uniform policy."""

    def loss(logits: Tensor) -> Tensor:
        return -objective(regularizer, logits.log_softmax(0), ref_logp, rewards)

    return lowest(loss, len(rewards)).log_softmax(0)


def mirror_ascent(regularizer: Regularizer, ref_logp: Tensor, rewards: Tensor) -> Tensor:
    """As above by exponentiated gradients in shrinking steps, for objectives with kinks."""
    logits = torch.zeros_like(rewards)
    step = 1.0
    for _ in range(1200):
        pi = logits.softmax(0).requires_grad_()
        (gradient,) = torch.autograd.grad(objective(regularizer, pi.log(), ref_logp, rewards), pi)
        logits = logits + step * (gradient - gradient.max())
        # further down, π·R(π) is a difference of numbers too large for float64
        logits = (logits - logits.max()).clamp(min=-20.0)
        step *= 0.99
    return logits.log_softmax(0)


# --- proof 2: gradient ascent ---------------------------------------------------------------------


@pytest.mark.long
@every(SMOOTH)
@quick
@given(problem=problems(size=5, spread=2.5, bias=2.5), beta=st.floats(0.5, 2.0))
def test_gradient_ascent_ends_at_the_optimum(
    config: dict[str, Any], problem: tuple[Tensor, Tensor], beta: float
) -> None:
    rewards, ref_logp = problem
    if {config.get("g"), config.get("divergence")} & {"power", "chi_squared"}:
        # Their optimum can be 0, and a softmax that has come near 0 takes very long to come back.
        rewards = rewards / 2
    regularizer = at_beta(config, beta)
    found = gradient_ascent(regularizer, ref_logp, rewards)
    assert total_variation(found, optimum_of(regularizer, rewards, ref_logp)) <= 1e-4


@pytest.mark.long
@quick
@given(problem=problems(size=5, spread=2.0, bias=1.5), beta=st.floats(0.5, 2.0))
def test_gradient_ascent_ends_at_the_optimum_of_total_variation(
    problem: tuple[Tensor, Tensor], beta: float
) -> None:
    rewards, ref_logp = problem
    ordered = rewards.sort(descending=True).values
    # Elsewhere the optimum is not unique, or a slope of zero leads to it.
    assume(ordered[0] - ordered[1] > 0.2)
    assume(((ordered[0] - ordered - beta).abs() > 0.2).all())
    regularizer = at_beta(TOTAL_VARIATION, beta)
    found = mirror_ascent(regularizer, ref_logp, rewards)
    assert total_variation(found, optimum_of(regularizer, rewards, ref_logp)) <= 1e-4


@every([*SMOOTH, TOTAL_VARIATION, {"name": "none"}])
@thorough
@given(
    problem=problems(size=5, spread=3.0, bias=3.0), logits=st.lists(st.floats(-4, 4), min_size=5)
)
def test_no_other_policy_is_better(
    config: dict[str, Any], problem: tuple[Tensor, Tensor], logits: list[float]
) -> None:
    rewards, ref_logp = problem
    regularizer = at_beta(config, 0.8)
    best = optimum_of(regularizer, rewards, ref_logp)
    other = vector(*logits[: len(rewards)]).log_softmax(0)
    near = torch.log(0.999 * best.exp() + 0.001 * other.exp())
    reached = _value_at(regularizer, best, ref_logp, rewards)
    for policy in (other, near):
        assert reached >= _value_at(regularizer, policy, ref_logp, rewards) - 1e-9


def _value_at(regularizer: Regularizer, logp: Tensor, ref_logp: Tensor, rewards: Tensor) -> float:
    """The objective where π may be zero: π·R(π) has a limit there, reached at e^−60."""
    return objective(regularizer, logp.clamp(min=-60.0), ref_logp, rewards).item()


# --- first-order conditions: the optimum and the marginal agree -----------------------------------


@every(SMOOTH)
@thorough
@given(problem=problems(size=6, spread=30.0, bias=15.0), beta=st.floats(0.05, 20.0))
@example(problem=(vector(0.0, 0.0, 0.0), vector(-1.0, -2.0, -3.0).log_softmax(0)), beta=1.0)
@example(problem=(vector(1e3, -1e3), vector(-40.0, 0.0).log_softmax(0)), beta=1.0)
@example(problem=(vector(0.0, 1e-9), vector(0.0, 0.0).log_softmax(0)), beta=1e-3)
def test_first_order_conditions(
    config: dict[str, Any], problem: tuple[Tensor, Tensor], beta: float
) -> None:
    """r + marginal is one constant λ where π* > 0 and not above it where π* = 0."""
    rewards, ref_logp = problem
    regularizer = at_beta(config, beta)
    log_pi = optimum_of(regularizer, rewards, ref_logp)
    assert log_pi.dtype == torch.float64
    assert abs(log_pi.exp().sum().item() - 1.0) <= 1e-10
    mask = torch.ones(len(rewards), 1, dtype=torch.bool)
    marginal = regularizer.marginal(log_pi.clamp(min=-1e6)[:, None], ref_logp[:, None], mask)
    total = regularizer.effective_reward(rewards) + marginal.per_token[:, 0]
    # A probability is known to 16 digits, which near π = 1 says little about sigmoid's logit.
    inside = (log_pi > -600.0) & (log_pi < -1e-6)
    scale = 1e-6 * (1.0 + rewards.abs().max().item() + beta)
    if inside.any():
        level = total[inside].mean()
        assert (total[inside] - level).abs().max().item() <= scale
        assert (total[log_pi == -math.inf] <= level + scale).all()


@every(SMOOTH_F)
@thorough
@given(problem=problems(size=6, spread=9.9, bias=8.0), beta=st.floats(0.1, 10.0))
def test_a_bound_above_the_spread_of_rewards_does_not_touch_the_optimum(
    config: dict[str, Any], problem: tuple[Tensor, Tensor], beta: float
) -> None:
    rewards, ref_logp = problem
    regularizer = at_beta({**config, "max_marginal": 20.0}, beta)
    log_pi = optimum_of(regularizer, rewards, ref_logp)[:, None].clamp(min=-1e6)
    mask = torch.ones(len(rewards), 1, dtype=torch.bool)
    assert not regularizer.marginal(log_pi, ref_logp[:, None], mask).bound.any()


def test_conditions_fail_for_a_wrong_optimum() -> None:
    """The paper's eq. (5.3) leaves λ out: not the optimum, except of reverse KL."""
    rewards, ref_logp = vector(0.0, -0.5, -1.5), vector(0.5, 0.3, 0.2).log()
    for config in SMOOTH_F:
        regularizer = parse_regularizer(config)
        generator = regularizer.generator
        ceiling = generator.ceiling if math.isfinite(generator.ceiling) else 0.0
        without_multiplier = (ref_logp + generator.log_ratio(ceiling - rewards)).log_softmax(0)
        exact = optimum_of(regularizer, rewards, ref_logp)
        distance = total_variation(exact, without_multiplier)
        least = 5e-4 if config.get("alpha") == 0.02 else 0.01  # α → 0 is reverse KL
        assert distance <= 1e-12 if config["divergence"] == "reverse_kl" else distance > least


# --- literal answers ------------------------------------------------------------------------------

REFERENCE = vector(0.5, 0.3, 0.2)


@pytest.mark.parametrize(
    ("config", "rewards", "expected"),
    [
        ({"name": "none"}, [1.0, 3.0, 3.0], [0.0, 0.5, 0.5]),
        ({"name": "pm"}, [0.0, math.log(2), math.log(5)], [1 / 8, 2 / 8, 5 / 8]),
        ({"name": "pm", "beta": 0.5}, [0.0, math.log(2), math.log(5)], [1 / 30, 4 / 30, 25 / 30]),
        ({"name": "kl"}, [0.0, math.log(2), math.log(5)], [5 / 21, 6 / 21, 10 / 21]),
        (
            {"name": "maximum_entropy", "tau": 0.5},
            [0.0, math.log(2), math.log(5)],
            [1 / 30, 4 / 30, 25 / 30],
        ),
        # tokens below 0.25 keep their reference: weights 1, 1, 0.2
        ({"name": "conditional_pm", "alpha": 0.25}, [0.0, 0.0, math.log(5)], [1 / 3] * 3),
        (
            {"name": "conditional_pm", "alpha": 0.25, "level": "sequence", "epsilon": 0.1},
            [0.0, 0.0, math.log(5)],
            [1 / 2.5, 1 / 2.5, 0.5 / 2.5],
        ),
        ({"name": "kl_interpolation", "kappa": 0.0}, [0.0, 0.0, 0.0], [1 / 3] * 3),
        # forward KL: π = π_ref/(λ − r), λ = 2 solves 0.5/(2 − 1) + 0.3/(2 − 0) + 0.2/(2 − r) = 1
        (
            {"name": "f_divergence", "divergence": "forward_kl"},
            [1.0, 0.0, 2 - 0.2 / 0.35],
            [0.5, 0.15, 0.35],
        ),
        # χ²: u = 1 + (r − λ)/2 with λ = Σπ_ref·r = 0.3
        (
            {"name": "f_divergence", "divergence": "chi_squared"},
            [0.0, 1.0, 0.0],
            [0.5 * 0.85, 0.3 * 1.35, 0.2 * 0.85],
        ),
        # and where one response is worth nothing: 0.5·u_1 + 0.3·u_2 = 1, u_1 − u_2 = 1/2
        (
            {"name": "f_divergence", "divergence": "chi_squared"},
            [1.0, 0.0, -9.0],
            [0.5 * 1.4375, 0.3 * 0.9375, 0.0],
        ),
        (
            {"name": "f_divergence", "divergence": "total_variation"},
            [0.0, -0.5, -1.5],
            [0.7, 0.3, 0.0],
        ),
        (
            {"name": "f_divergence", "divergence": "total_variation", "beta": 0.1},
            [0.0, -0.5, -1.5],
            [1.0, 0.0, 0.0],
        ),
        # Luce: g/Σg as it is, whatever the reference; power gives 0 where r is not positive
        (
            {"name": "generalized_pl", "g": "power", "exponent": 2.0, "target": "luce"},
            [1.0, 3.0, -2.0],
            [0.1, 0.9, 0.0],
        ),
        (
            {"name": "generalized_pl", "g": "softplus", "target": "luce", "beta": 2.0},
            [2.0 * math.log(math.expm1(p)) for p in (0.6, 0.3, 1.5)],
            [0.25, 0.125, 0.625],
        ),
        (
            {"name": "generalized_pl", "g": "sigmoid", "target": "luce"},
            [math.log(3), 0.0, -math.log(3)],
            [0.5, 1 / 3, 1 / 6],
        ),
        (
            {"name": "generalized_pl", "g": "exponential", "target": "luce"},
            [math.log(2), 0.0, 0.0],
            [0.5, 0.25, 0.25],
        ),
        # power, k = 1: π = max(0, r + λ)
        (
            {"name": "generalized_pl", "g": "power", "exponent": 1.0},
            [0.5, 0.1, -0.5],
            [0.7, 0.3, 0.0],
        ),
        # sigmoid: odds are e^{r + λ}; 1/2 and twice 1/4 have odds 1 and 1/3
        ({"name": "generalized_pl", "g": "sigmoid"}, [math.log(3), 0.0, 0.0], [0.5, 0.25, 0.25]),
        (
            {"name": "generalized_pl", "g": "exponential"},
            [math.log(2), 0.0, 0.0],
            [0.5, 0.25, 0.25],
        ),
        (
            {"name": "generalized_pl", "g": "softplus"},
            [math.log(math.expm1(p)) + 7.0 for p in (0.6, 0.3, 0.1)],
            [0.6, 0.3, 0.1],
        ),
    ],
    ids=lambda entry: spelled(entry) if isinstance(entry, dict) else "",
)
def test_literal_optima(
    config: dict[str, Any], rewards: list[float], expected: list[float]
) -> None:
    found = optimum_of(parse_regularizer(config), vector(*rewards), REFERENCE.log())
    assert found.exp().tolist() == pytest.approx(expected, abs=1e-12)


def test_the_two_targets_of_theorem_3_are_two_optima() -> None:
    """Each is its own, and the printed one is not the preference g(r)/Σg, which Luce's is."""
    rewards, ref_logp = vector(0.3, -1.0, 2.0, 0.4), vector(0.4, 0.3, 0.2, 0.1).log()
    for g, same in (("exponential", True), ("softplus", False), ("sigmoid", False)):
        shifted, luce = (
            parse_regularizer({"name": "generalized_pl", "g": g, "target": target})
            for target in ("shifted", "luce")
        )
        preference = luce.log_choice(rewards)
        assert preference is not None
        assert torch.equal(preference, shifted.log_choice(rewards))
        assert torch.equal(optimum_of(luce, rewards, ref_logp), preference)
        apart = total_variation(optimum_of(shifted, rewards, ref_logp), preference)
        assert apart <= 1e-12 if same else apart > 0.02
        # A constant moves g(r)/Σg, and moves the printed optimum not at all.
        moved = total_variation(optimum_of(luce, rewards + 1.0, ref_logp), preference)
        assert moved <= 1e-12 if same else moved > 0.02
        unmoved = optimum_of(shifted, rewards + 1.0, ref_logp)
        assert total_variation(unmoved, optimum_of(shifted, rewards, ref_logp)) <= 1e-12
    assert parse_regularizer({"name": "pm"}).log_choice(rewards) is None


def test_identities_of_the_optima() -> None:
    rewards, ref_logp = vector(0.3, -1.0, 2.0, 0.4), vector(0.4, 0.3, 0.2, 0.1).log()
    for first, second in [
        ({"name": "conditional_pm", "alpha": 0.0}, {"name": "pm"}),
        ({"name": "conditional_pm", "alpha": 1e-300, "level": "sequence"}, {"name": "pm"}),
        ({"name": "conditional_pm", "alpha": 1.5}, {"name": "kl"}),
        ({"name": "conditional_pm", "alpha": 1.5, "level": "sequence"}, {"name": "kl"}),
        ({"name": "kl_interpolation", "kappa": 0.0}, {"name": "pm"}),
        ({"name": "kl_interpolation", "kappa": 1.0}, {"name": "kl"}),
        ({"name": "f_divergence", "divergence": "reverse_kl"}, {"name": "kl"}),
        ({"name": "generalized_pl", "g": "exponential"}, {"name": "pm"}),
        ({"name": "maximum_entropy", "tau": 1.0}, {"name": "pm"}),
        (
            {"name": "f_divergence", "divergence": "alpha_divergence", "alpha": 1e-9},
            {"name": "kl"},
        ),
        (
            {"name": "f_divergence", "divergence": "alpha_divergence", "alpha": 1.0 - 1e-9},
            {"name": "f_divergence", "divergence": "forward_kl"},
        ),
    ]:
        one, other = parse_regularizer(first), parse_regularizer(second)
        torch.testing.assert_close(
            optimum_of(one, rewards, ref_logp),
            optimum_of(other, rewards, ref_logp),
            rtol=1e-7,
            atol=1e-7,
        )


@every([*SMOOTH, TOTAL_VARIATION, {"name": "none"}])
def test_one_response_has_probability_one(config: dict[str, Any]) -> None:
    found = optimum_of(parse_regularizer(config), vector(3.0), vector(-7.0))
    assert found.tolist() == pytest.approx([0.0], abs=1e-12)


# conditional_pm apart, whose thresholds compare the reference as it is
@every([*LOG_LINEAR[:3], LOG_LINEAR[-1], *SMOOTH_F, TOTAL_VARIATION])
def test_a_reference_with_mass_outside_the_set_is_taken_conditional_on_it(
    config: dict[str, Any],
) -> None:
    regularizer, rewards = parse_regularizer(config), vector(0.2, -0.4, 1.5)
    expected = optimum_of(regularizer, rewards, REFERENCE.log())
    torch.testing.assert_close(optimum_of(regularizer, rewards, REFERENCE.log() - 2.0), expected)


@pytest.mark.parametrize(
    ("config", "distance"),
    [
        ({"name": "f_divergence", "divergence": "reverse_kl"}, 0.0),
        # Whole: λ = −0.4, π = (.36, .34, .22 | .08). On the set: λ = 2/3, π = (6, 7, 5)/18. The
        # distance is 9/23 − 1/3.
        ({"name": "f_divergence", "divergence": "chi_squared"}, 4 / 69),
        ({"name": "f_divergence", "divergence": "forward_kl"}, 0.1272519),
        ({"name": "f_divergence", "divergence": "js_divergence"}, 0.0679633),
        ({"name": "f_divergence", "divergence": "hellinger"}, 0.0694062),
        ({"name": "f_divergence", "divergence": "total_variation"}, 2 / 15),
        ({"name": "generalized_pl", "g": "sigmoid"}, 0.0026151),
        ({"name": "generalized_pl", "g": "sigmoid", "target": "luce"}, 0.0),
        ({"name": "kl"}, 0.0),
        ({"name": "conditional_pm", "alpha": 0.25}, 0.0),
    ],
    ids=lambda value: spelled(value) if isinstance(value, dict) else "",
)
def test_the_optimum_on_a_set_is_the_whole_one_given_the_set_only_if_log_linear(
    config: dict[str, Any], distance: float
) -> None:
    """40 % of the reference is outside a set of three. There λ is another one."""
    rewards, log_ref = vector(0.0, 1.0, 2.0, -2.0), vector(0.3, 0.2, 0.1, 0.4).log()
    regularizer = parse_regularizer(config)
    given_the_set = optimum_of(regularizer, rewards, log_ref)[:3].log_softmax(0).exp()
    on_the_set = optimum_of(regularizer, rewards[:3], log_ref[:3]).exp()
    found = 0.5 * (given_the_set - on_the_set).abs().sum().item()
    assert found == pytest.approx(distance, abs=1e-7)
    assert regularizer.is_log_linear == (distance == 0.0)


# --- responses of several tokens ------------------------------------------------------------------


def tree_of_two_tokens(a: float = 0.6, d: float = 0.9) -> ResponseSet:
    """ "a", "b c", "b d": π_ref(a), π_ref(b) = 0.4, π_ref(c|b) = 0.1, π_ref(d|b)."""
    return ResponseSet(
        tokens=torch.tensor([[1, 99], [2, 3], [2, 4]]),
        ref_logp=torch.stack([vector(a, math.nan), vector(0.4, 0.1), vector(0.4, d)]).log(),
        mask=torch.tensor([[True, False], [True, True], [True, True]]),
        rewards=vector(0.0, 1.0, -0.5),
    )


@pytest.mark.parametrize(
    ("config", "log_weights"),
    [
        ({"name": "kl"}, [0.6, 0.04, 0.36]),
        ({"name": "pm"}, [1.0, 1.0, 1.0]),
        ({"name": "conditional_pm", "alpha": 0.5}, [1.0, 0.04, 0.4]),
        ({"name": "conditional_pm", "alpha": 0.5, "level": "sequence"}, [1.0, 0.04, 0.36]),
        ({"name": "conditional_pm", "alpha_per_token": 0.55, "level": "sequence"}, [1, 0.04, 1]),
    ],
    ids=lambda entry: spelled(entry) if isinstance(entry, dict) else "",
)
def test_log_linear_optima_of_responses(config: dict[str, Any], log_weights: list[float]) -> None:
    responses = tree_of_two_tokens()
    weights = vector(*log_weights) * responses.rewards.exp()
    found = optimum(parse_regularizer(config), responses).exp()
    torch.testing.assert_close(found, weights / weights.sum(), rtol=1e-12, atol=0.0)


def test_sequence_level_takes_the_response_as_one() -> None:
    responses = tree_of_two_tokens()
    for config in SMOOTH_F:
        regularizer = parse_regularizer(config)
        found = optimum(regularizer, responses)
        expected = optimum_of(regularizer, responses.rewards, responses.sequence_ref_logp)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@every(SMOOTH_F)
def test_token_level_rests_at_its_optimum(config: dict[str, Any]) -> None:
    """The score-function gradient with the per-token marginal vanishes there, at every prefix."""
    responses = tree_of_two_tokens()
    regularizer = parse_regularizer({**config, "level": "token"})
    pi = optimum(regularizer, responses).exp()
    after_b = pi[1:].sum()
    first = torch.stack([pi[0].log(), after_b.log(), after_b.log()])
    second = torch.cat([vector(0.0), (pi[1:] / after_b).log()])
    logp = torch.stack([first, second], 1)
    marginal = regularizer.marginal(logp, responses.ref_logp, responses.mask).per_token
    total = responses.rewards + marginal.sum(1)
    last = (responses.rewards + marginal[:, 1])[1:]
    assert last[0].item() == pytest.approx(last[1].item(), abs=1e-9)
    assert total.tolist() == pytest.approx([total[0].item()] * 3, abs=1e-9)


def test_token_level_reverse_kl_is_kl() -> None:
    token = parse_regularizer(
        {"name": "f_divergence", "divergence": "reverse_kl", "level": "token", "beta": 0.7}
    )
    kl = parse_regularizer({"name": "kl", "beta": 0.7})
    # The whole tree, and one of which 30 % and then 70 % of the reference's mass lie outside.
    for responses in (tree_of_two_tokens(), tree_of_two_tokens(a=0.3, d=0.2)):
        torch.testing.assert_close(optimum(token, responses), optimum(kl, responses))


@every([config for config in SMOOTH_F if config["divergence"] != "reverse_kl"])
def test_token_level_rests_below_the_maximum_of_its_expected_value(config: dict[str, Any]) -> None:
    """What its name as an approximation means: see FDivergence."""
    responses = tree_of_two_tokens()
    regularizer = parse_regularizer({**config, "level": "token"})

    def expected_value(logits: Tensor) -> Tensor:
        first, second = logits[:2].log_softmax(0), logits[2:].log_softmax(0)
        nothing = torch.zeros((), dtype=torch.float64)
        logp = torch.stack(
            [torch.stack([first[0], nothing]), *(torch.stack([first[1], s]) for s in second)]
        )
        value = regularizer.value(logp, responses.ref_logp, responses.mask)
        return (logp.sum(1).exp() * (responses.rewards + value)).sum()

    rest = optimum(regularizer, responses)
    after_b = torch.logsumexp(rest[1:], 0)
    at_rest = torch.cat([rest[:1], after_b[None], rest[1:] - after_b])
    logits = at_rest.clone().requires_grad_()
    search = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        loss = -expected_value(logits)
        loss.backward()
        return loss

    search.step(loss)
    gain = expected_value(logits.detach()) - expected_value(at_rest)
    assert gain > 0.0 if config.get("alpha") == 0.02 else gain > 1e-4


# --- where there is none --------------------------------------------------------------------------


class WithoutOptimum(Regularizer):
    """From outside, and silent about its optimum."""

    def value(self, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
        return logp.sum(-1)

    def marginal(self, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Marginal:
        return Marginal(logp, mask.any(-1))


class WrongOptimum(WithoutOptimum):
    """Says π = (1 + excess)/K."""

    excess: float = 1.0

    def log_optimum(self, responses: ResponseSet) -> Tensor:
        uniform = torch.zeros_like(responses.rewards).log_softmax(0)
        return uniform + math.log1p(self.excess)


def test_clear_errors_where_no_optimum_is_known() -> None:
    rewards, ref_logp = vector(0.0, 1.0), vector(0.5, 0.5).log()
    with pytest.raises(NoOptimumError, match="custom: WithoutOptimum does not state its optimum"):
        optimum_of(WithoutOptimum(), rewards, ref_logp)
    with pytest.raises(NoOptimumError, match=r"no optimum found; Σπ misses 1 by 1\.0e\+00"):
        optimum_of(WrongOptimum(), rewards, ref_logp)
    with pytest.raises(NoOptimumError, match="misses 1 by 1"):
        optimum_of(WrongOptimum(excess=1e-9), rewards, ref_logp)
    optimum_of(WrongOptimum(excess=1e-11), rewards, ref_logp)
    with pytest.raises(NoOptimumError, match="rewards: all must be finite"):
        optimum_of(WrongOptimum(), vector(0.0, math.inf), ref_logp)
    forward = parse_regularizer({"name": "f_divergence", "divergence": "forward_kl"})
    with pytest.raises(NoOptimumError, match="every response needs a positive reference"):
        optimum_of(forward, rewards, vector(0.0, -math.inf))
    power = {"name": "generalized_pl", "g": "power", "exponent": 2.0, "target": "luce"}
    with pytest.raises(NoOptimumError, match="g is positive at none of the rewards"):
        optimum_of(parse_regularizer(power), vector(0.0, -1.0), ref_logp)
    nothing = parse_regularizer({"name": "kl"})
    with pytest.raises(NoOptimumError, match="no optimum found"):
        optimum_of(nothing, rewards, vector(-math.inf, -math.inf))


def test_clear_errors_on_trees_that_are_none() -> None:
    token = parse_regularizer(
        {"name": "f_divergence", "divergence": "forward_kl", "level": "token"}
    )
    responses = ResponseSet(
        tokens=torch.tensor([[1, 0], [1, 2]]),
        ref_logp=torch.zeros(2, 2),
        mask=torch.tensor([[True, False], [True, True]]),
        rewards=vector(0.0, 1.0),
    )
    with pytest.raises(NoOptimumError, match="one of them is a prefix"):
        optimum(token, responses)
    steps = parse_regularizer({**TOTAL_VARIATION, "level": "token"})
    with pytest.raises(NoOptimumError, match="never rests"):
        optimum(steps, tree_of_two_tokens())
    with pytest.raises(ValueError, match="expected"):
        ResponseSet(torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="one shape"):
        ResponseSet(torch.zeros(2, 1), torch.zeros(2, 2), torch.zeros(2, 1), torch.zeros(2))


def test_decreasing_root_is_found() -> None:
    assert decreasing_root(lambda x: 2.0 - x * x, 0.0, 2.0) == pytest.approx(2**0.5, rel=3e-16)
    assert decreasing_root(lambda x: -x, -1.0, 3.0) == pytest.approx(0.0, abs=1e-18)
    assert decreasing_root(lambda x: 1.0 - x, 1.0, 1.0) == 1.0


@every([*SMOOTH, TOTAL_VARIATION, {"name": "none"}])
def test_every_optimum_has_a_formula_for_people(config: dict[str, Any]) -> None:
    """Model cards have it: more than the class's name, and the value of β where there is one."""
    formula = at_beta(config, 0.75).optimum_formula
    assert not formula.startswith("that of")
    assert "0.75" in formula or config["name"] in ("none", "maximum_entropy")
