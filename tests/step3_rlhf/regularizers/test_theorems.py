"""The paper's propositions and theorems, each as a test of its name.

Statements about every policy are checked on random problems; statements that something fails are
checked by a problem on which it does.
"""

from collections.abc import Callable

import pytest
import torch
from lbfgs import lowest
from torch import Tensor

from step3_rlhf.regularizers.base import Regularizer, ResponseSet
from step3_rlhf.regularizers.optimum import optimum, optimum_of
from step3_rlhf.regularizers.registry import parse_regularizer

SEEDS = range(5)


def problem(seed: int, size: int = 5) -> tuple[Tensor, Tensor]:
    """Random rewards [K] and normalized reference log-probabilities [K], float64."""
    random = torch.Generator().manual_seed(seed)
    rewards = torch.randn(size, generator=random, dtype=torch.float64)
    ref_logp = torch.randn(size, generator=random, dtype=torch.float64).log_softmax(0)
    return rewards, ref_logp


def maximizer(objective: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """[K] probabilities that maximize `objective(log π)`, by L-BFGS on the logits."""
    search = {"iterations": 500, "tolerance": 1e-12}
    return lowest(lambda logits: -objective(logits.log_softmax(0)), size, **search).softmax(0)


def expected(
    rewards: Tensor, regularization: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """log π -> E_π[r + R], R given as a function of log π."""
    return lambda logp: (logp.exp() * (rewards + regularization(logp))).sum()


def value_of(regularizer: Regularizer, ref_logp: Tensor) -> Callable[[Tensor], Tensor]:
    mask = torch.ones(len(ref_logp), 1, dtype=torch.bool)
    return lambda logp: regularizer.value(logp[:, None], ref_logp[:, None], mask)


def distance(p: Tensor, q: Tensor) -> float:
    """Total variation."""
    return (p - q).abs().sum().item() / 2


@pytest.mark.parametrize("seed", SEEDS)
def test_proposition_3_1_without_regularization_only_the_best_response_is_left(seed: int) -> None:
    rewards, ref_logp = problem(seed)
    regularizer = parse_regularizer({"name": "none"})
    best = torch.nn.functional.one_hot(rewards.argmax(), len(rewards)).double()
    assert torch.equal(optimum_of(regularizer, rewards, ref_logp).exp(), best)
    found = maximizer(expected(rewards, value_of(regularizer, ref_logp)), len(rewards))
    assert distance(found, best) <= 1e-4


def test_proposition_3_1_a_majority_of_51_percent_takes_everything() -> None:
    """The section's example: 51 % prefer y_1, and the other 49 % are never heard again."""
    rewards = torch.tensor([0.51, 0.49], dtype=torch.float64).log()
    unregularized = optimum_of(parse_regularizer({"name": "none"}), rewards, rewards)
    matched = optimum_of(parse_regularizer({"name": "pm"}), rewards, rewards)
    assert unregularized.exp().tolist() == [1.0, 0.0]
    assert matched.exp().tolist() == pytest.approx([0.51, 0.49], abs=1e-14)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("c1", "c2"), [(0.0, 0.0), (-1.7, 0.0), (0.0, 0.3), (2.0, -0.4)])
def test_theorem_1_sufficiency(seed: int, c1: float, c2: float) -> None:
    """R = −log π + C_1 + C_2/π yields the PM policy, for any constants."""
    rewards, ref_logp = problem(seed)
    regularizer = parse_regularizer({"name": "pm", "c2": c2})
    value = value_of(regularizer, ref_logp)
    found = maximizer(expected(rewards, lambda logp: value(logp) + c1), len(rewards))
    assert distance(found, rewards.softmax(0)) <= 1e-6
    assert distance(optimum_of(regularizer, rewards, ref_logp).exp(), rewards.softmax(0)) <= 1e-14


def residual_of_the_pm_equation(regularizer: Regularizer, log_ref: float) -> Tensor:
    """πR'' + 2R' + 1/π, the PM differential equation, at several π; zero for PM regularizers."""
    pi = torch.linspace(0.05, 0.9, 12, dtype=torch.float64, requires_grad=True)
    value = value_of(regularizer, torch.full_like(pi, log_ref))(pi.log())
    (first,) = torch.autograd.grad(value.sum(), pi, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), pi, create_graph=True)
    return (pi * second + 2.0 * first + 1.0 / pi).detach()


