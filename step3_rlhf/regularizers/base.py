"""The interface of a regularizer R in the objective E_{y~π}[r(x, y) + R(π(y|x))].

A regularizer has two values, which are kept apart:

value     R itself, β included: what metrics report.
marginal  R + πR', eq. (3.6): what PPO adds to the reward, because ∇E_π[R] = E_π[(R + πR')·∇log π].
          It differs from R only by a constant if R is −β log π plus terms without π, and by more
          otherwise.

Shapes in this package: `logp` and `ref_logp` are [batch, length], the log-probabilities (nats) of
the sampled tokens under the policy and the reference. `mask` is [batch, length] bool, true on the
response's tokens, end-of-sequence included. Where it is false, the others may hold anything.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from step3_rlhf.regularizers.classes import ClassSettings
from training.config import Positive, StrictModel
from training.deferred import Tensor, torch
from training.errors import UserError

LARGEST_EXPONENT = 80.0
"""Reported values take e^x only for |x| ≤ 80, where it is finite in float32."""


@dataclass(frozen=True)
class Marginal:
    """R + πR' up to a constant, in units of reward.

    per_token  [batch, length]  adds up to the response's marginal; zero where the mask is false
    bound      [batch] bool     responses on which a documented numerical bound took effect
    """

    per_token: Tensor
    bound: Tensor


class Regularizer(StrictModel, ABC):
    """A regularizer: its parameters, which are validated, and its mathematics."""

    name: str = "custom"
    beta: Positive = 1.0
    """Weight of the regularizer, in units of reward per nat."""

    @abstractmethod
    def value(self, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
        """[batch] R(π(y|x)), in units of reward, β included: the objective is r + value."""

    @abstractmethod
    def marginal(self, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Marginal:
        """R + πR' (eq. 3.6) on each token, in units of reward: what PPO adds to the reward."""

    def effective_reward(self, rewards: Tensor, class_logp: Tensor | None = None) -> Tensor:
        """The reward that is maximized together with R, in units of reward: r(x, y) itself, unless
        the regularizer says otherwise.

        Args:
            rewards: [batch] r(x, y), as the reward source gave them.
            class_logp: [batch] log π_ref(c(y)|x), nats, of each response's class; −inf outside
                every class. None: responses have no classes.
        """
        return rewards

    @property
    def effective_reward_name(self) -> str:
        """What a message calls the effective rewards."""
        return "rewards"

    def log_choice(self, rewards: Tensor) -> Tensor | None:
        """[K] log-probabilities of the generalized choice model that the regularizer names.

        None where it names none, so that people choose by softmax(r/T).

        Args:
            rewards: [K] float64 r(x, y) of all the responses that there are.
        """
        return None

    def log_optimum(self, responses: ResponseSet) -> Tensor:
        """[K] float64 log-probabilities (nats) of the optimum on a finite set; see optimum.py."""
        raise NoOptimumError(f"{self.name}: {type(self).__name__} does not state its optimum")

    @property
    def optimum_formula(self) -> str:
        """The optimal policy π*(y|x), for people to read."""
        return f"that of {type(self).__name__}"

    def natural(
        self, ref_logp: Tensor, mask: Tensor, class_logp: Tensor | None = None
    ) -> Tensor | None:
        """[batch] bool: the responses in M(x), among which preferences are matched.

        None where the regularizer has no such set. `class_logp` is that of `effective_reward`.
        """
        return None

    @property
    def response_classes(self) -> ClassSettings | None:
        """What decides the class c(y) of a response; None where it makes no difference."""
        return None

    @property
    def assumed_link(self) -> str:
        """The link g under which rewards are preferences g(r)/(g(r) + g(r')) (§3.4)."""
        return "exponential"

    @property
    def coefficient(self) -> float:
        """β of the marginal, in units of reward per nat."""
        return self.beta

    @property
    def levels_credit(self) -> bool:
        """Whether r + R + πR′, r being the effective reward, is the same for all responses that the
        optimum gives.

        The first-order condition of every regularizer that is a function of π(y|x) says so.
        """
        return True

    @property
    def is_flat(self) -> bool:
        """Whether the marginal does not follow small changes of π: comparisons teach nothing."""
        return False

    @property
    def is_log_linear(self) -> bool:
        """Whether the optimum is ∝ w·e^{r/β}, r the effective reward, and w independent of it."""
        return False

    @property
    def preference_temperature(self) -> float:
        """T of softmax(r/T), the distribution that matches the reward's preferences."""
        return self.beta


def response_sum(values: Tensor, mask: Tensor) -> Tensor:
    """[batch] sums over the response's tokens; other entries, even NaN, are ignored."""
    return torch.where(mask, values, 0.0).sum(-1)


def on_last_token(values: Tensor, mask: Tensor) -> Tensor:
    """[batch, length]: `values` [batch] on each response's last token, zero elsewhere."""
    last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    return torch.where(last, values[:, None], 0.0)


def unbound(mask: Tensor) -> Tensor:
    """[batch] of false: no numerical bound took effect."""
    return torch.zeros(mask.shape[0], dtype=torch.bool, device=mask.device)


def log1p_exp(x: Tensor) -> Tensor:
    """log(1 + e^x) in full precision; torch's softplus drops e^{−x} beyond x = 20."""
    return torch.logaddexp(x, torch.zeros_like(x))


class NoOptimumError(UserError):
    """The optimum does not exist, is not known, or was not found with the required precision."""


@dataclass(frozen=True)
class ResponseSet:
    """The K responses to one prompt over which an optimum is sought, right-padded to T tokens.

    tokens      [K, T] int64    token ids; anything where mask is false
    ref_logp    [K, T] float64  log π_ref(token | prefix), nats; anything where mask is false
    mask        [K, T] bool     true on the response's tokens, end-of-sequence included
    rewards     [K]    float64  r(x, y)
    class_logp  [K]    float64  log π_ref(c(y)|x) of each response's class, nats, −inf outside every
                                class; None where responses have no classes

    Example with two responses of one token: tokens [[7], [9]], ref_logp [[-0.1], [-2.4]],
    mask [[True], [True]], rewards [0.0, 1.0].
    """

    tokens: Tensor
    ref_logp: Tensor
    mask: Tensor
    rewards: Tensor
    class_logp: Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.rewards)
        shape = self.tokens.shape
        if count == 0 or len(shape) != 2 or shape[0] != count:
            raise ValueError(
                f"tokens {tuple(shape)} and rewards [{count}]: expected [K, T] and [K]"
            )
        if self.ref_logp.shape != shape or self.mask.shape != shape:
            raise ValueError("tokens, ref_logp and mask must have one shape, [K, T]")
        if not torch.isfinite(self.rewards).all():
            raise NoOptimumError("rewards: all must be finite for an optimum to exist")
        object.__setattr__(self, "mask", self.mask.bool())
        object.__setattr__(self, "rewards", self.rewards.detach().double())
        object.__setattr__(self, "ref_logp", self.ref_logp.detach().double())

    @property
    def sequence_ref_logp(self) -> Tensor:
        """[K] log π_ref(y|x), nats."""
        return torch.where(self.mask, self.ref_logp, 0.0).sum(-1)
