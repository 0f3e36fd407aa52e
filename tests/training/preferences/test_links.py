"""log g against literal values, and its derivative g'/g, over the whole range of float32."""

import math

import pytest
import torch

from training.preferences.links import LOG_LINKS, LinkName


@pytest.mark.parametrize(
    ("link", "reward", "expected"),
    [
        ("exponential", -2.5, -2.5),
        ("softplus", 0.0, -0.36651292058166435),  # log log 2
        ("softplus", 1.0, 0.2725138805025834),  # log log(1 + e)
        ("softplus", 40.0, 3.6888794541139363),  # log 40
        ("softplus", -50.0, -50.0),
        ("sigmoid", 0.0, -0.6931471805599453),
        ("sigmoid", -50.0, -50.0),
        ("sigmoid", 30.0, -9.357622968840175e-14),
    ],
)
def test_literal(link: LinkName, reward: float, expected: float) -> None:
    found = LOG_LINKS[link](torch.tensor(reward, dtype=torch.float64)).item()
    assert found == pytest.approx(expected, rel=1e-12)
    single = LOG_LINKS[link](torch.tensor(reward)).item()
    assert single == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("link", ["softplus", "sigmoid"])
def test_the_gradient_is_finite_and_that_of_log_g(link: LinkName) -> None:
    rewards = torch.tensor([-200.0, -40.0, -29.9, -1.0, 0.0, 2.0, 50.0], dtype=torch.float64)
    rewards.requires_grad_()
    LOG_LINKS[link](rewards).sum().backward()
    for reward, slope in zip(rewards.tolist(), rewards.grad.tolist(), strict=True):
        rising = 1 / (1 + math.exp(-reward))  # the derivative of softplus
        expected = rising / math.log1p(math.exp(reward)) if link == "softplus" else 1 - rising
        if link == "sigmoid" and reward > 30:
            expected = math.exp(-reward)
        assert slope == pytest.approx(expected, rel=1e-9)
