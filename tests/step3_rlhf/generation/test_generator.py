"""Both generators draw the same tokens, and say with which probability."""

import pytest
import torch
from transformers import PreTrainedModel

from step3_rlhf.config import SamplingSettings
from step3_rlhf.generation.drawing import draw, uniforms
from step3_rlhf.generation.generator import decode, generate_by_transformers, generator_of
from training.models.policy import Policy

PAD, END = 3, 2
PROMPTS = torch.tensor([[3, 3, 1, 17, 33], [1, 21, 8, 9, 10], [3, 1, 50, 51, 52]])
MASK = (PROMPTS != PAD).long()


def until_end(row: list[int]) -> list[int]:
    return row[: row.index(END) + 1] if END in row else row


@pytest.mark.parametrize(
    "changed", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}], ids=str
)
def test_the_decoder_draws_what_generate_draws(
    any_model: PreTrainedModel, changed: dict[str, float]
) -> None:
    settings = SamplingSettings(response_length=40, **changed)
    policy = Policy(any_model).eval()
    points = uniforms([(1, row) for row in range(3)], settings.response_length)
    arguments = (policy, PROMPTS, MASK, points, settings, (END,), PAD)
    ours, theirs = decode(*arguments), generate_by_transformers(*arguments)
    assert [until_end(row) for row in ours.tokens] == [until_end(row) for row in theirs.tokens]
    assert theirs.logp is None


@pytest.mark.parametrize("part", [12, 5])
def test_a_shared_prompt_gives_the_tokens_that_a_row_of_its_own_gives(
    any_model: PreTrainedModel, part: int
) -> None:
    """Four responses to each of three prompts, in batches that may end within a prompt's rows."""
    settings = SamplingSettings(response_length=20)
    policy = Policy(any_model).eval()
    ids, mask = PROMPTS.repeat_interleave(4, 0), MASK.repeat_interleave(4, 0)
    points = uniforms([(1, row) for row in range(12)], settings.response_length)

    def drawn(size: int, points: torch.Tensor) -> list[list[int]]:
        rows = zip(ids.split(size), mask.split(size), points.split(size), strict=True)
        batches = [decode(policy, *row, settings, (END,), PAD).tokens for row in rows]
        return [until_end(row) for batch in batches for row in batch]

    assert drawn(part, points) == drawn(1, points)
    assert len({tuple(row) for row in drawn(part, points)}) == 12
    assert drawn(part, points) != drawn(part, points.roll(1, dims=0))


def test_the_decoder_knows_the_probabilities_of_what_it_draws(any_model: PreTrainedModel) -> None:
    """Under the policy itself, whatever the temperature of drawing."""
    settings = SamplingSettings(response_length=12, temperature=0.5)
    policy = Policy(any_model).eval()
    points = uniforms([(1, row) for row in range(3)], settings.response_length)
    drawn = decode(policy, PROMPTS, MASK, points, settings, (END,), PAD)
    for row, prompt, mask in zip(range(3), PROMPTS, MASK.bool(), strict=True):
        response = torch.tensor(until_end(drawn.tokens[row]))
        text = torch.cat([prompt[mask], response])[None]
        scored = torch.zeros_like(text, dtype=torch.bool)
        scored[:, -len(response) :] = True
        with torch.no_grad():
            logp, _ = policy(text, torch.ones_like(text), scored)
        assert drawn.logp is not None
        found = drawn.logp[row, : len(response)]
        torch.testing.assert_close(found, logp[0, -len(response) :], rtol=0, atol=1e-5)
        assert (drawn.logp[row, len(response) :] == 0).all()


def test_a_policy_is_decoded_only_if_comparison_said_so(tiny_llama: PreTrainedModel) -> None:
    policy = Policy(tiny_llama)
    assert generator_of(policy) is generate_by_transformers
    policy.decodes = True
    assert generator_of(policy) is decode


def test_a_large_vocabulary_is_drawn_in_proportion() -> None:
    """100,000 tokens: sums of float32 alone would move the boundaries between tokens."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(100_000, generator=generator)
    boundaries = weights.double().cumsum(0) / weights.double().sum()
    tokens = torch.arange(0, 100_000, 997)
    middles = boundaries[tokens] - 0.5 * weights[tokens].double() / weights.double().sum()
    found = draw(weights.expand(len(tokens), -1), middles)
    assert torch.equal(found, tokens)
    in_float32 = weights.cumsum(0) / weights.sum()
    wrong = torch.searchsorted(in_float32, middles.float(), right=True)
    assert (wrong != tokens).any()
