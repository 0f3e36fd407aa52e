"""Measures an aligned policy: sampled metrics on held-out prompts, exact ones on finite sets."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from step3_rlhf.blocks import Blocks
from step3_rlhf.config import EvaluationConfig
from step3_rlhf.held_out import HeldOut
from step3_rlhf.metrics import (
    Estimate,
    estimate,
    kl_divergence,
    pm_divergence,
    response_perplexity,
    text_perplexity,
    text_perplexity_ci95,
    total_variation,
)
from step3_rlhf.optimum import NoOptimumError, ResponseSet, optimum
from step3_rlhf.prompts import EVALUATION
from step3_rlhf.regularizers import Regularizer
from step3_rlhf.response_sets import FiniteSet
from step3_rlhf.rewards import RewardSource
from step3_rlhf.rollout import Rollout, assemble, encode_prompt_texts, sample
from training import ranks
from training.data import encode_responses
from training.lora import WithoutAdapter

Model = nn.Module | WithoutAdapter


@dataclass(frozen=True)
class Models:
    """The triple that is measured, and the tokenizer of policy and reference."""

    policy: nn.Module
    reference: Model
    reward: RewardSource
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Responses:
    """One response to each prompt, as all three models see it; [prompts] each."""

    texts: list[str]
    logp: Tensor
    ref_logp: Tensor
    rewards: Tensor
    lengths: Tensor
    ended: Tensor


def evaluate(
    models: Models,
    held_out: HeldOut,
    regularizer: Regularizer | None,
    config: EvaluationConfig,
    blocks: Blocks | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Every metric, and the per-prompt values behind the sampled ones; the same on every rank.

    Args:
        regularizer: whose optimum the policy is compared with on finite sets; None skips that.
        blocks: where finished parts are kept and looked up; None keeps none.
    """
    temperature = regularizer.preference_temperature if regularizer else 1.0
    draws = range(2 * config.evaluation.pairs_per_prompt)
    responses = [respond(models, held_out, config, draw, blocks) for draw in draws]
    report, instances = sampled_metrics(held_out.prompts, responses, temperature)
    if held_out.texts:
        report["held_out_text"] = held_out_perplexity(models, held_out, config, blocks)
    if held_out.sets:
        report["exact"] = exact_metrics(
            models, held_out.sets, regularizer, temperature, config, blocks
        )
    return report, instances


