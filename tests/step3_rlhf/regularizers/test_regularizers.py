"""Every regularizer: literal values, policy gradient, masks, bounds, and form in a config."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from lbfgs import lowest
from pydantic import ValidationError
from torch import Tensor

from step3_rlhf import ppo
from step3_rlhf.regularizers.base import Marginal, Regularizer, ResponseSet
from step3_rlhf.regularizers.divergences import DIVERGENCES, divergence
from step3_rlhf.regularizers.log_linear import LogLinear
from step3_rlhf.regularizers.optimum import optimum
from step3_rlhf.regularizers.registry import (
    REGULARIZERS,
    RegularizerField,
    dump_regularizer,
    parse_regularizer,
)
from training.config import StrictModel

LOG_LINEAR: list[dict[str, Any]] = [
    {"name": "kl", "beta": 0.7},
    {"name": "pm", "beta": 1.3},
    {"name": "maximum_entropy", "tau": 0.4},
    {"name": "conditional_pm", "alpha": 0.3},
    {"name": "conditional_pm", "level": "sequence", "alpha": 0.05},
    {"name": "conditional_pm", "level": "sequence", "log_alpha": -2.5, "beta": 2.0},
    {"name": "conditional_pm", "level": "sequence", "alpha_per_token": 0.3},
    {"name": "conditional_pm", "level": "sequence", "alpha": 0.05, "epsilon": 0.01},
    {"name": "kl_interpolation", "kappa": 0.4},
]

CLASSES = "step3_rlhf.regularizers.log_linear"


def f_divergence(name: str, **parameters: Any) -> dict[str, Any]:
    coefficient = {"alpha": 0.3} if name == "alpha_divergence" else {}
    return {"name": "f_divergence", "divergence": name, **coefficient, **parameters}


F_DIVERGENCES = [f_divergence(name, beta=0.8, max_marginal=1e6) for name in DIVERGENCES]
GENERALIZED = [
    {"name": "generalized_pl", "g": "exponential", "beta": 0.6},
    {"name": "generalized_pl", "g": "softplus", "beta": 0.6},
    {"name": "generalized_pl", "g": "power", "exponent": 2.5},
    {"name": "generalized_pl", "g": "sigmoid", "beta": 1.5},
]
LUCE = [
    {"name": "generalized_pl", "g": "softplus", "beta": 0.6, "target": "luce"},
    {"name": "generalized_pl", "g": "sigmoid", "beta": 1.5, "target": "luce"},
]
EXACT = [{"name": "none"}, *LOG_LINEAR, *F_DIVERGENCES, *GENERALIZED, *LUCE]
TOKEN_LEVEL = [f_divergence(name, level="token") for name in DIVERGENCES]


def spelled(config: dict[str, Any]) -> str:
    return "-".join(str(value) for value in config.values())


def every(configs: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("config", configs, ids=spelled)


class Tree:
    """All responses over {0: end, 1, 2} of at most three tokens, as one softmax per prefix."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        prefixes = [prefix for length in range(3) for prefix in product((1, 2), repeat=length)]
        self.index = {prefix: row for row, prefix in enumerate(prefixes)}
        self.responses = [(*prefix, 0) for prefix in prefixes]
        self.responses += [
            (*prefix, last) for prefix in product((1, 2), repeat=2) for last in (1, 2)
        ]
        self.mask = torch.tensor([[t < len(y) for t in range(4)] for y in self.responses])
        self.tokens = torch.tensor([[*y, 9, 9, 9][:4] for y in self.responses])

    def logits(self, scale: float) -> Tensor:
        noise = torch.randn(len(self.index), 3, generator=self.random, dtype=torch.float64)
        return scale * noise

    def rewards(self) -> Tensor:
        return torch.randn(len(self.responses), generator=self.random, dtype=torch.float64)

    def logp(self, logits: Tensor) -> Tensor:
        """[K, 4] log-probabilities of each response's tokens; NaN where there is none."""
        table = logits.log_softmax(-1)
        rows = []
        for response in self.responses:
            steps = [table[self.index[response[:t]], token] for t, token in enumerate(response)]
            rows.append(torch.stack(steps + [torch.full((), math.nan).double()] * (4 - len(steps))))
        return torch.stack(rows)