@pytest.mark.parametrize(
    ("config", "solves"),
    [
        ({"name": "pm"}, True),
        ({"name": "pm", "c2": 0.7}, True),
        ({"name": "maximum_entropy", "tau": 1.0}, True),
        ({"name": "generalized_pl", "g": "exponential"}, True),
        ({"name": "pm", "beta": 0.9}, False),
        ({"name": "maximum_entropy", "tau": 1.1}, False),
        ({"name": "f_divergence", "divergence": "forward_kl"}, False),
        ({"name": "f_divergence", "divergence": "chi_squared"}, False),
        ({"name": "f_divergence", "divergence": "js_divergence"}, False),
        ({"name": "generalized_pl", "g": "softplus"}, False),
    ],
    ids=lambda entry: "-".join(map(str, entry.values())) if isinstance(entry, dict) else "",
)
def test_theorem_1_necessity(config: dict[str, object], solves: bool) -> None:
    """The solutions of πR'' + 2R' + 1/π = 0 match preferences; the others do not."""
    regularizer = parse_regularizer(config)
    largest = residual_of_the_pm_equation(regularizer, log_ref=-1.0).abs().max().item()
    rewards, ref_logp = problem(seed=0)
    ref_logp = torch.full_like(ref_logp, -torch.tensor(5.0).log().item())
    error = distance(optimum_of(regularizer, rewards, ref_logp).exp(), rewards.softmax(0))
    if solves:
        assert largest <= 1e-10
        assert error <= 1e-12
    else:
        assert largest > 0.01
        assert error > 0.005


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("added", [lambda logp: logp.exp(), lambda logp: 0.3 * logp**2])
def test_theorem_1_necessity_of_other_terms(seed: int, added: Callable[[Tensor], Tensor]) -> None:
    """−log π plus anything but C_1 + C_2/π ends elsewhere."""
    rewards, ref_logp = problem(seed)
    own = value_of(parse_regularizer({"name": "pm"}), ref_logp)
    found = maximizer(expected(rewards, lambda logp: own(logp) - added(logp)), len(rewards))
    assert distance(found, rewards.softmax(0)) > 0.01