def sampled_metrics(
    prompts: list[str], responses: list[Responses], temperature: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Section 6.1 from independent responses to each prompt; intervals are over prompts.

    Args:
        responses: an even number of draws; each two make a pair, and a prompt's PM divergence is
            the mean over its pairs.
    """
    pairs = list(zip(responses[::2], responses[1::2], strict=True))
    divergence = torch.stack(
        [pm_divergence(a.logp, b.logp, a.rewards, b.rewards, temperature) for a, b in pairs]
    ).mean(0)

    def mean(value: Callable[[Responses], Tensor]) -> Estimate:
        return estimate(torch.stack([value(draw).double() for draw in responses]).mean(0))

    figures = {
        "pm_divergence": estimate(divergence),
        "reward": mean(lambda y: y.rewards),
        "length": mean(lambda y: y.lengths),
        "ended_fraction": mean(lambda y: y.ended),
        "perplexity": mean(lambda y: response_perplexity(y.logp, y.lengths)),
        "reference_perplexity": mean(lambda y: response_perplexity(y.ref_logp, y.lengths)),
        "entropy": mean(lambda y: -y.logp),
        "entropy_per_token": mean(lambda y: -y.logp / y.lengths),
        "kl": mean(lambda y: y.logp - y.ref_logp),
        "kl_per_token": mean(lambda y: (y.logp - y.ref_logp) / y.lengths),
    }
    report: dict[str, Any] = {
        "prompts": len(prompts),
        "pairs_per_prompt": len(pairs),
        "preference_temperature": temperature,
    }
    report |= {name: asdict(figure) for name, figure in figures.items()}
    instances = [
        {
            "prompt": prompt,
            "pm_divergence": divergence[i].item(),
            "responses": [
                {
                    "text": y.texts[i],
                    "logp": y.logp[i].item(),
                    "ref_logp": y.ref_logp[i].item(),
                    "reward": y.rewards[i].item(),
                    "length": int(y.lengths[i]),
                    "ended": bool(y.ended[i]),
                }
                for y in responses
            ],
        }
        for i, prompt in enumerate(prompts)
    ]
    return report, instances


def respond(
    models: Models,
    held_out: HeldOut,
    config: EvaluationConfig,
    draw: int,
    blocks: Blocks | None = None,
) -> Responses:
    """One seeded response to every prompt, the work divided over the ranks.

    Prompts of one length come together, since the shorter ones of a batch are padded.
    """
    order = sorted(range(len(held_out.prompts)), key=lambda row: len(held_out.prompt_ids[row]))

    def measure(places: list[int]) -> list[tuple[Any, ...]]:
        rows = [order[place] for place in places]
        rollout = sample(
            models.policy,
            models.tokenizer,
            [list(held_out.prompt_ids[row]) for row in rows],
            [held_out.prompts[row] for row in rows],
            [(config.seed, EVALUATION, row, draw) for row in rows],
            config.sampling,
        )
        logp, ref_logp = (
            sequence_logps(models.policy, rollout, config),
            sequence_logps(models.reference, rollout, config),
        )
        columns = (logp, ref_logp, models.reward(rollout), rollout.lengths, rollout.ended)
        return list(zip(rollout.responses, *(column.tolist() for column in columns), strict=True))

    measured = over_ranks(
        len(order), config.sampling.rollout_batch_size, measure, f"draw {draw + 1}", blocks
    )
    rows = [row for _, row in sorted(zip(order, measured, strict=True), key=lambda pair: pair[0])]
    texts, *columns = zip(*rows, strict=True)
    return Responses(list(texts), *(torch.tensor(column).double() for column in columns))


def over_ranks(
    count: int,
    batch_size: int,
    measure: Callable[[list[int]], list[Any]],
    name: str,
    blocks: Blocks | None = None,
) -> list[Any]:
    """`measure` of 0 … count − 1 in batches, divided over the ranks; all ranks get all results.

    Every rank makes the same calls with the same number of rows, so that collectives inside are
    reached by all; what a rank measures only to keep step is left out. Results are JSON.
    """
    processes, results = ranks.world_size(), []
    bar = tqdm(total=count, desc=name, disable=ranks.rank() != 0, leave=False, mininterval=1.0)
    for first in range(0, count, batch_size * processes):
        done = blocks.get(f"{name}:{first}") if blocks else None
        if done is None:
            size = min(batch_size, count - first)
            start = first + ranks.rank() * size
            end = min(count, first + size * processes)
            rows = [row for row in range(start, start + size) if row < end]
            measured = measure(rows + [0] * (size - len(rows)))
            done = ranks.gather_objects(measured[: len(rows)])
            if blocks:
                blocks.put(f"{name}:{first}", done)
        results += done
        bar.update(len(done))
    bar.close()
    return results


@torch.no_grad()
def sequence_logps(model: Model, rollout: Rollout, config: EvaluationConfig) -> Tensor:
    """[B] float64 log-probability of each whole response."""
    size = config.per_device_eval_batch_size
    parts = []
    for first in range(0, len(rollout), size):
        rows = rollout.rows(first, first + size)
        parts.append(
            model(rows.input_ids, rows.attention_mask, rows.scored_mask)[0].double().sum(-1)
        )
    return torch.cat(parts)


@torch.no_grad()
def token_logps(model: Model, rollout: Rollout) -> Tensor:
    """[B, R] float64 log-probability of each response token."""
    logp, _ = model(rollout.input_ids, rollout.attention_mask, rollout.scored_mask)
    return rollout.response_part(logp).double().cpu()


def held_out_perplexity(
    models: Models, held_out: HeldOut, config: EvaluationConfig, blocks: Blocks | None = None
) -> dict[str, float]:
    """Perplexity per token of people's own texts under policy and reference."""

    def measure(rows: list[int]) -> list[tuple[float, float, int]]:
        texts = [held_out.texts[row] for row in rows]
        rollout = assemble(
            [list(prompt) for prompt, _ in texts],
            [list(response) for _, response in texts],
            [""] * len(texts),
            models.tokenizer,
            ranks.device(),
        )
        columns = (
            sequence_logps(models.policy, rollout, config),
            sequence_logps(models.reference, rollout, config),
            rollout.lengths,
        )
        return list(zip(*(column.tolist() for column in columns), strict=True))

    size = config.per_device_eval_batch_size
    rows = over_ranks(len(held_out.texts), size, measure, "held-out texts", blocks)
    logp, ref_logp, lengths = (torch.tensor(column).double() for column in zip(*rows, strict=True))
    return {
        "texts": len(rows),
        "perplexity": text_perplexity(logp, lengths),
        "perplexity_ci95": text_perplexity_ci95(logp, lengths),
        "reference_perplexity": text_perplexity(ref_logp, lengths),
        "reference_perplexity_ci95": text_perplexity_ci95(ref_logp, lengths),
    }


def exact_metrics(
    models: Models,
    sets: list[FiniteSet],
    regularizer: Regularizer | None,
    temperature: float,
    config: EvaluationConfig,
    blocks: Blocks | None = None,
) -> dict[str, Any]:
    """Distances between whole distributions on finite response sets, means over prompts.

    Distances are between distributions conditional on the set; `outside_mass` is the policy's
    probability of everything else.
    """

    def measure(rows: list[int]) -> list[dict[str, Any]]:
        return [measure_set(models, sets[row], regularizer, temperature) for row in rows]

    per_prompt = over_ranks(len(sets), 1, measure, "response sets", blocks)
    report: dict[str, Any] = {"prompts": len(per_prompt)}
    for name in EXACT_FIGURES:
        values = [entry[name] for entry in per_prompt if entry.get(name) is not None]
        report[name] = asdict(estimate(torch.tensor(values))) if values else None
    return report | {"per_prompt": per_prompt}


EXACT_FIGURES = (
    "tv_to_reward",
    "tv_to_population",
    "tv_to_optimum",
    "kl_to_reward",
    "kl_to_population",
    "kl_to_optimum",
    "outside_mass",
)


def measure_set(
    models: Models, finite: FiniteSet, regularizer: Regularizer | None, temperature: float
) -> dict[str, Any]:
    """Everything exact about one prompt."""
    count = len(finite.responses)
    rollout = assemble(
        encode_prompt_texts([finite.prompt], models.tokenizer) * count,
        encode_responses(list(finite.responses), models.tokenizer),
        [finite.prompt] * count,
        models.tokenizer,
        ranks.device(),
    )
    logp = token_logps(models.policy, rollout).sum(-1)
    ref_logp = token_logps(models.reference, rollout)
    rewards = models.reward(rollout).double().cpu()
    policy = logp.log_softmax(0)
    targets = {"reward": (rewards / temperature).log_softmax(0)}
    if finite.population is not None:
        targets["population"] = torch.tensor(finite.population).double().log()
    best = optimum_on(rollout, rewards, ref_logp, regularizer)
    if best is not None:
        targets["optimum"] = best
    entry: dict[str, Any] = {
        "prompt": finite.prompt,
        "topic": finite.topic,
        "responses": list(finite.responses),
        "outside_mass": max(0.0, 1.0 - logp.exp().sum().item()),
        "policy": policy.exp().tolist(),
        "reference": ref_logp.sum(-1).log_softmax(0).exp().tolist(),
        "rewards": rewards.tolist(),
    }
    for name, target in targets.items():
        entry[name] = target.exp().tolist()
        entry[f"tv_to_{name}"] = total_variation(policy, target).item()
        entry[f"kl_to_{name}"] = kl_divergence(policy, target).item()
    return entry


def optimum_on(
    rollout: Rollout, rewards: Tensor, ref_logp: Tensor, regularizer: Regularizer | None
) -> Tensor | None:
    """log π* on the set, or None where there is no regularizer or it has no optimum there."""
    if regularizer is None:
        return None
    tokens = rollout.input_ids[:, rollout.prompt_length :].cpu()
    responses = ResponseSet(tokens, ref_logp, rollout.response_mask.cpu(), rewards)
    try:
        return optimum(regularizer, responses)
    except NoOptimumError:
        return None


def write_evaluation(
    report: dict[str, Any], instances: list[dict[str, Any]], directory: Path
) -> None:
    """`evaluation.json` and `instances.jsonl`, by rank 0."""
    if ranks.rank() == 0:
        (directory / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in instances)
        (directory / "instances.jsonl").write_text(lines, encoding="utf-8")
    ranks.barrier()


def summary(report: dict[str, Any]) -> str:
    """The headline figures, one line each."""
    lines = [
        f"  {name + ':':<24}{report[name]['mean']:10.4f} ± {report[name]['ci95']:.4f}"
        for name in ("pm_divergence", "length", "perplexity", "entropy", "kl")
    ]
    for name in ("tv_to_reward", "tv_to_population", "tv_to_optimum", "outside_mass"):
        figure = report.get("exact", {}).get(name)
        if figure:
            lines.append(f"  {name + ':':<24}{figure['mean']:10.4f} ± {figure['ci95']:.4f}")
    return "\n".join(lines)
