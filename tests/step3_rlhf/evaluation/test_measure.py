"""Sampled figures by hand, exact figures on finite sets by the models' own logits."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

from step3_rlhf.classes.shares import class_shares
from step3_rlhf.config import EvaluationConfig, PPOConfig, RewardSettings
from step3_rlhf.evaluation import shared_work as module
from step3_rlhf.evaluation.__main__ import main
from step3_rlhf.evaluation.exact import EXACT_FIGURES, measure_set
from step3_rlhf.evaluation.held_out import HeldOut
from step3_rlhf.evaluation.measure import evaluate, summary, write_evaluation
from step3_rlhf.evaluation.metrics import pm_divergence
from step3_rlhf.evaluation.responses import Responses, under_one_reward
from step3_rlhf.evaluation.sampled import held_out_perplexity, respond, sampled_metrics
from step3_rlhf.evaluation.scoring import Models
from step3_rlhf.evaluation.settings import run_settings
from step3_rlhf.evaluation.shared_work import over_ranks
from step3_rlhf.prompts import EVALUATION
from step3_rlhf.regularizers.registry import parse_regularizer
from step3_rlhf.response_sets import FiniteSet, read_response_sets
from step3_rlhf.rewards.functions import FunctionReward
from step3_rlhf.rewards.sources import ByGroup
from step3_rlhf.rollout import encode_prompt_texts, sample
from training.config import check_config
from training.data import encode_responses
from training.errors import UserError
from training.models.loading import load_policy
from training.models.policy import Policy
from training.models.pretrained import Pretrained


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Sampled


def test_sampled_metrics_by_hand() -> None:
    first = Responses(
        ["a", "b"], tensor(-1.0, -2.0), tensor(-2.0, -2.0), tensor(1.0, 0.0), tensor(2, 1),
        tensor(1, 0),
    )  # fmt: skip
    second = Responses(
        ["c", "d"], tensor(-3.0, -2.0), tensor(-3.0, -4.0), tensor(1.0, 2.0), tensor(3, 1),
        tensor(1, 1),
    )  # fmt: skip
    figures, instances = sampled_metrics(["x", "y"], [first, second], [second, first], 2.0)

    def kl(p: float, q: float) -> float:
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    divergences = [kl(sigmoid(2.0), 0.5), kl(0.5, sigmoid(-1.0))]
    assert figures["prompts"] == 2
    assert figures["preference_temperature"] == 2.0
    means = {name: value["mean"] for name, value in figures.items() if isinstance(value, dict)}
    assert means == pytest.approx(
        {
            "pm_divergence": sum(divergences) / 2,
            "pm_divergence_unequal": sum(divergences) / 2,
            "pm_divergence_reference": sum(divergences) / 2,  # the same pairs, the other way round
            "equal_pairs": 0.0,
            "reward": 1.0,
            "length": 1.75,
            "ended_fraction": 0.75,
            "perplexity": (math.exp(0.5) + math.exp(1.0) + 2 * math.exp(2.0)) / 4,
            "reference_perplexity": (2 * math.e + math.exp(2.0) + math.exp(4.0)) / 4,
            "entropy": 2.0,
            "entropy_per_token": (0.5 + 1.0 + 2.0 + 2.0) / 4,
            "kl": (1.0 + 0.0 + 0.0 + 2.0) / 4,
            "kl_per_token": (0.5 + 0.0 + 0.0 + 2.0) / 4,
            "pm_squared_difference": ((sigmoid(2.0) - 0.5) ** 2 + (0.5 - sigmoid(-1.0)) ** 2) / 2,
            "perplexity_pooled": math.exp(8.0 / 7),  # 8 nats on 7 tokens
            "reference_perplexity_pooled": math.exp(11.0 / 7),
        }
    )
    # Intervals are over prompts: two means per figure, t(1) · |a − b| / √2 / √2.
    assert figures["entropy"]["ci95"] == pytest.approx(0.0)
    assert figures["length"]["ci95"] == pytest.approx(12.7062047 * 1.5 / 2)
    assert (figures["clusters"], "groups" in figures["estimand"]) == (2, True)
    # Two phrasings of one question are one observation, which has no interval.
    together, _ = sampled_metrics(
        ["x", "y"], [first, second], [second, first], 2.0, groups=["question", "question"]
    )
    assert together["length"] == figures["length"] | {
        "ci95": None, "low": None, "high": None, "clusters": 1,
    }  # fmt: skip
    assert [entry["pm_divergence"] for entry in instances] == pytest.approx(divergences)
    assert instances[1]["prompt"] == "y"
    assert instances[1]["responses"][1] == {
        "text": "d", "logp": -2.0, "ref_logp": -4.0, "reward": 2.0, "length": 1, "ended": True,
    }  # fmt: skip


def test_sums_over_the_whole_vocabulary(models: Models, held_out: HeldOut, config) -> None:
    """Entropy and KL of every next-token distribution, from the models' own logits."""
    drawn = respond(models, held_out, config, draw=0)
    for row, prompt in enumerate(PROMPTS):
        ids = encode_prompt_texts([prompt], models.tokenizer)[0]
        rollout = sample(
            models.policy, models.tokenizer, [ids], [prompt], [(config.seed, EVALUATION, row, 0)],
            config.sampling,
        )  # fmt: skip
        whole = rollout.input_ids[rollout.attention_mask.bool()][None]
        length = int(rollout.lengths[0])
        assert length == drawn.lengths[row]
        p, q = (
            model.model(input_ids=whole).logits[0, -length - 1 : -1].double().log_softmax(-1)
            for model in (models.policy, models.reference)
        )
        assert drawn.full_entropy is not None
        assert drawn.full_kl is not None
        entropy = -(p.exp() * p).sum().item()
        assert drawn.full_entropy[row].item() == pytest.approx(entropy, rel=1e-4)
        kl = (p.exp() * (p - q)).sum().item()
        assert drawn.full_kl[row].item() == pytest.approx(kl, rel=1e-4)
        of_the_drawn_tokens = -drawn.logp[row].item()  # a wrong variant: one token of each
        assert of_the_drawn_tokens != pytest.approx(entropy, rel=1e-2)