def exact_gradient(
    regularizer: Regularizer, tree: Tree, logits: Tensor, ref_logp: Tensor, rewards: Tensor
) -> Tensor:
    """Autograd of Σ_y π(y)·(r(y) + R(π(y)))."""
    logits = logits.clone().requires_grad_()
    logp = tree.logp(logits)
    pi = torch.where(tree.mask, logp, 0.0).sum(-1).exp()
    objective = (pi * (rewards + regularizer.value(logp, ref_logp, tree.mask))).sum()
    return torch.autograd.grad(objective, logits)[0]


def score_function_gradient(
    per_token: Tensor, tree: Tree, logits: Tensor, rewards: Tensor
) -> Tensor:
    """PPO's own gradient of a first step without a critic, the mean over all responses under π."""
    logits = logits.clone().requires_grad_()
    logp = torch.where(tree.mask, tree.logp(logits), 0.0)
    old = logp.detach()
    token_rewards = ppo.place_rewards(per_token, rewards, tree.mask)
    advantages, _ = ppo.advantages_and_returns(
        token_rewards, torch.zeros_like(old), tree.mask, gamma=1.0, lam=1.0
    )
    loss = torch.zeros((), dtype=torch.float64)
    for y, probability in enumerate(old.sum(-1).exp()):
        row = slice(y, y + 1)
        own, _ = ppo.policy_loss(logp[row], old[row], advantages[row], tree.mask[row], 0.2)
        loss = loss + probability * own
    return torch.autograd.grad(-loss, logits)[0]


def leave_one_out_gradient(
    per_token: Tensor, tree: Tree, logits: Tensor, rewards: Tensor, deviation: bool = False
) -> Tensor:
    """RLOO's gradient of a first step with two responses, the mean over all pairs under π.

    Args:
        deviation: the wrong variant, which divides by the standard deviation, as GRPO does.
    """
    logits = logits.clone().requires_grad_()
    logp = torch.where(tree.mask, tree.logp(logits), 0.0)
    old = logp.detach()
    pairs = torch.cartesian_prod(torch.arange(len(old)), torch.arange(len(old)))
    rows = pairs.flatten()
    token_rewards = ppo.place_rewards(per_token, rewards, tree.mask)
    advantages, _ = ppo.leave_one_out(token_rewards[rows], tree.mask[rows], each=2)
    if deviation:
        size = advantages.abs().amax(-1, keepdim=True)
        advantages = advantages / size.clamp(min=1e-8)  # √2 · the deviation of two credits
    chances = old.sum(-1).exp()[pairs].prod(-1).repeat_interleave(2) / 2
    loss = -(chances[:, None] * advantages * logp[rows] * tree.mask[rows]).sum()
    return torch.autograd.grad(-loss, logits)[0]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def gradients(config: dict[str, Any], naive: bool, seed: int = 1) -> float:
    """Relative error of the score-function gradient; `naive` puts R where R + πR' belongs."""
    regularizer = parse_regularizer(config)
    tree = Tree(seed)
    logits, rewards = tree.logits(1.0), regularizer.effective_reward(tree.rewards())
    ref_logp = tree.logp(tree.logits(0.7))
    logp = tree.logp(logits).detach()
    marginal = regularizer.marginal(logp, ref_logp, tree.mask)
    assert not marginal.bound.any()
    per_token = marginal.per_token
    if naive:
        per_token = torch.zeros_like(per_token)
        per_token[:, 0] = regularizer.value(logp, ref_logp, tree.mask)
        # On the first token the whole of R counts for it alone: move it to the last one.
        per_token = torch.where(
            tree.mask & (tree.mask.cumsum(-1) == tree.mask.sum(-1)[:, None]), per_token[:, :1], 0.0
        )
    expected = exact_gradient(regularizer, tree, logits, ref_logp, rewards)
    return relative_error(score_function_gradient(per_token, tree, logits, rewards), expected)


@every(EXACT)
def test_score_function_gradient_is_that_of_the_exact_objective(config: dict[str, Any]) -> None:
    assert gradients(config, naive=False) <= 1e-10


