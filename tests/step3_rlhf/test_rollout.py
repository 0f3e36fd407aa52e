"""Drawing responses: in proportion, whatever the batch; the record and its alignment."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from step3_rlhf.config import SamplingSettings
from step3_rlhf.generation.drawing import uniforms
from step3_rlhf.generation.with_generate import SeededSampler
from step3_rlhf.rollout import (
    Rollout,
    assemble,
    encode_prompt_texts,
    sample,
)
from training.models.policy import Policy

PAD, BOS, EOS = 3, 1, 2
CPU = torch.device("cpu")


class NumberTokenizer:
    """Ids are their own texts."""

    pad_token_id, eos_token_id = PAD, EOS

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        special = {PAD, BOS, EOS} if skip_special_tokens else set()
        return [" ".join(str(i) for i in row if i not in special) for row in rows]


# The sampler


def drawn(probabilities: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Tokens drawn at step 0 for [n] uniforms."""
    sampler = SeededSampler(points[:, None], prompt_length=4)
    scores = probabilities.log().expand(len(points), -1)
    picked = sampler(torch.zeros(len(points), 4, dtype=torch.long), scores)
    assert (picked == -torch.inf).sum(-1).eq(picked.shape[1] - 1).all()
    return picked.argmax(-1)


PROBABILITIES = torch.tensor([0.4, 0.0, 0.05, 0.3, 0.001, 0.199, 0.05])


def test_an_even_grid_is_divided_exactly_in_proportion() -> None:
    grid = (torch.arange(10_000).double() + 0.5) / 10_000
    counts = drawn(PROBABILITIES, grid).bincount(minlength=7)
    assert counts.tolist() == [4000, 0, 500, 3000, 10, 1990, 500]


def test_draws_pass_a_chi_squared_test() -> None:
    n = 20_000
    points = uniforms([(7,)], n)[0]
    counts = drawn(PROBABILITIES, points).bincount(minlength=7).double()
    possible = PROBABILITIES > 0
    expected = n * PROBABILITIES.double()[possible]
    statistic = ((counts[possible] - expected) ** 2 / expected).sum().item()
    assert statistic < 20.5  # the 0.999 quantile at 5 degrees of freedom
    assert counts[1] == 0
    tilted = n * torch.tensor([0.38, 0.05, 0.32, 0.001, 0.199, 0.05]).double()
    assert ((counts[possible] - tilted) ** 2 / tilted).sum() > 50


def test_the_ends_of_the_unit_interval() -> None:
    points = torch.tensor([0.0, 1.0 - 2.0**-53, 0.401, 0.399], dtype=torch.float64)
    probabilities = torch.tensor([0.0, 0.4, 0.6, 0.0])
    assert drawn(probabilities, points).tolist() == [1, 2, 2, 1]


def test_filtered_scores_are_never_drawn() -> None:
    scores = torch.tensor([[-torch.inf, 1.0, -torch.inf, 1.0]])
    for point in (0.0, 0.25, 0.75, 0.999999):
        sampler = SeededSampler(torch.tensor([[point]], dtype=torch.float64), prompt_length=1)
        token = sampler(torch.zeros(1, 1, dtype=torch.long), scores).argmax()
        assert token == (1 if point < 0.5 else 3)


def test_uniforms_are_a_function_of_the_seed() -> None:
    both = uniforms([(1, 0, 5), (1, 0, 6)], 4)
    assert torch.equal(both[1], uniforms([(1, 0, 6)], 4)[0])
    assert not torch.equal(both[0], both[1])
    assert torch.equal(both[:, :2], uniforms([(1, 0, 5), (1, 0, 6)], 2))  # a prefix
    assert both.dtype == torch.float64


# Sampling from a model

PROMPTS = [[1, 17, 33, 9, 40], [1, 21], [1, 8, 60], [1, 50, 51, 52, 53, 54]]
SEEDS = [(42, 0, k) for k in range(4)]