def test_several_pairs_are_averaged_within_a_prompt() -> None:
    """A prompt's divergence is the mean over its pairs; an interval still counts prompts."""

    def drawn(*logp: float) -> Responses:
        zeros = torch.zeros(2, dtype=torch.float64)
        return Responses(["", ""], tensor(*logp), zeros, zeros, zeros + 1, zeros)

    draws = [drawn(-1.0, -1.0), drawn(-2.0, -1.0), drawn(-4.0, -1.0), drawn(-1.0, -3.0)]
    single = [sampled_metrics(["x", "y"], draws[k : k + 2], draws[:2], 1.0)[0] for k in (0, 2)]
    figures, instances = sampled_metrics(["x", "y"], draws, draws, 1.0)
    assert [[y["logp"] for y in entry["responses"]] for entry in instances] == [
        [-1.0, -2.0, -4.0, -1.0], [-1.0, -1.0, -1.0, -3.0],
    ]  # fmt: skip
    expected = sum(part["pm_divergence"]["mean"] for part in single) / 2
    assert figures["pm_divergence"]["mean"] == pytest.approx(expected)
    assert (figures["pairs_per_prompt"], figures["pm_divergence"]["count"]) == (2, 2)
    assert figures["entropy"]["mean"] == pytest.approx((8.0 + 6.0) / 8)


