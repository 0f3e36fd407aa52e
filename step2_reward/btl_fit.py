"""Whether one Bradley–Terry–Luce model can hold a population: a test of lack of fit.

A reward model gives each response to a prompt one number, so that the log-odds of three responses
add up: i over j and j over k give i over k (BTL). People of several tastes need not choose so.
Where the responses to a prompt were compared repeatedly, the saturated model, which gives every
pair a probability of its own, can be held against the fitted BTL model:

    D = 2 Σ_{i≠j} n_ij log( (n_ij / (n_ij + n_ji)) / σ(r_i − r_j) ),   n_ij: i was preferred to j

has K(K − 1)/2 − (K − 1) degrees of freedom for a prompt with K responses, all pairs of which were
compared. D has a chi-square distribution only if every pair was compared many times; with few
comparisons it is larger, by up to 39 % on average, or smaller if the choices are nearly certain.
D of data simulated from the fitted model is too small, because that model has already followed the
noise. But BTL says exactly how likely each outcome is given how often each response won (the
sufficient statistic): the parameters drop out.
D's mean and variance are therefore those over outcomes in which every response wins as often, drawn
by reversing circles i > j > k > i (Metropolis; Besag and Clifford 1989), and the p-value comes from
the gamma distribution with these, of which every chi-square is a case.

Shapes: P prompts, K responses (the largest number; missing ones have no comparisons).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, permutations

import torch
from torch import Tensor

from training.preferences.links import LinkName

Comparison = tuple[str, Sequence[int], Sequence[int]]
"""Prompt, preferred response and other response; responses as token ids."""

ITERATIONS = 100
"""Of the MM algorithm."""
CHAINS = 100
"""Outcomes that are drawn."""
MOST_STEPS = 2000
SEED = 0
LARGEST_BATCH = 2**22
"""Numbers of wins that are kept at the same time."""


@dataclass(frozen=True)
class LackOfFit:
    """The test's result; where it cannot be made, `reason` says why and the figures are None."""

    prompts: int
    """Prompts that take part."""
    comparisons: int
    """Comparisons of these prompts' responses."""
    degrees_of_freedom: int
    deviance: float | None = None
    expected_deviance: float | None = None
    """Mean of D if BTL holds; the degrees of freedom if every pair was compared often."""
    p_value: float | None = None
    reason: str | None = None
    link: LinkName = "exponential"
    """The reward model's link g. P(i is preferred to j) = g(r_i)/(g(r_i) + g(r_j)) has the same
    values as BTL, with others for r, whatever g is: the test is every link's."""

    @property
    def meaning(self) -> str:
        """The result in one sentence."""
        if self.p_value is None:
            return f"Whether one reward model can hold these choices was not tested: {self.reason}"
        model = "Bradley-Terry-Luce model"
        if self.link != "exponential":
            model = f"preference model of the link {self.link}, or of any other"
        return (
            f"If all choices came from one {model}, they would deviate from the "
            f"fitted one as much as they do, or more, with probability {self.p_value:.2g}"
            + (
                "; so no single reward model can hold this population, for instance because groups "
                "of people disagree"
                if self.p_value < 0.01
                else ", which does not rule out groups of people who disagree"
            )
        )