def draw(model: PreTrainedModel, rows: list[int], **settings: Any) -> Rollout:
    chosen = SamplingSettings(**{"response_length": 8, **settings})
    return sample(
        Policy(model).eval(), NumberTokenizer(), [PROMPTS[r] for r in rows], ["p"] * len(rows),
        [SEEDS[r] for r in rows], chosen,
    )  # fmt: skip


def test_a_response_does_not_depend_on_the_other_rows(any_model: PreTrainedModel) -> None:
    together = draw(any_model, [0, 1, 2, 3]).responses
    assert len(set(together)) == 4
    assert [draw(any_model, [r]).responses[0] for r in range(4)] == list(together)
    assert draw(any_model, [3, 1]).responses == (together[3], together[1])
    assert draw(any_model, [0, 1, 2, 3], rollout_batch_size=2).responses == together


def test_the_policy_that_draws_is_the_policy_that_is_scored(tiny_llama: PreTrainedModel) -> None:
    """First tokens of 4000 draws against the policy's own probabilities; T = 0.5 would fail."""
    n = 4000
    logits = tiny_llama(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].detach().double()
    expected = n * logits.softmax(-1)

    def statistic(temperature: float) -> float:
        rollout = sample(
            Policy(tiny_llama).eval(), NumberTokenizer(), [PROMPTS[0]] * n, ["p"] * n,
            [(1, k) for k in range(n)],
            SamplingSettings(response_length=1, temperature=temperature, rollout_batch_size=n),
        )  # fmt: skip
        counts = rollout.input_ids[:, -1].bincount(minlength=64).double()
        often = expected >= 5
        rest = torch.tensor([counts[~often].sum(), expected[~often].sum()])
        cells = ((counts - expected) ** 2 / expected)[often].sum()
        return (cells + (rest[0] - rest[1]) ** 2 / rest[1].clamp(min=1)).item() / int(often.sum())

    assert statistic(1.0) < 1.8  # mean 1 per degree of freedom
    assert statistic(0.5) > 10


def test_the_models_own_generation_defaults_do_not_interfere(tiny_llama: PreTrainedModel) -> None:
    plain = draw(tiny_llama, [0, 1, 2, 3]).responses
    own = GenerationConfig(repetition_penalty=9.0, suppress_tokens=[20], top_k=1, max_length=3)
    tiny_llama.generation_config = own
    assert draw(tiny_llama, [0, 1, 2, 3]).responses == plain
    assert tiny_llama.generation_config is own


def test_settings_that_narrow_the_distribution(tiny_llama: PreTrainedModel) -> None:
    greedy = draw(tiny_llama, [0], top_k=1).input_ids
    again = draw(tiny_llama, [0], top_p=1e-6).input_ids
    cold = draw(tiny_llama, [0], temperature=1e-4).input_ids
    assert torch.equal(greedy, again)
    assert torch.equal(greedy, cold)


def test_generation_leaves_the_training_mode(tiny_llama: PreTrainedModel) -> None:
    policy = Policy(tiny_llama).train()
    sample(
        policy, NumberTokenizer(), PROMPTS, ["p"] * 4, SEEDS, SamplingSettings(response_length=2)
    )
    assert policy.training


# The record


@pytest.fixture
def documented() -> Rollout:
    """Two responses, the second cut before its EOS, and what stands after EOS dropped."""
    return assemble(
        [[5, 6], [1, 5, 6]], [[7, EOS, 30], [8, 9, 4]], ["a", "b"], NumberTokenizer(), CPU
    )