@pytest.mark.parametrize("count", [1, 4, 7])
def test_work_is_divided_over_the_ranks_and_joined_in_order(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank makes as many calls; what is measured to keep step does not count."""
    calls: list[list[list[int]]] = []
    contributed: list[list[list[int]]] = []
    for rank in range(3):
        calls.append([])
        contributed.append([])
        monkeypatch.setattr(module.ranks, "world_size", lambda: 3)
        monkeypatch.setattr(module.ranks, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(
            module.ranks, "gather_objects", lambda own, k=rank: contributed[k].append(own) or []
        )
        over_ranks(count, 2, lambda rows, k=rank: calls[k].append(rows) or rows, "rows")
    # As many calls on every rank, with as many rows: forwards inside are collectives under ZeRO-3.
    assert len({tuple(len(rows) for rows in made) for made in calls}) == 1
    joined = [row for round_ in zip(*contributed, strict=True) for part in round_ for row in part]
    assert joined == list(range(count))


# What collapse passes, and what it does not


def test_only_the_papers_figure_passes_a_collapsed_policy() -> None:
    """Population (.5, .3, .2), 99.9 % on the least liked: TV .80, PM divergence .002."""
    population, policy = tensor(0.5, 0.3, 0.2), tensor(0.0005, 0.0005, 0.999)
    assert 0.5 * (policy - population).abs().sum().item() == pytest.approx(0.799, abs=1e-12)
    rewards, generator = population.log(), torch.Generator().manual_seed(0)

    def draws(shares: torch.Tensor, logp: torch.Tensor) -> list[Responses]:
        rows = torch.multinomial(shares, 40_000, replacement=True, generator=generator)
        return [
            Responses(
                ["abc"[k] for k in half.tolist()], logp[half], population.log()[half],
                rewards[half], torch.ones_like(half), torch.ones_like(half),
                natural=(half < 2).double(),
            )
            for half in rows.chunk(2)
        ]  # fmt: skip

    prompts = [""] * 20_000

    def figures(shares: torch.Tensor) -> dict[str, float]:
        logp = shares.log()
        found, _ = sampled_metrics(prompts, draws(shares, logp), draws(population, logp), 1.0)
        return {name: value["mean"] for name, value in found.items() if isinstance(value, dict)}

    # The exact means over all pairs, by the matrix of instance divergences.
    def exact(shares: torch.Tensor, pairs: torch.Tensor, unequal: bool) -> float:
        first, second = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
        divergence = pm_divergence(
            shares.log()[first], shares.log()[second], rewards[first], rewards[second], 1.0
        )
        weights = pairs[first] * pairs[second] * ((first != second) if unequal else 1)
        return ((weights * divergence).sum() / weights.sum()).item()

    collapsed = figures(policy)
    assert exact(policy, policy, unequal=False) == pytest.approx(0.0022, abs=5e-5)  # it passes
    assert exact(policy, policy, unequal=True) == pytest.approx(1.0796, abs=5e-4)
    assert exact(policy, population, unequal=True) == pytest.approx(0.5947, abs=5e-4)
    assert collapsed["pm_divergence"] < 0.004
    assert collapsed["pm_divergence_unequal"] == pytest.approx(1.0796, abs=0.05)
    assert collapsed["pm_divergence_reference"] == pytest.approx(0.5947, abs=0.02)
    assert collapsed["equal_pairs"] == pytest.approx(0.999**2, abs=1e-3)
    assert collapsed["natural_mass"] == pytest.approx(0.001, abs=5e-4)
    matching = figures(population)
    for name in ("pm_divergence", "pm_divergence_unequal", "pm_divergence_reference"):
        assert matching[name] == pytest.approx(0.0, abs=1e-12)
    assert matching["equal_pairs"] == pytest.approx(0.38, abs=0.01)


def test_no_unequal_pair_has_no_mean() -> None:
    same = Responses(["a"], tensor(-1.0), tensor(-1.0), tensor(0.0), tensor(1), tensor(1))
    found, _ = sampled_metrics(["x"], [same, same], [same, same], 1.0)
    assert found["pm_divergence"]["mean"] == 0.0
    assert found["pm_divergence_unequal"] is None
    assert found["pm_divergence_reference"] is None
    assert found["equal_pairs"]["mean"] == 1.0
    assert found["natural_mass"] is None
    # The same text, cut and ended: two responses.
    cut = replace(same, lengths=tensor(2))
    found, _ = sampled_metrics(["x"], [same, cut], [same, same], 1.0)
    assert found["equal_pairs"]["mean"] == 0.0


# With models


PROMPTS = ("Please suggest a drink.", "What is a good pet?")


@pytest.fixture
def config(stage_settings, tmp_path: Path) -> EvaluationConfig:
    settings = stage_settings("ppo") | {"reward": {"function": "operator:add"}, "bf16": False}
    return EvaluationConfig.of(check_config(PPOConfig, settings, "config:"))


@pytest.fixture
def models(tiny_world: Path, world_tokenizer) -> Models:
    """Policy and reference with different weights; rewards are the lengths of the texts."""

    def policy(seed: int) -> Policy:
        loaded = load_policy(Pretrained(str(tiny_world / "base")), world_tokenizer).eval()
        torch.manual_seed(seed)
        torch.nn.init.normal_(loaded.model.lm_head.weight, std=0.3)
        return loaded.requires_grad_(False)

    reward = FunctionReward(lambda prompts, texts: [len(text) / 10 for text in texts], "m:f")
    return Models(policy(1), policy(2), reward, world_tokenizer)


def own_logp(policy: Policy, tokenizer: Any, prompt: str, response: str) -> float:
    """log π(y|x), EOS included, from the Hugging Face model's logits without padding."""
    (start,) = encode_prompt_texts([prompt], tokenizer)
    (rest,) = encode_responses([response], tokenizer)
    logits = policy.model(input_ids=torch.tensor([start + rest])).logits[0].double()
    steps = logits[len(start) - 1 : -1].log_softmax(-1)
    return steps.gather(1, torch.tensor(rest)[:, None]).sum().item()


@pytest.fixture
def held_out(world_tokenizer) -> HeldOut:
    ids = encode_prompt_texts(PROMPTS, world_tokenizer)
    return HeldOut(ids, list(PROMPTS), [], [])


def test_responses_are_what_the_models_say_of_them(models: Models, held_out, config) -> None:
    found = respond(models, held_out, config, draw=0)
    assert found.rewards.tolist() == pytest.approx([len(text) / 10 for text in found.texts])
    again = respond(models, held_out, config, draw=0)
    other = respond(models, held_out, config, draw=1)
    assert again.texts == found.texts
    assert torch.equal(again.logp, found.logp)
    assert other.texts != found.texts
    single = config.model_copy(update={"rollout_batch_size": 1, "per_device_eval_batch_size": 1})
    one_by_one = respond(models, held_out, single, draw=0)
    assert one_by_one.texts == found.texts
    torch.testing.assert_close(one_by_one.logp, found.logp, rtol=0, atol=1e-4)
    assert (found.logp != found.ref_logp).all()


SET = FiniteSet(PROMPTS[0], ("tea", "coffee", "a glass of water"), (0.5, 0.3, 0.2), "drinks")


def test_exact_figures_by_the_models_own_logits(models: Models, config) -> None:
    kl = parse_regularizer({"name": "kl", "beta": 0.5})
    found = measure_set(models, SET, kl, 0.5, config)
    logp, ref_logp = (
        tensor(*(own_logp(m, models.tokenizer, SET.prompt, r) for r in SET.responses))
        for m in (models.policy, models.reference)
    )
    rewards = tensor(0.3, 0.6, 1.6)
    policy = logp.softmax(0)
    assert found["policy"] == pytest.approx(policy.tolist(), abs=1e-6)
    assert found["reference"] == pytest.approx(ref_logp.softmax(0).tolist(), abs=1e-6)
    assert found["outside_mass"] == pytest.approx(1 - logp.exp().sum().item(), abs=1e-9)
    assert (found["topic"], found["rewards"]) == ("drinks", pytest.approx(rewards.tolist()))
    targets = {
        "reward": (rewards / 0.5).softmax(0),
        "population": tensor(0.5, 0.3, 0.2),
        "optimum": (ref_logp + rewards / 0.5).softmax(0),  # (5.1)
    }
    for name, target in targets.items():
        assert found[name] == pytest.approx(target.tolist(), abs=1e-6)
        expected = (policy - target).abs().sum().item() / 2
        assert found[f"tv_to_{name}"] == pytest.approx(expected, abs=1e-6)
        expected = (policy * (policy / target).log()).sum().item()
        assert found[f"kl_to_{name}"] == pytest.approx(expected, abs=1e-5)


# Several groups


def of_two_groups(models: Models, config: EvaluationConfig) -> tuple[Models, EvaluationConfig]:
    """One group likes long texts; the other, of three quarters of the people, short ones."""
    like = FunctionReward(lambda prompts, texts: [len(text) / 10 for text in texts], "m:f")
    dislike = FunctionReward(lambda prompts, texts: [-len(text) / 5 for text in texts], "m:g")
    groups = [
        {"model_name_or_path": "owner/like", "share": 0.25},
        {"model_name_or_path": "owner/dislike", "share": 0.75},
    ]
    settings = RewardSettings.model_validate({"mixture": groups})
    own = Models(models.policy, models.reference, ByGroup([like, dislike]), models.tokenizer)
    return own, config.model_copy(update={"reward": settings})


def test_the_exact_target_of_a_mixture_is_the_mixture(models: Models, config) -> None:
    own, mixed = of_two_groups(models, config)
    kl = parse_regularizer({"name": "kl", "beta": 0.5})
    found = measure_set(own, SET, kl, 0.5, mixed)
    ref_logp = tensor(
        *(own_logp(models.reference, models.tokenizer, SET.prompt, r) for r in SET.responses)
    )
    groups = [tensor(0.3, 0.6, 1.6), tensor(-0.6, -1.2, -3.2)]
    reward = 0.25 * (groups[0] / 0.5).softmax(0) + 0.75 * (groups[1] / 0.5).softmax(0)
    optimum = sum(
        share * (ref_logp + rewards / 0.5).softmax(0)
        for share, rewards in zip((0.25, 0.75), groups, strict=True)
    )
    assert found["reward"] == pytest.approx(reward.tolist(), abs=1e-6)
    assert found["optimum"] == pytest.approx(optimum.tolist(), abs=1e-6)
    policy = tensor(*found["policy"])
    for name, target in (("reward", reward), ("optimum", optimum)):
        expected = (policy - target).abs().sum().item() / 2
        assert found[f"tv_to_{name}"] == pytest.approx(expected, abs=1e-6)
    assert found["group_rewards"] == [pytest.approx(rewards.tolist()) for rewards in groups]
    assert (tensor(*found["rewards"]) / 0.5).softmax(0).tolist() == pytest.approx(found["reward"])
    # The weighted sum of the rewards has another target.
    pooled = ((0.25 * groups[0] + 0.75 * groups[1]) / 0.5).softmax(0)
    assert (pooled - reward).abs().sum() > 0.1


def test_draws_under_a_mixture_by_hand() -> None:
    """β = 2, two draws: Z_k of the policy's own is that of the other one; of others, of both."""

    def draw(logp: float, rewards: list[float], credit: list[float] | None) -> Responses:
        one = tensor(1.0)
        return Responses(
            ["a"], tensor(logp), tensor(-1.0), tensor(*rewards)[None], one, one,
            None if credit is None else tensor(*credit)[None],
        )  # fmt: skip

    own = [draw(-1.0, [2.0, 0.0], [5.0, 3.0]), draw(-2.0, [0.0, 4.0], [1.0, 5.0])]
    reference = [draw(-0.5, [1.0, 1.0], None)]
    shares = (0.25, 0.75)

    def reward(rewards: list[float], z: list[float]) -> float:
        level = math.exp(sum(share * math.log(part) for share, part in zip(shares, z, strict=True)))
        terms = (
            share * math.exp(r / 2) * level / part
            for share, r, part in zip(shares, rewards, z, strict=True)
        )
        return 2 * math.log(sum(terms))

    z = [[math.exp(2.5), math.exp(1.5)], [math.exp(0.5), math.exp(2.5)]]
    both = [z[0][k] + z[1][k] for k in (0, 1)]
    found, others = under_one_reward(own, reference, shares, 2.0)
    expected = [reward([2.0, 0.0], z[1]), reward([0.0, 4.0], z[0])]
    assert [y.rewards.item() for y in found] == pytest.approx(expected, abs=1e-12)
    # The distance from the optimum is told from the credits of each group.
    assert [y.credit.tolist() for y in found] == [[[5.0, 3.0]], [[1.0, 5.0]]]
    assert others[0].rewards.item() == pytest.approx(reward([1.0, 1.0], both), abs=1e-12)
    # Without a regularizer w is 1: e^{a/β} = e^{r/β}/π.
    bare = [replace(y, credit=None) for y in own]
    z = [[math.exp(1.0 + 1.0), math.exp(1.0)], [math.exp(2.0), math.exp(2.0 + 2.0)]]
    expected = [reward([2.0, 0.0], z[1]), reward([0.0, 4.0], z[0])]
    found, _ = under_one_reward(bare, bare, shares, 2.0)
    assert [y.rewards.item() for y in found] == pytest.approx(expected, abs=1e-12)


def test_the_whole_evaluation_of_a_mixture(models: Models, held_out: HeldOut, config) -> None:
    own, mixed = of_two_groups(models, config)
    for regularizer in (parse_regularizer({"name": "kl", "beta": 0.5}), None):
        figures, instances = evaluate(own, replace(held_out, sets=[SET]), regularizer, mixed)
        assert math.isfinite(figures["reward"]["mean"])
        assert (figures["optimum_gap"] is None) == (regularizer is None)
        assert all(math.isfinite(y["reward"]) for entry in instances for y in entry["responses"])
        assert figures["exact"]["tv_to_reward"]["mean"] > 0


def test_pms_optimum_is_the_rewards_softmax_and_kls_at_constant_reward_the_reference(
    models: Models, config
) -> None:
    pm = measure_set(models, SET, parse_regularizer({"name": "pm"}), 1.0, config)
    assert pm["tv_to_optimum"] == pytest.approx(pm["tv_to_reward"], abs=1e-9)
    constant = FunctionReward(lambda prompts, texts: [2.0] * len(texts), "m:f")
    same = Models(models.policy, models.policy, constant, models.tokenizer)
    kl = measure_set(same, SET, parse_regularizer({"name": "kl"}), 1.0, config)
    assert kl["tv_to_optimum"] == pytest.approx(0.0, abs=1e-9)
    assert kl["reward"] == pytest.approx([1 / 3] * 3)
    nothing = measure_set(models, SET, None, 1.0, config)
    assert "tv_to_optimum" not in nothing
    unknown = FiniteSet(SET.prompt, SET.responses, None, None)
    assert "tv_to_population" not in measure_set(models, unknown, None, 1.0, config)


def test_perplexity_of_held_out_text_is_per_token(models: Models, held_out, config) -> None:
    texts = [(PROMPTS[0], "tea"), (PROMPTS[1], "a cat, or perhaps two of them")]
    ids = [
        (encode_prompt_texts([p], models.tokenizer)[0], encode_responses([r], models.tokenizer)[0])
        for p, r in texts
    ]
    found = held_out_perplexity(models, HeldOut([], [], ids, []), config)
    tokens = sum(len(response) for _, response in ids)
    for name, model in (
        ("perplexity", models.policy), ("reference_perplexity", models.reference),
    ):  # fmt: skip
        total = sum(own_logp(model, models.tokenizer, p, r) for p, r in texts)
        assert found[name] == pytest.approx(math.exp(-total / tokens), rel=1e-4)
    assert (found["texts"], found["clusters"]) == (2, 2)
    assert 1 < found["perplexity_low"] < found["perplexity"] < found["perplexity_high"]
    one = held_out_perplexity(models, HeldOut([], [], ids[:1], []), config)
    assert one["perplexity_ci95"] is one["perplexity_low"] is None  # not 0


def test_the_whole_evaluation(models: Models, held_out: HeldOut, config, tmp_path: Path) -> None:
    data = HeldOut(held_out.prompt_ids, held_out.prompts, [], [SET])  # a single set
    pm = parse_regularizer({"name": "pm", "beta": 2.0})
    figures, instances = evaluate(models, data, pm, config)
    assert figures["preference_temperature"] == 2.0
    assert set(EXACT_FIGURES) <= figures["exact"].keys()
    (entry,) = figures["exact"]["per_prompt"]
    assert figures["exact"]["tv_to_reward"]["mean"] == pytest.approx(entry["tv_to_reward"])
    write_evaluation(figures, instances, tmp_path)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["pm_divergence"]["mean"] == figures["pm_divergence"]["mean"]
    lines = (tmp_path / "instances.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == list(PROMPTS)
    assert written["split"] == "test"
    assert written["exact"]["tv_to_reward"]["ci95"] is None
    assert "tv_to_optimum" in summary(figures)


def test_no_file_holds_a_number_that_is_none(tmp_path: Path) -> None:
    """json.loads would read NaN and Infinity; jq, browsers and other languages do not."""
    write_evaluation({"kl": math.inf, "a": [1.0, math.nan]}, [{"logp": -math.inf}], tmp_path)
    assert (tmp_path / "evaluation.json").read_text().split() == (
        '{ "kl": null, "a": [ 1.0, null ] }'.split()
    )
    assert (tmp_path / "instances.jsonl").read_text() == '{"logp": null}\n'


def test_the_natural_mass_is_that_of_the_references_natural_responses(
    models: Models, held_out: HeldOut, config
) -> None:
    """Token level: every token at α or above; exactly on a set, as a share of draws elsewhere."""

    def smallest(prompt: str, response: str) -> float:
        (start,) = encode_prompt_texts([prompt], models.tokenizer)
        (rest,) = encode_responses([response], models.tokenizer)
        logits = models.reference.model(input_ids=torch.tensor([start + rest])).logits[0].double()
        steps = logits[len(start) - 1 : -1].log_softmax(-1)
        return steps.gather(1, torch.tensor(rest)[:, None]).min().exp().item()

    least = sorted((smallest(SET.prompt, text), text) for text in SET.responses)
    alpha = (least[0][0] + least[1][0]) / 2  # all but one are natural
    regularizer = parse_regularizer({"name": "conditional_pm", "alpha": alpha})
    found = measure_set(models, SET, regularizer, 1.0, config)
    natural = [text != least[0][1] for text in SET.responses]
    assert found["natural"] == natural
    expected = sum(
        math.exp(own_logp(models.policy, models.tokenizer, SET.prompt, text))
        for text, inside in zip(SET.responses, natural, strict=True)
        if inside
    )
    assert found["natural_mass"] == pytest.approx(expected, rel=1e-4)
    assert "natural_mass" not in measure_set(models, SET, None, 1.0, config)

    for alpha, mass in ((0.0, 1.0), (1.1, 0.0)):
        regularizer = parse_regularizer({"name": "conditional_pm", "alpha": alpha})
        drawn = respond(models, held_out, config, 0, regularizer=regularizer)
        assert drawn.natural.mean() == mass
    assert respond(models, held_out, config, 0).natural is None


def test_a_generalized_choice_is_a_target_of_its_own(models: Models, config) -> None:
    """g/Σg, for the printed Theorem 3 as well as for Luce, whose optimum it is."""
    rewards = tensor(0.3, 0.6, 1.6)  # a tenth of the texts' lengths
    choice = (1.0 + rewards.exp()).log() / (1.0 + rewards.exp()).log().sum()
    for target, same in (("shifted", False), ("luce", True)):
        regularizer = {"name": "generalized_pl", "g": "softplus", "target": target}
        found = measure_set(models, SET, parse_regularizer(regularizer), 1.0, config)
        assert found["choice"] == pytest.approx(choice.tolist(), abs=1e-6)
        distance = (tensor(*found["policy"]) - choice).abs().sum().item() / 2
        assert found["tv_to_choice"] == pytest.approx(distance, abs=1e-6)
        optimal = found["optimum"] == pytest.approx(choice.tolist(), abs=1e-6)
        assert optimal == same
        assert found["reward"] == pytest.approx(rewards.softmax(0).tolist(), abs=1e-6)
    assert "choice" not in measure_set(models, SET, parse_regularizer({"name": "pm"}), 1.0, config)


def test_opinions_in_place_of_strings(models: Models, held_out, config, tmp_path: Path) -> None:
    """Two of the three answers are one opinion, to which the reference also gives a fourth one."""
    classes = {"hot": ["tea", "coffee", "cocoa"], "cold": ["a glass of water"]}
    key = tmp_path / "key.jsonl"
    key.write_text(json.dumps({"prompt": SET.prompt, "classes": classes}) + "\n")
    settings = {"name": "conditional_pm", "level": "class", "classes": {"answer_key": str(key)}}
    regularizer = parse_regularizer(settings)
    shares = class_shares(regularizer, models.reference, models.tokenizer, config)
    found = measure_set(replace(models, classes=shares), SET, regularizer, 1.0, config)
    hot = tensor(
        *(own_logp(models.reference, models.tokenizer, SET.prompt, y) for y in classes["hot"])
    )
    weights = torch.cat([(hot[:2] - hot.logsumexp(0)).exp(), tensor(1.0)])
    wanted = weights * tensor(0.3, 0.6, 1.6).exp()
    assert found["optimum"] == pytest.approx((wanted / wanted.sum()).tolist(), abs=1e-6)
    assert found["natural"] == [True] * 3
    # Drawn responses are outside every class: their credit is kl's, and none is natural.
    kl = parse_regularizer({"name": "kl"})
    drawn = respond(replace(models, classes=shares), held_out, config, 0, regularizer=regularizer)
    assert drawn.natural.tolist() == [0.0, 0.0]
    assert torch.equal(drawn.credit, respond(models, held_out, config, 0, regularizer=kl).credit)


def test_the_references_draws_are_scored_by_the_policy(models: Models, held_out, config) -> None:
    drawn = respond(models, held_out, config, 0, from_reference=True)
    other = replace(models, policy=models.reference, reference=models.policy)
    same = respond(other, held_out, config, 0)
    assert drawn.texts == same.texts != respond(models, held_out, config, 0).texts
    torch.testing.assert_close(drawn.logp, same.ref_logp, rtol=0, atol=1e-5)


# RUN_DIR


def test_a_run_directory_knows_its_settings(stage_settings, tmp_path: Path) -> None:
    settings = stage_settings("ppo") | {
        "regularizer": {"name": "kl", "beta": 0.5},
        "evaluation": {"sampling": {"response_length": 3, "temperature": 0.5}},
    }
    config = check_config(PPOConfig, settings, "config:")
    run = tmp_path / "run"
    (run / "actor").mkdir(parents=True)
    (run / "actor" / "config.json").write_text("{}")
    (run / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    found = check_config(EvaluationConfig, run_settings(str(run)), "config:")
    assert found.model_name_or_path == str(run / "actor")
    assert found.reference_model_name_or_path == settings["model_name_or_path"]
    assert found.output_dir == str(run)
    assert found.regularizer == config.regularizer
    assert found.sampling.response_length == 3  # as the run's own evaluation drew
    assert found.sampling == EvaluationConfig.of(config).sampling


def test_other_directories_need_overrides(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    known = run_settings(str(tmp_path))
    assert known == {
        "output_dir": str(tmp_path),
        "model_name_or_path": str(tmp_path / "model"),
    }
    assert run_settings(str(tmp_path / "new")) == {"output_dir": str(tmp_path / "new")}


# Finite sets


def test_response_sets_are_read(tiny_world: Path) -> None:
    assert read_response_sets(None) == []
    sets = read_response_sets(str(tiny_world / "response_sets.jsonl"))
    assert all(sum(s.population) == pytest.approx(1.0) for s in sets)
    assert all(len(s.population) == len(s.responses) for s in sets)


def test_every_faulty_set_is_named(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "x", "responses": ["a", "b"]}',
        "",
        '{"prompt": "x", "responses": ["a", "a"]}',
        '{"prompt": 3, "responses": ["a", "b"]}',
        '{"prompt": "x", "responses": ["a", "b"], "population": [0.5, 0.6]}',
        '{"prompt": "x", "responses": ["a", "b"], "population": [1.0]}',
        '{"prompt": "x", "responses": "ab"}',
        "{",
    ]
    file = tmp_path / "sets.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match=re.escape("6 faulty lines")) as caught:
        read_response_sets(str(file))
    numbers = [fault.removeprefix(f"{file}:").split(":")[0] for fault in caught.value.faults]
    assert numbers == ["3", "4", "5", "6", "7", "8"]


@pytest.mark.usefixtures("process_group")
def test_any_triple_can_be_evaluated(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models that no stage has trained, into a new directory; the reward has its own tokenizer."""
    reward = tmp_path / "foreign_reward"
    vocabulary = {chr(code): code - 32 for code in range(32, 127)} | {"<pad>": 95, "</s>": 96}
    own = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    own.pre_tokenizer = Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(reward)
    torch.manual_seed(3)
    GPT2ForSequenceClassification(
        GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2, num_labels=1, pad_token_id=95)
    ).save_pretrained(reward)
    monkeypatch.setattr("training.runtime.ranks.connect", lambda: None)
    monkeypatch.setattr("training.runtime.ranks.disconnect", lambda: None)
    monkeypatch.setattr("training.runtime.signals.stop_requests.install", lambda: None)
    output = tmp_path / "new" / "evaluation"
    main(
        [
            str(output),
            f"model_name_or_path={tiny_world / 'base'}",
            f"reward.model_name_or_path={reward}",
            f'data.sources=["{tiny_world / "comparisons.jsonl"}"]',
            "evaluation.max_prompts=3",
            "response_length=4",
        ]
    )
    figures = json.loads((output / "evaluation.json").read_text())
    assert figures["prompts"] == 3
    assert figures["kl"]["mean"] == 0.0  # the reference is the policy
    assert figures["reward"]["mean"] != 0.0
    assert len((output / "instances.jsonl").read_text().splitlines()) == 3
    assert not (output / "evaluation.unfinished").exists()
