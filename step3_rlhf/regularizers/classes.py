"""Classes of responses: what makes two responses to a prompt the same opinion.

Preference matching over strings gives an opinion with 25 phrasings 25 shares. Over classes c(y),
with the weight w(y|x) = π_ref(y|x)/π_ref(c(y)|x), the optimum ∝ w·e^{r/β} gives

    a class     π*(c|x) ∝ E_{y~π_ref(·|x,c)} e^{r(x,y)/β}, however many phrasings it has
    a response  π*(y|x,c) ∝ π_ref(y|x)·e^{r(x,y)/β}, KL within the class

log w has a part that depends on the response, log π_ref(y|x), and one that depends on its class
alone and not on π, −log π_ref(c(y)|x), which is added to the reward. This module has the settings,
and the estimate of the class's share from draws; ../classes/ finds out what class a response has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from training.config import Count, PathText, StrictModel
from training.deferred import Tensor, torch


class ClassSettings(StrictModel):
    """How the class of a response is found: by one of an answer key, a function and lengths."""

    answer_key: PathText | None = None
    """JSONL file of {"prompt": …, "classes": {name: [response, …], …}}; it gives exact shares."""
    function: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")] | None = None
    """A Python function as `module:callable`, which is given two lists of texts, prompts and
    responses, and returns a list of the responses' class names, null for none."""
    lengths: Annotated[tuple[Count, ...], Field(strict=False)] = ()
    """Lengths in tokens, end included, at which a class of responses ends: [4, 8] makes the classes
    1 to 4, 5 to 8, and 9 or more."""
    draws: Count = 64
    """Responses of the reference to each prompt from which the shares of a function's classes, or
    of lengths, are estimated; an answer key needs none."""

    def faults(self) -> list[str]:
        given = [bool(self.answer_key), bool(self.function), bool(self.lengths)]
        if sum(given) != 1:
            return ["give exactly one of answer_key, function, lengths"]
        if list(self.lengths) != sorted(set(self.lengths)):
            return ["lengths: they must ascend"]
        if self.answer_key and not Path(self.answer_key).is_file():
            return [f"answer_key: {self.answer_key} does not exist"]
        return []


def log_share(count: Tensor, draws: int) -> Tensor:
    """Estimate of log p from `count` ~ Binomial(draws, p), nats: H_count − H_draws.

    H_k = Σ_{i=1}^{k} 1/i. Since C(K − n, i)/C(K, i) is the unbiased estimate of (1 − p)^i from n
    successes in K draws, and Σ_{i=1}^{K} C(K − n, i)/(i C(K, i)) = H_K − H_n, its expectation is

        E[H_n − H_K] = −Σ_{i=1}^{K} (1 − p)^i/i = log p + Σ_{i>K} (1 − p)^i/i,

    log p but for the tail of its series, which is less than (1 − p)^{K+1}/((K + 1) p). log p enters
    the reward linearly, so that the errors of single prompts, about √((1 − p)/(Kp)) each, average
    out over prompts. log(n/K) has a bias of order (1 − p)/(2Kp), and does not exist where nothing
    was drawn. A class that is much rarer than 1/K is taken to have a share of about 0.56/K, so it
    gets less than its due. The series is that of inverse binomial sampling (van Opheusden, Acerbi
    and Ma 2020), here for a number of draws that is fixed.

    Args:
        count: [any shape] int64, 0 ≤ count ≤ draws.
    """
    count = torch.as_tensor(count)
    harmonic = torch.cat(
        [torch.zeros(1).double(), (1 / torch.arange(1, draws + 1).double()).cumsum(0)]
    )
    return harmonic.to(count.device)[count] - harmonic[-1]
