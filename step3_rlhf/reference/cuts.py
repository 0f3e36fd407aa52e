"""How many responses the optimum cuts, foreseen from responses of the reference.

The law and its quantities are in ../regularizers/truncation.py; here they are means over the
prefixes of the reference's responses.
"""

from collections.abc import Sequence

import torch
from torch import nn

from step3_rlhf.config import PPOConfig
from step3_rlhf.regularizers.log_linear import LogLinear
from step3_rlhf.regularizers.truncation import cut_share, law_statistics
from step3_rlhf.rollout import Rollout
from training.models.logprobs import masked_sum
from training.models.lora import WithoutAdapter
from training.runtime.ranks import sum_over_ranks

CUT_SAMPLES = 64
"""Responses of the reference, over all ranks, from which the share of cut ones is foreseen."""


@torch.no_grad()
def foreseen_cuts(
    regularizer: LogLinear,
    reference: nn.Module | WithoutAdapter,
    rollout: Rollout,
    ends: Sequence[int],
    config: PPOConfig,
) -> dict[str, float]:
    """The figures `cut/…` of the metrics, the same on every rank.

    Args:
        regularizer: one whose weight is a product over tokens.
        rollout: this rank's responses of the reference.
        ends: the token ids that end a response.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=rollout.input_ids.device)
    size = config.per_device_eval_batch_size
    for first in range(0, len(rollout), size):
        part = rollout.rows(first, first + size)
        views = (part.input_ids, part.attention_mask, part.scored_mask)
        for place, statistic in enumerate(law_statistics(regularizer, ends)):
            _, values = reference(*views, statistic=statistic)
            sums[place] += masked_sum(values.double(), part.scored_mask)
        sums[2] += part.lengths.sum()
    growth, end_weight, tokens = sum_over_ranks(sums.cpu()).tolist()
    share = cut_share(growth / tokens, end_weight / tokens, config.response_length)
    return {"cut/log_growth": growth / tokens, "cut/predicted_share": share}


def cut_warning(cuts: dict[str, float], response_length: int) -> str | None:
    """What to tell the user if responses that do not end gain on the others with every token.

    Args:
        cuts: of `foreseen_cuts`, or empty.
    """
    growth = cuts.get("cut/log_growth", 0.0)
    if growth <= 0:
        return None
    return (
        f"Warning: response_length={response_length} moves the optimum. At a prefix of the "
        "reference's responses, the tokens that do not end the response weigh "
        f"e^{growth:.2f} together, more than 1: without differences of reward, about "
        f"{cuts['cut/predicted_share']:.0%} of the optimum's responses are cut. "
        "Regularizers with lower weights, such as conditional_pm with a larger alpha, or kl, "
        "cut fewer"
    )
