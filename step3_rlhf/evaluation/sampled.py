"""Metrics of sampled responses (section 6.1) and the perplexity of held-out texts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from step3_rlhf.config import EvaluationConfig
from step3_rlhf.evaluation.held_out import HeldOut
from step3_rlhf.evaluation.metrics import (
    pm_squared_difference,
    response_perplexity,
)
from step3_rlhf.evaluation.pairs import pair_figures, pairs_of
from step3_rlhf.evaluation.responses import Responses
from step3_rlhf.evaluation.resume import FinishedBlocks
from step3_rlhf.evaluation.scoring import Models, full_vocabulary_sums, token_logps
from step3_rlhf.evaluation.shared_work import over_ranks
from step3_rlhf.prompts import EVALUATION
from step3_rlhf.regularizers import Regularizer
from step3_rlhf.regularizers.optimality import certificate
from step3_rlhf.rollout import assemble, sample
from training.data import response_end
from training.runtime import ranks
from training.statistics import (
    Estimate,
    estimate,
    log_estimate,
    log_ratio_estimate,
    numbered,
    ratio_estimate,
)

ESTIMAND = (
    "the mean over held-out prompts of the mean over a prompt's draws; 95 % intervals, for other "
    "groups of prompts drawn like these, are cluster-robust with Student's t and G - 1 degrees of "
    "freedom, G the number of groups (`clusters`)"
)
"""What the sampled figures of evaluation.json estimate."""

OPTIMUM_FIGURES = ("optimum_gap", "optimum_spread", "optimum_kl")
"""Keys of the distance from the optimum."""


def sampled_metrics(
    prompts: list[str],
    responses: list[Responses],
    reference: list[Responses],
    temperature: float,
    regularizer: Regularizer | None = None,
    groups: Sequence[str] = (),
    shares: Sequence[float] = (),
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The metrics of section 6.1 from independent responses to each prompt.

    Each figure averages over a prompt's draws, then over prompts; intervals are over groups of
    prompts, and if `groups` is empty, over prompts.

    Args:
        responses: an even number of the policy's draws. Consecutive draws make a pair, and a
            prompt's PM divergence is the mean over its pairs.
        reference: an even number of the reference's draws.
        temperature: T of the softmax(r/T) that a preference-matching policy reaches.
        regularizer: the distance from its optimum is measured.
        shares: of the groups of people whose mixture gives the rewards; empty without a mixture.

    Returns:
        The figures of evaluation.json and the lines of instances.jsonl.
    """
    pairs = pairs_of(responses, temperature)
    divergence = None if pairs.divergence is None else pairs.divergence.mean(0)
    clusters = numbered(groups or prompts)
    drawn_pairs = zip(responses[::2], responses[1::2], strict=True)
    squared = [
        pm_squared_difference(a.logp, b.logp, a.rewards, b.rewards, temperature)
        for a, b in drawn_pairs
        if a.rewards is not None and b.rewards is not None
    ]
    drawn = clusters.repeat(len(responses))

    def every(values: list[Tensor]) -> Tensor:
        return torch.cat([value.double() for value in values])

    lengths = every([y.lengths for y in responses])
    losses = every([-y.logp for y in responses])
    ref_losses = every([-y.ref_logp for y in responses])

    def mean(value: Callable[[Responses], Tensor]) -> Estimate:
        return estimate(of_prompts(value), clusters)

    def of_prompts(value: Callable[[Responses], Tensor]) -> Tensor:
        return torch.stack([value(draw).double() for draw in responses]).mean(0)

    natural = [draw.natural for draw in responses if draw.natural is not None]
    rewards = [draw.rewards for draw in responses if draw.rewards is not None]
    estimates = pair_figures(pairs, pairs_of(reference, temperature), clusters) | {
        "natural_mass": estimate(torch.stack(natural).mean(0), clusters) if natural else None,
        "reward": estimate(torch.stack(rewards).double().mean(0), clusters) if rewards else None,
        "length": mean(lambda y: y.lengths),
        "ended_fraction": mean(lambda y: y.ended),
        "perplexity": log_estimate(
            of_prompts(lambda y: response_perplexity(y.logp, y.lengths)), clusters
        ),
        "reference_perplexity": log_estimate(
            of_prompts(lambda y: response_perplexity(y.ref_logp, y.lengths)), clusters
        ),
        "entropy": mean(lambda y: -y.logp),
        "entropy_per_token": mean(lambda y: -y.logp / y.lengths),
        "kl": mean(lambda y: y.logp - y.ref_logp),
        "kl_per_token": mean(lambda y: (y.logp - y.ref_logp) / y.lengths),
    }
    estimates |= {
        "pm_squared_difference": (
            estimate(torch.stack(squared).mean(0), clusters) if squared else None
        ),
        "perplexity_pooled": log_ratio_estimate(losses, lengths, drawn),
        "reference_perplexity_pooled": log_ratio_estimate(ref_losses, lengths, drawn),
    }
    sums = {
        "entropy_full_vocabulary": [y.full_entropy for y in responses],
        "kl_full_vocabulary": [y.full_kl for y in responses],
    }
    for name, values in sums.items():
        measured = [value for value in values if value is not None]
        if measured:
            estimates[name] = ratio_estimate(every(measured), lengths, drawn)
    estimates |= optimum_figures(responses, regularizer, clusters, shares)
    figures: dict[str, Any] = {
        "estimand": ESTIMAND,
        "prompts": len(prompts),
        "clusters": len(clusters.unique()),
        "pairs_per_prompt": len(pairs.equal),
        "preference_temperature": temperature,
    }
    figures |= {name: value and asdict(value) for name, value in estimates.items()}
    instances = [
        {
            "prompt": prompt,
            "pm_divergence": None if divergence is None else divergence[i].item(),
            "responses": [
                {
                    "text": y.texts[i],
                    "logp": y.logp[i].item(),
                    "ref_logp": y.ref_logp[i].item(),
                    "reward": None if y.rewards is None else y.rewards[i].item(),
                    "length": int(y.lengths[i]),
                    "ended": bool(y.ended[i]),
                }
                for y in responses
            ],
        }
        for i, prompt in enumerate(prompts)
    ]
    return figures, instances


