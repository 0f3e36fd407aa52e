"""Link functions g of the generalized Bradley–Terry and Plackett–Luce models (section 3.4).

With s = log g(r) in the place of the reward these models are the plain ones, because
g(r_i)/Σ_j g(r_j) = e^{s_i}/Σ_j e^{s_j}. So log g is all that likelihoods need of a link.
"""

from collections.abc import Callable
from typing import Literal

from training.deferred import Tensor, torch

LinkName = Literal["exponential", "softplus", "sigmoid"]
"""The links of reward models: positive and increasing for every r, negative ones included."""


def log_softplus(reward: Tensor) -> Tensor:
    """log g(r) of g(r) = log(1 + e^r), in full precision: r + log(1 − e^r/2 + …) for small e^r."""
    low = reward < -30.0  # g(r) = e^r up to one part in 10^13
    safe = torch.where(low, torch.zeros_like(reward), reward)
    g = torch.logaddexp(safe, torch.zeros_like(safe))  # torch's softplus drops e^{−r} beyond 20
    return torch.where(low, reward, torch.log(g))


def log_sigmoid(reward: Tensor) -> Tensor:
    """log g(r) of g(r) = 1/(1 + e^{−r})."""
    return -torch.logaddexp(-reward, torch.zeros_like(reward))


LOG_LINKS: dict[LinkName, Callable[[Tensor], Tensor]] = {
    "exponential": lambda reward: reward,
    "softplus": log_softplus,
    "sigmoid": log_sigmoid,
}
"""log g(r) of each link, any shape."""