@pytest.mark.parametrize("seed", SEEDS)
def test_example_3_pm_is_the_kl_penalty_to_the_uniform_distribution(seed: int) -> None:
    """C_1 = log(1/k): the same value but for the constant, the same optimum."""
    rewards, _ = problem(seed)
    k = len(rewards)
    uniform = torch.zeros_like(rewards).log_softmax(0)
    logp = torch.randn(k, generator=torch.Generator().manual_seed(seed)).double().log_softmax(0)
    pm, kl = (parse_regularizer({"name": name}) for name in ("pm", "kl"))
    c1 = torch.tensor(1 / k, dtype=torch.float64).log()
    torch.testing.assert_close(value_of(kl, uniform)(logp), value_of(pm, uniform)(logp) + c1)
    torch.testing.assert_close(
        optimum_of(kl, rewards, uniform), optimum_of(pm, rewards, uniform), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_theorem_2_the_constant_of_1_over_pi_may_depend_on_the_response(seed: int) -> None:
    """R_{x,y} = −log π + C_{1,x} + C_{2,x,y}/π yields the PM policy."""
    rewards, ref_logp = problem(seed)
    c2 = torch.randn(len(rewards), dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    pm = parse_regularizer({"name": "pm", "c2": 0.7})
    own = value_of(pm, ref_logp)
    with_c2 = expected(rewards, lambda logp: own(logp) + 1.3 + c2 * torch.exp(-logp))
    found = maximizer(with_c2, len(rewards))
    assert distance(found, rewards.softmax(0)) <= 1e-6
    assert distance(found, optimum_of(pm, rewards, ref_logp).exp()) <= 1e-6
    # c2 is in the value: R grows by C_2/π
    plain = value_of(parse_regularizer({"name": "pm"}), ref_logp)
    logp = rewards.log_softmax(0)
    torch.testing.assert_close(own(logp) - plain(logp), 0.7 * torch.exp(-logp))


@pytest.mark.parametrize("seed", SEEDS)
def test_theorem_2_a_constant_of_1_that_depends_on_the_response_does_not(seed: int) -> None:
    """C_1(y) biases the policy; KL RLHF has C_1(y) = log π_ref(y|x), which is Proposition 3.7."""
    rewards, ref_logp = problem(seed)
    kl = parse_regularizer({"name": "kl"})
    found = maximizer(expected(rewards, value_of(kl, ref_logp)), len(rewards))
    assert distance(found, rewards.softmax(0)) > 0.05
    assert distance(found, optimum_of(kl, rewards, ref_logp).exp()) <= 1e-5


@pytest.mark.parametrize("seed", SEEDS)
def test_theorem_3_has_a_shifted_optimum(seed: int) -> None:
    """Eq. (3.14) leads to π = g(r + λ), not to g(r)/Σg unless g is exponential."""
    rewards, ref_logp = problem(seed)
    links: dict[str, Callable[[Tensor], Tensor]] = {
        "exponential": torch.exp,
        "softplus": torch.nn.functional.softplus,
        "sigmoid": torch.sigmoid,
    }
    for name, g in links.items():
        regularizer = parse_regularizer({"name": "generalized_pl", "g": name})
        found = maximizer(expected(rewards, value_of(regularizer, ref_logp)), len(rewards))
        optimum = optimum_of(regularizer, rewards, ref_logp)
        assert distance(found, optimum.exp()) <= 1e-5
        shift = regularizer.link.inverse(optimum) - rewards
        assert (shift - shift[0]).abs().max().item() <= 1e-9
        unshifted = g(rewards) / g(rewards).sum()
        error = distance(optimum.exp(), unshifted)
        assert error <= 1e-12 if name == "exponential" else error > 0.02


@pytest.mark.parametrize("seed", SEEDS)
def test_theorem_3_with_log_g_as_the_reward_matches_the_generalized_preference(seed: int) -> None:
    """r := log g(r) with −log π leads to g(r)/Σg, and the same r with (3.14) does not."""
    rewards, ref_logp = problem(seed)
    for name, g in (("softplus", torch.nn.functional.softplus), ("sigmoid", torch.sigmoid)):
        preference = g(rewards) / g(rewards).sum()
        luce = parse_regularizer({"name": "generalized_pl", "g": name, "target": "luce"})
        assert distance(optimum_of(luce, rewards, ref_logp).exp(), preference) <= 1e-12
        effective = luce.effective_reward(rewards)
        found = maximizer(expected(effective, value_of(luce, ref_logp)), len(rewards))
        assert distance(found, preference) <= 1e-5
        printed = parse_regularizer({"name": "generalized_pl", "g": name})
        wrong = maximizer(expected(effective, value_of(printed, ref_logp)), len(rewards))
        assert distance(wrong, preference) > 0.005


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("epsilon", [None, 0.2, 1e-6])
def test_theorem_4_preferences_are_matched_inside_the_regular_set(
    seed: int, epsilon: float | None
) -> None:
    """On M(x) the optimum of eq. (4.1) is proportional to e^r, whatever ε is outside it."""
    rewards, ref_logp = problem(seed, size=8)
    log_alpha = ref_logp.median().item()
    config = {"name": "conditional_pm", "level": "sequence", "log_alpha": log_alpha}
    regularizer = parse_regularizer(config | ({"epsilon": epsilon} if epsilon else {}))
    inside = ref_logp >= log_alpha
    assert 0 < inside.sum() < len(inside)
    target = rewards[inside].softmax(0)
    exact = optimum_of(regularizer, rewards, ref_logp).exp()
    found = maximizer(expected(rewards, value_of(regularizer, ref_logp)), len(rewards))
    for pi in (exact, found):
        assert distance(pi[inside] / pi[inside].sum(), target) <= 1e-5
    kl = optimum_of(parse_regularizer({"name": "kl"}), rewards, ref_logp).exp()
    assert distance(kl[inside] / kl[inside].sum(), target) > 0.01


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_theorem_4_for_another_set_and_any_constants(beta: float) -> None:
    """M(x) by the geometric mean of a token's probability; C_1 and C_2/π in the objective."""
    # Geometric means 0.3, 0.9, 0.5, 0.4, 0.7, 0.2; probabilities 0.3, 0.9, 0.25, 0.16, 0.34, 0.01.
    mean = torch.tensor([0.3, 0.9, 0.5, 0.4, 0.7, 0.2], dtype=torch.float64).log()
    mask = torch.arange(3) < torch.tensor([1, 1, 2, 2, 3, 3])[:, None]
    ref_logp = mean[:, None].expand(6, 3)
    rewards = torch.tensor([0.4, -0.3, 1.1, 0.0, -0.8, 0.6], dtype=torch.float64)
    regularizer = parse_regularizer(
        {"name": "conditional_pm", "level": "sequence", "alpha_per_token": 0.45, "beta": beta}
    )
    inside = torch.tensor([False, True, True, False, True, False])  # no threshold on π_ref is that

    def objective(logp: Tensor) -> Tensor:
        tokens = torch.zeros_like(ref_logp)
        tokens = tokens.index_put((torch.arange(6), torch.zeros(6, dtype=torch.long)), logp)
        value = regularizer.value(tokens, ref_logp, mask) + 1.7 + 0.2 * torch.exp(-logp)
        return (logp.exp() * (rewards + value)).sum()

    found = maximizer(objective, 6)
    exact = optimum(
        regularizer, ResponseSet(torch.arange(18).view(6, 3), ref_logp, mask, rewards)
    ).exp()
    target = (rewards[inside] / beta).softmax(0)
    for pi in (exact, found):
        assert distance(pi[inside] / pi[inside].sum(), target) <= 1e-5


def test_theorem_4_as_epsilon_vanishes_only_the_regular_set_is_left() -> None:
    rewards, ref_logp = problem(seed=0, size=8)
    log_alpha = ref_logp.median().item()
    inside = ref_logp >= log_alpha
    outside = []
    for log_epsilon in (-1.0, -5.0, -20.0):
        regularizer = parse_regularizer(
            {
                "name": "conditional_pm",
                "level": "sequence",
                "log_alpha": log_alpha,
                "log_epsilon": log_epsilon,
            }
        )
        outside.append(optimum_of(regularizer, rewards, ref_logp).exp()[~inside].sum().item())
    assert outside[0] > outside[1] > outside[2]
    assert outside[2] < 1e-7


@pytest.mark.parametrize("seed", SEEDS)
def test_proposition_3_7_kl_does_not_match_preferences(seed: int) -> None:
    rewards, ref_logp = problem(seed)
    for beta in (0.5, 1.0, 2.0):
        kl = parse_regularizer({"name": "kl", "beta": beta})
        optimum = optimum_of(kl, rewards, ref_logp).exp()
        assert distance(optimum, (rewards / beta).softmax(0)) > 0.01
    residual = residual_of_the_pm_equation(parse_regularizer({"name": "kl"}), log_ref=-1.0)
    # R_{x,y} solves the equation for one y; what Theorem 2 forbids is that its C_1 depends on y.
    assert residual.abs().max().item() <= 1e-10
    uniform = torch.full_like(rewards, -torch.tensor(5.0).log().item())
    optimum = optimum_of(parse_regularizer({"name": "kl"}), rewards, uniform).exp()
    assert distance(optimum, rewards.softmax(0)) <= 1e-14


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beta", [0.4, 1.0, 2.5])
def test_proposition_5_1_optimum_of_kl(seed: int, beta: float) -> None:
    """π_rlhf ∝ π_ref·e^{r/β}, eq. (5.1)."""
    rewards, ref_logp = problem(seed)
    kl = parse_regularizer({"name": "kl", "beta": beta})
    weights = ref_logp.exp() * torch.exp(rewards / beta)
    optimum = optimum_of(kl, rewards, ref_logp).exp()
    assert distance(optimum, weights / weights.sum()) <= 1e-14
    found = maximizer(expected(rewards, value_of(kl, ref_logp)), len(rewards))
    assert distance(found, optimum) <= 1e-6


def test_preference_collapse() -> None:
    """Section 5.2: what the reference never says, KL RLHF never says, however much preferred."""
    rewards = torch.tensor([5.0, 0.0], dtype=torch.float64)
    ref_logp = torch.tensor([0.0, 1.0], dtype=torch.float64).log()
    kl = optimum_of(parse_regularizer({"name": "kl"}), rewards, ref_logp).exp()
    pm = optimum_of(parse_regularizer({"name": "pm"}), rewards, ref_logp).exp()
    assert kl.tolist() == [0.0, 1.0]
    assert pm[0].item() == pytest.approx(0.9933071490757153, abs=1e-12)