@every(EXACT)
def test_the_gradient_of_rloo_is_that_of_the_exact_objective(config: dict[str, Any]) -> None:
    regularizer, tree = parse_regularizer(config), Tree(1)
    logits, rewards = tree.logits(1.0), tree.rewards()
    ref_logp, logp = tree.logp(tree.logits(0.7)), tree.logp(logits).detach()
    per_token = regularizer.marginal(logp, ref_logp, tree.mask).per_token
    expected = exact_gradient(regularizer, tree, logits, ref_logp, rewards)
    found = leave_one_out_gradient(per_token, tree, logits, rewards)
    assert relative_error(found, expected) <= 1e-10
    divided = leave_one_out_gradient(per_token, tree, logits, rewards, deviation=True)
    cosine = (divided * expected).sum() / (divided.norm() * expected.norm())
    assert 1 - cosine > 1e-3  # it does not even point the same way


@every([c for c in F_DIVERGENCES + GENERALIZED[1:] if c.get("divergence") != "reverse_kl"])
def test_naive_gradient_is_wrong(config: dict[str, Any]) -> None:
    assert gradients(config, naive=True) > 0.02


@every([*LOG_LINEAR, F_DIVERGENCES[0], GENERALIZED[0], *LUCE])
def test_naive_gradient_is_right_only_for_log_pi(config: dict[str, Any]) -> None:
    assert gradients(config, naive=True) <= 1e-10


ON_TREES: list[dict[str, Any]] = [
    {"name": "kl", "beta": 0.7},
    {"name": "pm", "beta": 1.3},
    {"name": "conditional_pm", "alpha": 0.3},
    {"name": "conditional_pm", "level": "sequence", "alpha": 0.05},
    {"name": "conditional_pm", "level": "sequence", "alpha_per_token": 0.3},
    {"name": "conditional_pm", "level": "sequence", "alpha": 0.05, "epsilon": 0.01},
    f_divergence("js_divergence", beta=2.0),
    f_divergence("forward_kl", max_marginal=1e6),
    f_divergence("reverse_kl", level="token"),
    {"name": "generalized_pl", "g": "softplus"},
    LUCE[0],
]


@every(ON_TREES)
@pytest.mark.parametrize("seed", range(3))
def test_gradient_ascent_over_responses_of_several_tokens_ends_at_the_optimum(
    config: dict[str, Any], seed: int
) -> None:
    regularizer, tree = parse_regularizer(config), Tree(seed)
    rewards, ref_logp = tree.rewards(), tree.logp(tree.logits(0.7))
    effective = regularizer.effective_reward(rewards)

    def sequence_logp(logits: Tensor) -> Tensor:
        return torch.where(tree.mask, tree.logp(logits), 0.0).sum(-1)

    def loss(logits: Tensor) -> Tensor:
        value = effective + regularizer.value(tree.logp(logits), ref_logp, tree.mask)
        return -(sequence_logp(logits).exp() * value).sum()

    found = sequence_logp(lowest(loss, len(tree.index), 3, iterations=800)).exp()
    exact = optimum(regularizer, ResponseSet(tree.tokens, ref_logp, tree.mask, rewards)).exp()
    assert (found - exact).abs().sum().item() / 2 <= 1e-4
    uniform = torch.full_like(exact, 1 / len(exact))
    assert (found - uniform).abs().sum().item() / 2 > 0.05  # it went somewhere


@every(TOKEN_LEVEL)
def test_token_level_divergence_is_exact_for_one_token(config: dict[str, Any]) -> None:
    """Where responses have one token, both levels are the same."""
    sequence = parse_regularizer({**config, "level": "sequence"})
    token = parse_regularizer(config)
    logp, ref_logp = torch.tensor([[-1.0], [-0.3]]), torch.tensor([[-0.4], [-1.1]])
    mask = torch.ones(2, 1, dtype=torch.bool)
    assert torch.equal(token.value(logp, ref_logp, mask), sequence.value(logp, ref_logp, mask))
    expected = sequence.marginal(logp, ref_logp, mask).per_token
    assert torch.equal(token.marginal(logp, ref_logp, mask).per_token, expected)


@every(TOKEN_LEVEL)
def test_token_level_divergence_is_an_approximation(config: dict[str, Any]) -> None:
    """On longer responses its gradient is exact for reverse KL alone."""
    error = gradients({**config, "max_marginal": 1e6}, naive=False)
    assert error <= 1e-10 if config["divergence"] == "reverse_kl" else error > 0.005