def test_assembled_rollout(documented: Rollout) -> None:
    assert documented.input_ids.tolist() == [[PAD, 5, 6, 7, EOS, PAD], [1, 5, 6, 8, 9, 4]]
    assert documented.attention_mask.tolist() == [[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert documented.response_mask.tolist() == [[True, True, False], [True, True, True]]
    assert documented.scored_mask.tolist() == [
        [False, False, False, True, True, False],
        [False, False, False, True, True, True],
    ]
    assert documented.ended.tolist() == [True, False]
    assert documented.lengths.tolist() == [2, 3]
    assert documented.responses == ("7", "8 9 4")
    assert (len(documented), documented.prompt_length) == (2, 3)


def test_a_pad_that_was_drawn_is_a_token() -> None:
    rollout = assemble([[5]], [[PAD, 7, EOS]], ["a"], NumberTokenizer(), CPU)
    assert rollout.response_mask.tolist() == [[True, True, True]]
    assert rollout.attention_mask.tolist() == [[1, 1, 1, 1]]


def test_states_stand_before_tokens(documented: Rollout) -> None:
    """log π_t stands on token t; the value of the state in which t is drawn, one column before."""
    columns = torch.arange(6.0).expand(2, 6)
    assert documented.response_part(columns)[0].tolist() == [3.0, 4.0, 5.0]
    assert documented.state_part(columns)[0].tolist() == [2.0, 3.0, 4.0]
    assert documented.response_part(documented.input_ids).tolist() == [[7, EOS, PAD], [8, 9, 4]]


def test_a_value_does_not_know_the_token_that_is_drawn(
    documented: Rollout, tiny_llama: PreTrainedModel
) -> None:
    """Changing response token t changes values after t and log-probabilities from t on."""

    def seen(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            hidden = tiny_llama.model(ids, documented.attention_mask).last_hidden_state
            logp, _ = Policy(tiny_llama)(ids, documented.attention_mask, documented.scored_mask)
        return documented.state_part(hidden.sum(-1)), documented.response_part(logp)

    changed = documented.input_ids.clone()
    changed[1, 4] = 33  # response token 1
    (values, logp), (new_values, new_logp) = seen(documented.input_ids), seen(changed)
    assert (values != new_values)[1].tolist() == [False, False, True]
    assert (logp != new_logp)[1].tolist() == [False, True, True]


def test_rows_are_trimmed_to_their_longest() -> None:
    rollout = assemble(
        [[1, 5, 6, 7], [1, 5], [1, 6]], [[8, EOS], [9, EOS], [10, 11, 12]],
        ["a", "b", "c"], NumberTokenizer(), CPU,
    )  # fmt: skip
    part = rollout.rows(1, 3)
    assert part.input_ids.tolist() == [[1, 5, 9, EOS, PAD], [1, 6, 10, 11, 12]]
    assert part.response_mask.tolist() == [[True, True, False], [True, True, True]]
    assert (part.prompts, part.responses) == (("b", "c"), ("9", "10 11 12"))
    assert part.ended.tolist() == [True, False]
    short = rollout.rows(0, 2)
    assert short.input_ids.tolist() == [[1, 5, 6, 7, 8, EOS], [PAD, PAD, 1, 5, 9, EOS]]
    assert len(rollout.rows(2, 99)) == 1


def test_trimming_changes_no_log_probability(any_model: PreTrainedModel) -> None:
    rollout = draw(any_model, [0, 1, 2, 3], response_length=6)
    with torch.no_grad():
        score = Policy(any_model).eval()
        whole, _ = score(rollout.input_ids, rollout.attention_mask, rollout.scored_mask)
        for row in range(4):
            part = rollout.rows(row, row + 1)
            logp, _ = score(part.input_ids, part.attention_mask, part.scored_mask)
            expected = rollout.response_part(whole)[row, : part.response_mask.shape[1]]
            torch.testing.assert_close(part.response_part(logp)[0], expected, rtol=0, atol=1e-5)


def test_prompt_texts_are_encoded_as_in_training(world_tokenizer) -> None:
    (ids,) = encode_prompt_texts(["Please suggest a drink."], world_tokenizer)
    assert ids[0] == world_tokenizer.bos_token_id
    text = world_tokenizer.decode(ids, skip_special_tokens=True)
    assert text.strip() == "Human: Please suggest a drink.\n\nAssistant:"