def count_wins(comparisons: Iterable[Comparison]) -> Tensor:
    """[P, K, K] float64: how often i was preferred to j, of the prompts that can tell.

    These have three responses or more, and each of the pairs that were compared was so twice on
    average. Prompts and responses are in the order in which they come.
    """
    wins: dict[str, Counter[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for prompt, *pair in comparisons:
        preferred, other = map(tuple, pair)
        if preferred != other:
            wins.setdefault(prompt, Counter())[preferred, other] += 1
    kept = []
    for counts in wins.values():
        places = {ids: place for place, ids in enumerate(dict.fromkeys(chain(*counts)))}
        if len(places) > 2 and counts.total() >= 2 * len({frozenset(pair) for pair in counts}):
            kept.append((places, counts))
    size = max((len(places) for places, _ in kept), default=0)
    table = torch.zeros(len(kept), size, size, dtype=torch.float64)
    for number, (places, counts) in enumerate(kept):
        for (preferred, other), count in counts.items():
            table[number, places[preferred], places[other]] = count
    return table


def degrees_of_freedom(wins: Tensor) -> Tensor:
    """[P] long: pairs that were compared, less the differences of reward that they determine."""
    compared = (wins + wins.mT) > 0
    size = wins.shape[-1]
    if size == 0:
        return torch.zeros(len(wins), dtype=torch.long)
    reached = compared | torch.eye(size, dtype=torch.bool)
    for _ in range(max(size - 1, 1).bit_length()):
        reached = (reached.double() @ reached.double()) > 0
    # A connected part of the graph of comparisons is counted at its first member.
    first = torch.arange(size) == reached.double().argmax(-1)
    return compared.triu(1).sum((-2, -1)) - (size - first.sum(-1))


def btl_probabilities(wins: Tensor) -> Tensor:
    """[..., K, K] P(i is preferred to j) of the fitted model; by Hunter's (2004) MM algorithm."""
    total = wins + wins.mT
    won = wins.sum(-1)
    strength = torch.ones_like(won)
    for _ in range(ITERATIONS):
        both = strength[..., :, None] + strength[..., None, :]
        strength = won / (total / both).sum(-1).clamp(min=1e-300)
        strength = strength / strength.sum(-1, keepdim=True).clamp(min=1e-300)
        strength = strength.clamp(min=1e-100)
    return strength[..., :, None] / (strength[..., :, None] + strength[..., None, :])


def deviance(wins: Tensor, probabilities: Tensor) -> Tensor:
    """[...] D of each prompt, from wins and probabilities [..., K, K]."""
    saturated = wins / (wins + wins.mT).clamp(min=1.0)
    return 2 * (torch.xlogy(wins, saturated) - torch.xlogy(wins, probabilities)).sum((-2, -1))


def lack_of_fit(wins: Tensor, link: LinkName = "exponential") -> LackOfFit:
    """Test whether BTL models, one for each prompt, fit the comparisons `wins` [P, K, K].

    A prompt takes part if it has degrees of freedom.

    Args:
        link: the reward model's, for the result's sentence; it makes no difference to the figures.
    """
    wins = wins[degrees_of_freedom(wins) > 0]
    freedom, compared = int(degrees_of_freedom(wins).sum()), int(wins.sum())
    if freedom == 0:
        return LackOfFit(
            0,
            0,
            0,
            reason="it needs prompts with three or more responses that were compared with one "
            "another, each pair twice on average",
            link=link,
        )
    fitted = btl_probabilities(wins)
    found = deviance(wins, fitted).sum()
    drawn = drawn_deviances(wins, fitted)
    mean, variance = drawn.mean(), drawn.var()
    p_value = 1.0  # no other outcome has these numbers of wins
    if variance > 0:
        # A gamma distribution of shape mean²/variance and scale variance/mean.
        p_value = torch.special.gammaincc(mean**2 / variance, found * mean / variance).item()
    return LackOfFit(len(wins), compared, freedom, found.item(), mean.item(), p_value, link=link)


def drawn_deviances(wins: Tensor, fitted: Tensor) -> Tensor:
    """[CHAINS] Σ D over outcomes in which every response wins as often as in `wins` [P, K, K].

    The model that is fitted to them is always `fitted`, which depends on these numbers alone.
    """
    generator = torch.Generator().manual_seed(SEED)
    batch = max(1, LARGEST_BATCH // (CHAINS * wins[0].numel()))
    sums = torch.zeros(CHAINS, dtype=torch.float64)
    for first in range(0, len(wins), batch):
        part = slice(first, first + batch)
        drawn = with_circles_reversed(wins[part].expand(CHAINS, -1, -1, -1), generator)
        sums += deviance(drawn, fitted[part]).sum(-1)
    return sums


def with_circles_reversed(wins: Tensor, generator: torch.Generator) -> Tensor:
    """Outcomes [C, P, K, K] of Markov chains that start at `wins` and keep every number of wins.

    BTL gives an outcome a probability ∝ Π_{i<j} 1/(n_ij! n_ji!) given the numbers of wins.
    """
    chains, prompts, size = wins.shape[:3]
    circles = torch.tensor(list(permutations(range(size), 3)))
    repeated = wins.sum() / (wins + wins.mT > 0).sum().clamp(min=1)
    steps = min(MOST_STEPS, int(len(circles) * (4 + repeated)))
    flat = wins.reshape(chains * prompts, -1).clone()
    for _ in range(steps):
        chosen = torch.randint(len(circles), (len(flat),), generator=generator)
        i, j, k = circles[chosen].T
        along = torch.stack([i * size + j, j * size + k, k * size + i], dim=-1)
        against = torch.stack([j * size + i, k * size + j, i * size + k], dim=-1)
        odds = (flat.gather(1, along) / (flat.gather(1, against) + 1)).prod(-1)
        moves = (torch.rand(len(flat), generator=generator) < odds).double()[:, None].expand(-1, 3)
        flat.scatter_add_(1, along, -moves).scatter_add_(1, against, moves)
    return flat.view(wins.shape)