# One response of two tokens: π = 0.5·0.4 = 0.2, π_ref = 0.8·0.05 = 0.04, hence u = 5.
LOGP = torch.tensor([[0.5, 0.4, 0.9]], dtype=torch.float64).log()
REF = torch.tensor([[0.8, 0.05, 0.1]], dtype=torch.float64).log()
MASK = torch.tensor([[True, True, False]])
LOG = math.log


@pytest.mark.parametrize(
    ("config", "value", "per_token"),
    [
        ({"name": "none"}, 0.0, [0.0, 0.0]),
        ({"name": "kl", "beta": 2.0}, -2 * LOG(5), [-2 * LOG(0.625), -2 * LOG(8)]),
        ({"name": "pm"}, LOG(5), [LOG(2), LOG(2.5)]),
        ({"name": "pm", "c2": 0.1}, LOG(5) + 0.5, [LOG(2), LOG(2.5)]),
        ({"name": "maximum_entropy", "tau": 3.0}, 3 * LOG(5), [3 * LOG(2), 3 * LOG(2.5)]),
        ({"name": "conditional_pm", "alpha": 0.1}, -LOG(4), [LOG(2), -LOG(8)]),
        ({"name": "conditional_pm", "alpha": 0.05}, LOG(5), [LOG(2), LOG(2.5)]),
        (
            {"name": "conditional_pm", "alpha": 0.05, "level": "sequence"},
            -LOG(5),
            [LOG(2), LOG(2.5) + LOG(0.04)],
        ),
        (
            {"name": "conditional_pm", "log_alpha": -3.3, "level": "sequence"},
            LOG(5),
            [LOG(2), LOG(2.5)],
        ),
        (
            {"name": "conditional_pm", "alpha_per_token": 0.21, "level": "sequence"},
            -LOG(5),
            [LOG(2), LOG(2.5) + LOG(0.04)],
        ),
        (
            {"name": "conditional_pm", "alpha_per_token": 0.19, "level": "sequence"},
            LOG(5),
            [LOG(2), LOG(2.5)],
        ),
        (
            {"name": "conditional_pm", "alpha": 0.05, "level": "sequence", "epsilon": 1e-3},
            LOG(5) + LOG(1e-3),
            [LOG(2), LOG(2.5) + LOG(1e-3)],
        ),
        (
            {"name": "conditional_pm", "alpha": 0.05, "level": "sequence", "log_epsilon": -9.0},
            LOG(5) - 9.0,
            [LOG(2), LOG(2.5) - 9.0],
        ),
        (
            {"name": "kl_interpolation", "kappa": 0.5},
            LOG(5) + 0.5 * LOG(0.04),
            [LOG(2) + 0.5 * LOG(0.8), LOG(2.5) + 0.5 * LOG(0.05)],
        ),
        (f_divergence("reverse_kl"), -LOG(5), [0.0, -LOG(5)]),
        (f_divergence("forward_kl", beta=2.0), 2 * LOG(5) / 5, [0.0, -1.6]),
        (
            f_divergence("js_divergence"),
            -(5 * LOG(5) - 6 * LOG(3)) / 5,
            [0.0, -LOG(10 / 6)],
        ),
        (
            {"name": "f_divergence", "divergence": "alpha_divergence", "alpha": 0.5},
            -(math.sqrt(5) - 3) / -0.25 / 5,
            [0.0, -2 * (1 - 5**-0.5)],
        ),
        (f_divergence("chi_squared"), -16 / 5, [0.0, -8.0]),
        (f_divergence("total_variation"), -0.4, [0.0, -0.5]),
        (f_divergence("hellinger"), -((5**0.5 - 1) ** 2) / 5, [0.0, -(1 - 5**-0.5)]),
        (
            f_divergence("chi_squared", level="token"),
            -((0.625 - 1) ** 2 / 0.625 + 49 / 8),
            [0.75, -14.0],
        ),
        ({"name": "generalized_pl", "g": "exponential"}, LOG(5) + 1, [0.0, LOG(5)]),
        # G(g⁻¹(π)) = −Li₂(1 − e^π): Li₂(−0.22140275816) = −0.21022213339375
        (
            {"name": "generalized_pl", "g": "softplus"},
            0.21022213339375 / 0.2 - LOG(math.exp(0.2) - 1),
            [0.0, -LOG(math.exp(0.2) - 1)],
        ),
        (
            {"name": "generalized_pl", "g": "power", "exponent": 2.0},
            -(0.2**0.5) * 2 / 3,
            [0.0, -(0.2**0.5)],
        ),
        ({"name": "generalized_pl", "g": "sigmoid"}, LOG(4) - LOG(0.8) / 0.2, [0.0, LOG(4)]),
        (
            {"name": "generalized_pl", "g": "sigmoid", "target": "luce", "beta": 2.0},
            2 * LOG(5),
            [2 * LOG(2), 2 * LOG(2.5)],
        ),
    ],
    ids=lambda entry: spelled(entry) if isinstance(entry, dict) else "",
)
def test_literal_values(config: dict[str, Any], value: float, per_token: list[float]) -> None:
    regularizer = parse_regularizer(config)
    assert regularizer.value(LOGP, REF, MASK).tolist() == pytest.approx([value], abs=1e-12)
    found = regularizer.marginal(LOGP, REF, MASK).per_token
    assert found.tolist()[0] == pytest.approx([*per_token, 0.0], abs=1e-12)


