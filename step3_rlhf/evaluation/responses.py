"""The record of what was drawn for an evaluation."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Responses:
    """One response to each prompt, scored by policy, reference and reward; [prompts] each.

    Without a reward, `rewards` and `credit` are None.
    """

    texts: list[str]
    logp: Tensor  # log π(y|x), nats
    ref_logp: Tensor  # log π_ref(y|x), nats
    rewards: Tensor | None
    lengths: Tensor  # tokens, EOS included
    ended: Tensor  # 1 if the response has its EOS, else 0
    credit: Tensor | None = None  # a(y) = r + R + πR′; None without a regularizer or a reward
    natural: Tensor | None = None  # 1 if the response is in M(x); None without an M(x)
    full_entropy: Tensor | None = None  # Σ_t H(π(·|prefix_t)), nats, over the whole vocabulary
    full_kl: Tensor | None = None  # Σ_t KL(π(·|prefix_t) ‖ π_ref(·|prefix_t)), nats
