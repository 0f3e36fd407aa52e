"""Exact distances between distributions on finite response sets."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from step3_rlhf.config import EvaluationConfig
from step3_rlhf.evaluation.metrics import kl_divergence, total_variation
from step3_rlhf.evaluation.resume import FinishedBlocks
from step3_rlhf.evaluation.scoring import Models, token_logps
from step3_rlhf.evaluation.shared_work import over_ranks
from step3_rlhf.regularizers import Regularizer
from step3_rlhf.regularizers.base import NoOptimumError, ResponseSet
from step3_rlhf.regularizers.optimum import optimum
from step3_rlhf.response_sets import FiniteSet
from step3_rlhf.rollout import Rollout, assemble, encode_prompt_texts
from training.data import encode_responses, response_end
from training.runtime import ranks
from training.statistics import estimate, numbered

EXACT_FIGURES = (
    "tv_to_reward",
    "tv_to_population",
    "tv_to_optimum",
    "tv_to_choice",
    "kl_to_reward",
    "kl_to_population",
    "kl_to_optimum",
    "kl_to_choice",
    "outside_mass",
    "natural_mass",
)
"""Keys of the means."""


def exact_metrics(
    models: Models,
    sets: list[FiniteSet],
    regularizer: Regularizer | None,
    temperature: float,
    config: EvaluationConfig,
    finished: FinishedBlocks | None = None,
) -> dict[str, Any]:
    """The `exact` part of evaluation.json: means over prompts, and every prompt by itself.

    The prompts of one topic are one cluster; a prompt without a topic is one by itself.

    Distances are between distributions conditional on the set; `outside_mass` is the policy's
    probability of everything outside it, and `natural_mass` that of the set's responses that the
    regularizer counts as natural. A figure that no prompt has is None. The optimum is that on the
    set, which only for log-linear regularizers is the whole optimum given the set.
    """

    def measure(rows: list[int]) -> list[dict[str, Any]]:
        return [measure_set(models, sets[row], regularizer, temperature, config) for row in rows]

    per_prompt = over_ranks(len(sets), 1, measure, "response sets", finished)
    figures: dict[str, Any] = {"prompts": len(per_prompt)}
    for name in EXACT_FIGURES:
        having = [entry for entry in per_prompt if entry.get(name) is not None]
        values = torch.tensor([entry[name] for entry in having])
        clusters = numbered([entry["topic"] or entry["prompt"] for entry in having])
        figures[name] = asdict(estimate(values, clusters)) if having else None
    return figures | {"per_prompt": per_prompt}


def measure_set(
    models: Models,
    finite: FiniteSet,
    regularizer: Regularizer | None,
    temperature: float,
    config: EvaluationConfig,
) -> dict[str, Any]:
    """An entry of `per_prompt`: distributions over one prompt's responses, and distances."""
    count = len(finite.responses)
    rollout = assemble(
        encode_prompt_texts([finite.prompt], models.tokenizer) * count,
        encode_responses(list(finite.responses), models.tokenizer),
        [finite.prompt] * count,
        models.tokenizer,
        ranks.device(),
        (response_end(models.tokenizer),),
    )
    logp = token_logps(models.policy, rollout, config).sum(-1)
    ref_logp = token_logps(models.reference, rollout, config)
    rewards = models.reward(rollout).double().cpu() if models.reward else None
    class_logp = models.class_logp(rollout)
    policy = logp.log_softmax(0)
    targets = {}
    if rewards is not None:
        groups = rewards.view(count, -1)  # one, or those of a mixture
        shares = torch.tensor(config.group_shares or (1.0,), dtype=torch.float64)
        targets["reward"] = mixed((groups / temperature).log_softmax(0), shares)
        optima = [
            optimum_on(rollout, column, ref_logp, regularizer, class_logp) for column in groups.T
        ]
        known = [optimum for optimum in optima if optimum is not None]
        if len(known) == len(optima):
            targets["optimum"] = mixed(torch.stack(known, dim=-1), shares)
    if finite.population is not None:
        targets["population"] = torch.tensor(finite.population).double().log()
    if rewards is not None and regularizer and not config.group_shares:
        choice = regularizer.log_choice(rewards)
        if choice is not None:
            targets["choice"] = choice
    entry: dict[str, Any] = {
        "prompt": finite.prompt,
        "topic": finite.topic,
        "responses": list(finite.responses),
        "outside_mass": max(0.0, 1.0 - logp.exp().sum().item()),
        "policy": policy.exp().tolist(),
        "reference": ref_logp.sum(-1).log_softmax(0).exp().tolist(),
    }
    if rewards is not None:
        entry["rewards"] = rewards.tolist()
        if config.group_shares:
            # The one reward whose softmax(r/T) on the set is the mixture of the groups'.
            entry["rewards"] = (temperature * targets["reward"]).tolist()
            entry["group_rewards"] = rewards.T.tolist()
    inside = rollout.response_mask.cpu()
    natural = regularizer.natural(ref_logp, inside, class_logp) if regularizer else None
    if natural is not None:
        entry["natural"] = natural.tolist()
        entry["natural_mass"] = logp.exp()[natural].sum().item()
    for name, target in targets.items():
        entry[name] = target.exp().tolist()
        entry[f"tv_to_{name}"] = total_variation(policy, target).item()
        entry[f"kl_to_{name}"] = kl_divergence(policy, target).item()
    return entry


def mixed(log_p: Tensor, shares: Tensor) -> Tensor:
    """[K] log Σ_k ρ_k p_k, the mixture of the groups' distributions [K, G]; of one, itself."""
    return log_p[:, 0] if len(shares) == 1 else (log_p + shares.log()).logsumexp(-1)


def optimum_on(
    rollout: Rollout,
    rewards: Tensor,
    ref_logp: Tensor,
    regularizer: Regularizer | None,
    class_logp: Tensor | None = None,
) -> Tensor | None:
    """[K] log π* on the set; None without a regularizer or if it has no optimum there."""
    if regularizer is None:
        return None
    tokens = rollout.input_ids[:, rollout.prompt_length :].cpu()
    mask = rollout.response_mask.cpu()
    responses = ResponseSet(tokens, ref_logp, mask, rewards, class_logp)
    try:
        return optimum(regularizer, responses)
    except NoOptimumError:
        return None