def test_effective_rewards() -> None:
    """Luce takes β log g(r/β) as the reward, −∞ where g is not positive; the others take r."""
    rewards = torch.tensor([2.0, -1.0], dtype=torch.float64)
    for config in [*EXACT, *TOKEN_LEVEL]:
        kept = parse_regularizer(config).effective_reward(rewards)
        assert torch.equal(kept, rewards) == ("target" not in config)

    def luce(g: str, **parameters: Any) -> list[float]:
        config = {"name": "generalized_pl", "g": g, "target": "luce", "beta": 2.0, **parameters}
        return parse_regularizer(config).effective_reward(rewards).tolist()

    e = math.exp
    assert luce("exponential") == pytest.approx([2.0, -1.0], rel=1e-12)
    assert luce("softplus") == pytest.approx(
        [2 * LOG(LOG(1 + e(1.0))), 2 * LOG(LOG(1 + e(-0.5)))], rel=1e-12
    )
    assert luce("sigmoid") == pytest.approx(
        [-2 * LOG(1 + e(-1.0)), -2 * LOG(1 + e(0.5))], rel=1e-12
    )
    assert luce("power", exponent=3.0) == [0.0, -math.inf]


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("coefficient", [0.01, 0.3, 0.5, 0.9])
def test_generators_are_convex_functions_and_their_slopes_derivatives(
    name: str, coefficient: float
) -> None:
    generator = divergence(name, coefficient)
    u = torch.tensor([0.03, 0.4, 0.9, 1.0, 1.2, 4.0, 50.0], dtype=torch.float64)
    u.requires_grad_()
    f = u * generator.per_sample(u.log())
    (slope,) = torch.autograd.grad(f.sum(), u)
    shift = {"reverse_kl": 1.0, "forward_kl": -1.0}.get(name, 0.0)  # f'(1)
    assert f[3].item() == pytest.approx(0.0, abs=1e-14)
    torch.testing.assert_close(
        generator.slope(u.detach().log()) + shift, slope, rtol=1e-9, atol=1e-9
    )
    assert (slope.diff() >= -1e-12).all()


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "total_variation"])
@pytest.mark.parametrize("coefficient", [0.0, 0.01, 0.3, 0.9, 1.0])
def test_inverse_slope(name: str, coefficient: float) -> None:
    generator = divergence(name, coefficient)
    log_u = torch.tensor([-3.0, -0.1, 0.0, 0.5, 4.0], dtype=torch.float64)
    top = generator.ceiling if math.isfinite(generator.ceiling) else 0.0
    found = generator.log_ratio(top - generator.slope(log_u))
    torch.testing.assert_close(found, log_u, rtol=1e-9, atol=1e-9)