def optimum_figures(
    responses: list[Responses],
    regularizer: Regularizer | None,
    clusters: Tensor,
    shares: Sequence[float] = (),
) -> dict[str, Estimate | None]:
    """How far the policy is from the regularizer's optimum; None where that cannot be known."""
    found: dict[str, Estimate | None] = dict.fromkeys(OPTIMUM_FIGURES)
    credits = [draw.credit for draw in responses if draw.credit is not None]
    if credits and regularizer is not None:
        by_prompt = certificate(torch.stack(credits, dim=1), regularizer, shares)
        found |= {
            f"optimum_{name}": estimate(values, clusters) for name, values in by_prompt.items()
        }
    return found


def respond(
    models: Models,
    held_out: HeldOut,
    config: EvaluationConfig,
    draw: int,
    finished: FinishedBlocks | None = None,
    regularizer: Regularizer | None = None,
    from_reference: bool = False,
) -> Responses:
    """Draw and score one response to every prompt, the work divided over the ranks.

    Prompts are batched by length, so that few are padded.

    Args:
        draw: number of the draw; each has other seeds.
        regularizer: says which responses are natural, and what PPO credits them with.
        from_reference: the reference draws instead of the policy: the same responses for every
            policy that has this reference.
    """
    drawer, name = (
        (models.reference, "reference's responses")
        if from_reference
        else (models.policy, "responses")
    )
    order = sorted(range(len(held_out.prompts)), key=lambda row: len(held_out.prompt_ids[row]))

    def measure(places: list[int]) -> list[tuple[Any, ...]]:
        rows = [order[place] for place in places]
        rollout = sample(
            drawer,
            models.tokenizer,
            [list(held_out.prompt_ids[row]) for row in rows],
            [held_out.prompts[row] for row in rows],
            [(config.seed, EVALUATION, row, draw) for row in rows],
            config.sampling,
        )
        logp, ref_logp = (
            token_logps(models.policy, rollout, config),
            token_logps(models.reference, rollout, config),
        )
        rewards = models.reward(rollout).double().cpu() if models.reward else None
        columns: list[Tensor | None] = [logp.sum(-1), ref_logp.sum(-1), rewards]
        columns += [rollout.lengths, rollout.ended]
        credit = natural = None
        if regularizer is not None:
            mask = rollout.response_mask.cpu()
            class_logp = models.class_logp(rollout)
            if rewards is not None:
                marginal = regularizer.marginal(logp, ref_logp, mask).per_token.sum(-1)
                effective = regularizer.effective_reward(rewards, class_logp)
                credit = effective + marginal.view(-1, *[1] * (rewards.dim() - 1))
            natural = regularizer.natural(ref_logp, mask, class_logp)
        columns += [credit, natural]
        if not from_reference:
            columns += full_vocabulary_sums(models, rollout, config.sampling.response_length)
        unknown = [None] * len(rollout)
        listed = [unknown if column is None else column.tolist() for column in columns]
        return list(zip(rollout.responses, *listed, strict=True))

    measured = over_ranks(
        len(order), config.sampling.rollout_batch_size, measure, f"{name} {draw + 1}", finished
    )
    rows = [row for _, row in sorted(zip(order, measured, strict=True), key=lambda pair: pair[0])]
    texts, *columns = zip(*rows, strict=True)
    values: Iterator[Any] = (
        None if column[0] is None else torch.tensor(column).double() for column in columns
    )
    return Responses(list(texts), *values)


def held_out_perplexity(
    models: Models,
    held_out: HeldOut,
    config: EvaluationConfig,
    finished: FinishedBlocks | None = None,
) -> dict[str, Any]:
    """Perplexity of texts that people wrote, under policy and reference.

    exp(−Σ log π / Σ tokens) with the interval of its logarithm, over groups of texts.
    """

    def measure(rows: list[int]) -> list[tuple[float, float, int]]:
        texts = [held_out.texts[row] for row in rows]
        rollout = assemble(
            [list(prompt) for prompt, _ in texts],
            [list(response) for _, response in texts],
            [""] * len(texts),
            models.tokenizer,
            ranks.device(),
            (response_end(models.tokenizer),),
        )
        columns = (
            token_logps(models.policy, rollout, config).sum(-1),
            token_logps(models.reference, rollout, config).sum(-1),
            rollout.lengths,
        )
        return list(zip(*(column.tolist() for column in columns), strict=True))

    size = config.per_device_eval_batch_size
    rows = over_ranks(len(held_out.texts), size, measure, "held-out texts", finished)
    logp, ref_logp, lengths = (torch.tensor(column).double() for column in zip(*rows, strict=True))
    clusters = numbered(held_out.text_groups or range(len(rows)))
    figures: dict[str, Any] = {"texts": len(rows), "clusters": len(clusters.unique())}
    for name, scored in (("perplexity", logp), ("reference_perplexity", ref_logp)):
        found = log_ratio_estimate(-scored, lengths, clusters)
        figures |= {name: found.mean, f"{name}_ci95": found.ci95}
        figures |= {f"{name}_low": found.low, f"{name}_high": found.high}
    return figures
