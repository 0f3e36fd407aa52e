"""Example 1: PM RLHF is the policy that does best against the worst change of its rewards.

    max_π min_{r'} E_π r'   subject to   log Σ_y e^{r(y) − r'(y)} ≤ ε

The derivation in the paper loses a sign on its way (E_π r' is E_π r − E_π Δr, not + E_π Δr), which
its last line has again.
"""

import pytest
import torch
from lbfgs import lowest
from torch import Tensor

from step3_rlhf.regularizers.base import ResponseSet
from step3_rlhf.regularizers.optimum import optimum
from step3_rlhf.regularizers.registry import parse_regularizer

SEEDS = range(3)


def problem(seed: int, size: int = 5) -> tuple[Tensor, Tensor]:
    """Random rewards [K] and a random policy [K], float64."""
    random = torch.Generator().manual_seed(seed)
    rewards, logits = torch.randn(2, size, generator=random, dtype=torch.float64)
    return rewards, (2 * logits).softmax(0)


def entropy(policy: Tensor) -> Tensor:
    return -torch.xlogy(policy, policy).sum()


def robust_value(policy: Tensor, rewards: Tensor, epsilon: float) -> Tensor:
    """min_{r'} E_π r' under the constraint, found by descent over r − r' = ε + log softmax(z)."""

    def under_attack(z: Tensor) -> Tensor:
        return policy @ (rewards - epsilon - z.log_softmax(0))

    return under_attack(lowest(under_attack, len(rewards), tolerance=1e-13))


@pytest.mark.parametrize("seed", SEEDS)
def test_example_1_the_inner_minimum_is_the_objective_of_pm(seed: int) -> None:
    """min_{r'} E_π r' + log-sum-exp(r − r') = E_π r + H(π), eq. (3.10), for every policy."""
    rewards, policy = problem(seed)

    def penalized(other: Tensor) -> Tensor:
        return policy @ other + (rewards - other).logsumexp(0)

    worst = lowest(penalized, len(rewards), tolerance=1e-13)
    expected = policy @ rewards + entropy(policy)
    assert penalized(worst).item() == pytest.approx(expected.item(), abs=1e-10)
    # There Δr is log π, up to a constant: the conjugate of log-sum-exp is attained.
    change = rewards - worst
    torch.testing.assert_close(change.log_softmax(0), policy.log(), rtol=0, atol=1e-5)
    # With the printed sign, + E_π Δr, there is no minimum: Δr may fall without end.
    printed = [policy @ falling + falling.logsumexp(0) for falling in (change - 100, change - 200)]
    assert printed[1].item() == pytest.approx(printed[0].item() - 200)


@pytest.mark.parametrize("epsilon", [-1.0, 0.0, 2.5])
@pytest.mark.parametrize("seed", SEEDS)
def test_example_1_pm_is_the_robust_policy_whatever_epsilon(seed: int, epsilon: float) -> None:
    """The multiplier of the constraint is 1 for every ε, which only shifts the value."""
    rewards, policy = problem(seed)
    tokens, mask = torch.arange(5)[:, None], torch.ones(5, 1, dtype=torch.bool)
    ref_logp = policy.log()[:, None]
    responses = ResponseSet(tokens, ref_logp, mask, rewards)
    matched = optimum(parse_regularizer({"name": "pm"}), responses).exp()
    best = robust_value(matched, rewards, epsilon).item()
    assert best == pytest.approx(rewards.logsumexp(0).item() - epsilon, abs=1e-9)
    # Any other policy is worse, by KL(π ‖ softmax r); KL's optimum and another temperature are.
    others = [
        optimum(parse_regularizer({"name": "kl"}), responses).exp(),
        optimum(parse_regularizer({"name": "maximum_entropy", "tau": 2.0}), responses).exp(),
        policy,
    ]
    for other in others:
        divergence = (other * (other.log() - matched.log())).sum().item()
        assert divergence > 0.01
        value = robust_value(other, rewards, epsilon).item()
        assert value == pytest.approx(best - divergence, abs=1e-9)


def test_example_1_the_worst_rewards_leave_no_response_to_prefer() -> None:
    """A saddle point: against the matching policy, r' is the same for every response."""
    rewards, _ = problem(0)
    matched = rewards.softmax(0)
    z = lowest(lambda z: matched @ (rewards - z.log_softmax(0)), len(rewards), tolerance=1e-13)
    worst = rewards - z.log_softmax(0)
    expected = rewards.logsumexp(0).expand(5)
    torch.testing.assert_close(worst, expected, rtol=0, atol=1e-5)