@every([*EXACT, *TOKEN_LEVEL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_and_what_it_holds_change_nothing(
    config: dict[str, Any], dtype: torch.dtype
) -> None:
    regularizer = parse_regularizer(config)
    logp = torch.tensor([[-0.3, -1.2], [-2.0, -0.1]], dtype=dtype)
    ref_logp = torch.tensor([[-0.9, -0.8], [-1.0, -0.6]], dtype=dtype)
    mask = torch.tensor([[True, True], [True, False]])
    garbage = torch.tensor([[math.nan, math.inf, -math.inf]] * 2, dtype=dtype)
    left, right = garbage[:, :1], garbage
    clean = torch.where(mask, logp, 0.0), torch.where(mask, ref_logp, 0.0), mask
    wide = (
        torch.cat([left, torch.where(mask, logp, math.nan), right], 1),
        torch.cat([left, torch.where(mask, ref_logp, -math.inf), right], 1),
        torch.cat([torch.zeros(2, 1), mask, torch.zeros(2, 3)], 1).bool(),
    )
    expected, found = regularizer.marginal(*clean), regularizer.marginal(*wide)
    assert found.per_token.dtype == dtype
    assert torch.equal(found.per_token[:, 1:3], expected.per_token)
    assert torch.equal(found.bound, expected.bound)
    assert (found.per_token[~wide[2]] == 0.0).all()
    value = regularizer.value(*wide)
    assert value.dtype == dtype
    assert value.shape == (2,)
    torch.testing.assert_close(value, regularizer.value(*clean))


@every([*EXACT, *TOKEN_LEVEL])
def test_gradient_of_the_value_survives_garbage_in_the_padding(config: dict[str, Any]) -> None:
    logp = torch.tensor([[-0.3, -1.2, math.nan]], dtype=torch.float64, requires_grad=True)
    ref_logp = torch.tensor([[-0.9, -0.8, math.inf]], dtype=torch.float64)
    value = parse_regularizer(config).value(logp, ref_logp, MASK)
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value.sum(), logp)
        assert torch.isfinite(gradient[:, :2]).all()
        assert gradient[0, 2] == 0.0


@every([*EXACT, *TOKEN_LEVEL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_ratios_stay_finite(config: dict[str, Any], dtype: torch.dtype) -> None:
    """Sequence log-probabilities of −2000, both ways, and a policy that is certain."""
    regularizer = parse_regularizer(config)
    logp = torch.tensor([[-1000.0, -1000.0], [-1e-9, 0.0], [0.0, 0.0]], dtype=dtype)
    ref_logp = torch.tensor([[-0.1, -0.1], [-1000.0, -1000.0], [0.0, -1.0]], dtype=dtype)
    mask = torch.ones(3, 2, dtype=torch.bool)
    assert torch.isfinite(regularizer.value(logp, ref_logp, mask)).all()
    assert torch.isfinite(regularizer.marginal(logp, ref_logp, mask).per_token).all()


@pytest.mark.parametrize(
    ("config", "ratios", "bound", "marginal"),
    [
        (f_divergence("forward_kl", max_marginal=3.0), [0.5, 0.2], [False, True], [1.0, 3.0]),
        (f_divergence("chi_squared", max_marginal=3.0), [2.0, 4.0], [False, True], [-2.0, -3.0]),
        (f_divergence("hellinger", max_marginal=1.5), [0.25, 0.04], [False, True], [1.0, 1.5]),
        (f_divergence("reverse_kl", max_marginal=0.5), [0.5, 9.0], [False] * 2, [LOG(2), -LOG(9)]),
    ],
    ids=["forward_kl", "chi_squared", "hellinger", "reverse_kl"],
)
def test_bound_is_applied_and_counted(
    config: dict[str, Any], ratios: list[float], bound: list[bool], marginal: list[float]
) -> None:
    logp = torch.tensor(ratios, dtype=torch.float64).log()[:, None] - 4.0
    ref_logp = torch.full_like(logp, -4.0)
    mask = torch.ones(2, 1, dtype=torch.bool)
    found = parse_regularizer(config).marginal(logp, ref_logp, mask)
    assert found.bound.tolist() == bound
    assert found.per_token[:, 0].tolist() == pytest.approx(marginal)


def test_sigmoid_bound_holds_where_the_policy_is_certain() -> None:
    regularizer = parse_regularizer({"name": "generalized_pl", "g": "sigmoid", "max_marginal": 8.0})
    logp = torch.tensor([[-0.7], [0.0]])
    found = regularizer.marginal(logp, logp, torch.ones(2, 1, dtype=torch.bool))
    assert found.bound.tolist() == [False, True]
    assert found.per_token[1, 0].item() == -8.0


def test_a_response_without_tokens_has_no_marginal() -> None:
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    garbage = torch.full((1, 3), math.nan)
    for config in [*EXACT, *TOKEN_LEVEL]:
        found = parse_regularizer(config).marginal(garbage, garbage, nothing)
        assert (found.per_token == 0.0).all()


# --- identities -----------------------------------------------------------------------------------


def equal_everywhere(first: dict[str, Any], second: dict[str, Any], shift: float = 0.0) -> None:
    tree = Tree(seed=5)
    logp, ref_logp = tree.logp(tree.logits(1.0)), tree.logp(tree.logits(2.0))
    one, other = parse_regularizer(first), parse_regularizer(second)
    marginals = [
        regularizer.marginal(logp, ref_logp, tree.mask).per_token.sum(-1)
        for regularizer in (one, other)
    ]
    torch.testing.assert_close(*marginals, rtol=1e-12, atol=1e-12)
    values = [regularizer.value(logp, ref_logp, tree.mask) for regularizer in (one, other)]
    torch.testing.assert_close(values[0], values[1] + shift, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_identity_alpha_to_zero_is_pm(level: str) -> None:
    for alpha in (0.0, 1e-300):
        equal_everywhere({"name": "conditional_pm", "level": level, "alpha": alpha}, {"name": "pm"})


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_identity_alpha_above_one_is_kl(level: str) -> None:
    equal_everywhere({"name": "conditional_pm", "level": level, "alpha": 1.0001}, {"name": "kl"})


def test_identity_kappa() -> None:
    equal_everywhere({"name": "kl_interpolation", "kappa": 0.0}, {"name": "pm"})
    equal_everywhere({"name": "kl_interpolation", "kappa": 1.0}, {"name": "kl"})


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_identity_reverse_kl_is_kl(level: str) -> None:
    equal_everywhere(f_divergence("reverse_kl", level=level, beta=0.3), {"name": "kl", "beta": 0.3})


def test_identity_alpha_divergence_limits() -> None:
    """Reverse KL at 0, forward KL at 1; generators that differ by ±(u − 1) mean one divergence."""
    log_u = torch.tensor([-2.0, -0.3, 0.0, 0.8, 3.0], dtype=torch.float64)
    slack = 1.0 - torch.exp(-log_u)
    for exact, limit, near in ((0.0, "reverse_kl", 1e-9), (1.0, "forward_kl", 1.0 - 1e-9)):
        target = divergence(limit)
        assert type(divergence("alpha_divergence", exact)) is type(target)
        found = divergence("alpha_divergence", near)
        torch.testing.assert_close(found.slope(log_u), target.slope(log_u), rtol=1e-7, atol=1e-7)
        sign = -1.0 if limit == "reverse_kl" else 1.0
        expected = target.per_sample(log_u) + sign * slack
        torch.testing.assert_close(found.per_sample(log_u), expected, rtol=1e-7, atol=1e-7)


def test_identity_exponential_link_is_pm() -> None:
    """Theorem 3 with g = exp is Theorem 1 with C_1 = β (Remark 3.8)."""
    equal_everywhere(
        {"name": "generalized_pl", "g": "exponential", "beta": 0.4},
        {"name": "pm", "beta": 0.4},
        shift=0.4,
    )


# --- configs --------------------------------------------------------------------------------------


class Quadratic(LogLinear):
    """From outside: w = e^{−strength} per token, a penalty on length."""

    name: str = "quadratic"
    strength: float

    def log_weights(self, ref_logp: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, -self.strength, 0.0).to(ref_logp)


class Section(StrictModel):
    regularizer: RegularizerField


@every([*EXACT, *TOKEN_LEVEL])
def test_round_trip(config: dict[str, Any]) -> None:
    section = Section(regularizer=config)
    assert section.regularizer == parse_regularizer(config)
    assert Section.model_validate_json(section.model_dump_json()) == section
    assert parse_regularizer(section.model_dump(mode="json")["regularizer"]) == section.regularizer


def test_round_trip_of_a_class_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "outside", __import__("types"))
    monkeypatch.setattr("outside.Quadratic", Quadratic, raising=False)
    monkeypatch.setattr(Quadratic, "__module__", "outside")
    config = {"class": "outside:Quadratic", "strength": 0.5, "beta": 2.0}
    section = Section(regularizer=config)
    assert type(section.regularizer) is Quadratic
    dumped = section.model_dump(mode="json")["regularizer"]
    assert dumped == {**config, "name": "quadratic"}
    assert parse_regularizer(dumped) == section.regularizer == dump_and_parse(section.regularizer)
    value = section.regularizer.value(LOGP, REF, MASK)
    assert value.item() == pytest.approx(2.0 * (LOG(5) - 1.0))


def dump_and_parse(regularizer: Regularizer) -> Regularizer:
    return parse_regularizer(dump_regularizer(regularizer))


@pytest.mark.parametrize(
    ("config", "place", "message"),
    [
        ("kl", "regularizer", "an object"),
        ({}, "regularizer", "name: no regularizer ''; known here: conditional_pm, f_div"),
        ({"name": "conditional-pm"}, "regularizer", "did you mean 'conditional_pm'?"),
        ({"name": "kl", "alpha": 0.1}, "regularizer.alpha", "unknown key"),
        ({"name": "kl", "bta": 0.1}, "regularizer.bta", "did you mean 'beta'?"),
        ({"name": "kl", "beta": 0.0}, "regularizer.beta", "greater than 0"),
        ({"name": "kl", "beta": "1"}, "regularizer.beta", "valid number"),
        ({"name": "maximum_entropy", "beta": 0.5}, "regularizer", "set tau instead"),
        ({"name": "conditional_pm"}, "regularizer", "exactly one of alpha, log_alpha and"),
        ({"name": "conditional_pm", "alpha": 0.1, "log_alpha": -3.0}, "regularizer", "exactly one"),
        ({"name": "conditional_pm", "log_alpha": -3.0}, "regularizer", "log_alpha: only with"),
        ({"name": "conditional_pm", "alpha": 0.1, "epsilon": 0.1}, "regularizer", "epsilon: only"),
        (
            {
                "name": "conditional_pm",
                "level": "sequence",
                "alpha": 0.1,
                "epsilon": 0.1,
                "log_epsilon": -3.0,
            },
            "regularizer",
            "not both",
        ),
        ({"name": "conditional_pm", "alpha": -0.1}, "regularizer.alpha", "greater than or equal"),
        ({"name": "kl_interpolation"}, "regularizer.kappa", "required"),
        ({"name": "kl_interpolation", "kappa": 1.1}, "regularizer.kappa", "less than or equal"),
        ({"name": "f_divergence", "divergence": "js"}, "regularizer.divergence", "js_divergence"),
        ({"name": "f_divergence", "divergence": "alpha_divergence"}, "regularizer", "alpha: the"),
        (
            {"name": "f_divergence", "divergence": "hellinger", "alpha": 0.5},
            "regularizer",
            "alpha: the coefficient of alpha_divergence",
        ),
        ({"name": "generalized_pl", "g": "power"}, "regularizer", "exponent: the power link's"),
        ({"class": "nowhere.at_all:Thing"}, "regularizer", "nowhere.at_all cannot be imported"),
        ({"class": "no_colon"}, "regularizer", "package.module:Class"),
        (
            {"class": CLASSES + ":ConditionPM"},
            "regularizer",
            "did you mean 'ConditionalPM'?",
        ),
        ({"class": "math:pi"}, "regularizer", "not a subclass"),
        (
            {"class": CLASSES + ":LogLinear"},
            "regularizer",
            "not define log_weights",
        ),
        (
            {"class": CLASSES + ":KL", "x": 1},
            "regularizer.x",
            "unknown key",
        ),
    ],
    ids=lambda entry: str(entry)[:60],
)
def test_wrong_configs_are_refused(config: Any, place: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Section.model_validate({"regularizer": config})
    (fault,) = caught.value.errors()
    assert ".".join(str(part) for part in fault["loc"]) == place
    assert message in fault["msg"]


def test_contract_of_the_registry() -> None:
    assert {name: cls.model_fields["name"].default for name, cls in REGULARIZERS.items()} == {
        name: name for name in REGULARIZERS
    }
    without_reference = {"none", "pm", "maximum_entropy", "generalized_pl"}
    for config in [*EXACT, *TOKEN_LEVEL]:
        regularizer = parse_regularizer(config)
        assert regularizer.preference_temperature == regularizer.beta
        marginal = regularizer.marginal(LOGP, REF, MASK)
        assert isinstance(marginal, Marginal)
        unmoved = torch.equal(
            marginal.per_token, regularizer.marginal(LOGP, REF - 1, MASK).per_token
        )
        assert unmoved or regularizer.name not in without_reference
    assert parse_regularizer({"name": "maximum_entropy", "tau": 7.0}).preference_temperature == 1.0
