"""Pairs of responses: the paper's PM divergence, and figures that see a collapse.

Two equal responses are equally likely and equally good, so that their instance PM divergence is 0
whatever the policy is. A policy that always gives one answer therefore has PM divergence 0, however
disliked that answer is. The other figures do not credit it: they leave equal pairs out, or take the
pairs from the reference, whose responses the policy does not choose.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from step3_rlhf.evaluation.metrics import pm_divergence
from step3_rlhf.evaluation.responses import Responses
from training.statistics import Estimate, estimate, ratio_estimate


@dataclass(frozen=True)
class Pairs:
    """The same number of pairs of responses to each prompt."""

    divergence: Tensor | None  # [pairs, prompts] instance PM divergence, nats; None: no reward
    equal: Tensor  # [pairs, prompts] bool: both responses have the same text and length


def pairs_of(responses: Sequence[Responses], temperature: float) -> Pairs:
    """Consecutive draws, paired.

    Args:
        responses: an even number of draws, whoever drew them; log π is the policy's.
        temperature: T of the softmax(r/T) that a preference-matching policy reaches.
    """
    pairs = list(zip(responses[::2], responses[1::2], strict=True))
    divergences = [
        pm_divergence(a.logp, b.logp, a.rewards, b.rewards, temperature)
        for a, b in pairs
        if a.rewards is not None and b.rewards is not None
    ]
    same_text = [[x == y for x, y in zip(a.texts, b.texts, strict=True)] for a, b in pairs]
    same_length = torch.stack([a.lengths == b.lengths for a, b in pairs])
    divergence = torch.stack(divergences) if divergences else None
    return Pairs(divergence, torch.tensor(same_text) & same_length)


def pair_figures(
    own: Pairs, reference: Pairs, clusters: Tensor | None = None
) -> dict[str, Estimate | None]:
    """The figures of evaluation.json that come from pairs.

    Args:
        own: pairs that the policy drew.
        reference: pairs that the reference drew.
        clusters: [prompts] long, the cluster of each prompt; None: each is its own.
    """
    return {
        "pm_divergence": (
            None if own.divergence is None else estimate(own.divergence.mean(0), clusters)
        ),
        "pm_divergence_unequal": over_unequal(own, clusters),
        "pm_divergence_reference": over_unequal(reference, clusters),
        "equal_pairs": estimate(own.equal.double().mean(0), clusters),
    }


def over_unequal(pairs: Pairs, clusters: Tensor | None = None) -> Estimate | None:
    """Mean divergence of the pairs that differ: a ratio of sums over prompts.

    Returns:
        None if no pair differs, or without a reward; `count` is the number of prompts with a pair
        that differs.
    """
    differ = ~pairs.equal
    if pairs.divergence is None:
        return None
    sums = torch.where(differ, pairs.divergence, 0.0).sum(0)
    numbers = differ.sum(0).double()
    if not differ.any():
        return None
    known = numbers > 0
    return ratio_estimate(
        sums[known], numbers[known], None if clusters is None else clusters[known]
    )
