"""Decoding step by step: the same logits as a forward pass over the whole text."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from training.models.decoding.cache import Columns, PreallocatedLayer
from training.models.decoding.decoder import STEPS_BETWEEN_CHECKS, Decoder, has_decoder
from training.models.decoding.few_rows import MOST_ROWS, few_rows
from training.models.policy import Policy

FAMILIES = ["gpt2", "gpt_neox", "llama", "mistral", "opt", "qwen2", "qwen3"]
STEPS = 6


def tiny(family: str, attention: str = "sdpa") -> Policy:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2}
    if family == "gpt2":
        sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    else:
        sizes |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"max_position_embeddings": 64}
    if family == "opt":
        sizes |= {"ffn_dim": 48, "word_embed_proj_dim": 32}
    if family in ("llama", "mistral", "qwen2", "qwen3"):
        sizes |= {"intermediate_size": 48, "num_key_value_heads": 2}
    if family == "mistral":
        sizes |= {"sliding_window": None}
    config = AutoConfig.for_model(family, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Policy(model).eval()


PROMPTS = torch.tensor([[3, 3, 5, 9, 21], [7, 8, 30, 40, 11], [3, 3, 3, 3, 50]])
MASK = (PROMPTS != 3).long()
GIVEN = torch.tensor([[9, 4, 33, 6, 8, 12], [5, 5, 60, 61, 62, 63], [10, 20, 30, 40, 50, 4]])

REPEATED = torch.tensor([0, 0, 1, 2, 2, 2, 0])
"""The prompt of each of seven rows; the last repeats one that is not beside it."""
GIVEN_TO_REPEATED = torch.arange(4, 4 + 7 * STEPS).view(7, STEPS) % 60 + 4


def decoded(decoder: Decoder, given: Tensor = GIVEN) -> Tensor:
    """[rows, STEPS, V] logits from which the given tokens would have been drawn."""
    seen: list[Tensor] = []

    def choose(logits: Tensor) -> Tensor:
        seen.append(logits)
        return given[:, len(seen) - 1]

    decoder.run(choose, lambda: torch.zeros(len(given)).bool())
    return torch.stack(seen, 1)


@torch.no_grad()
def expected(
    policy: Policy, prompts: Tensor = PROMPTS, mask: Tensor = MASK, given: Tensor = GIVEN
) -> Tensor:
    """The same from the model's own forward, one text without padding at a time."""
    rows = []
    for prompt, own, drawn in zip(prompts, mask.bool(), given, strict=True):
        text = torch.cat([prompt[own], drawn])
        rows.append(policy.model(input_ids=text[None]).logits[0, -STEPS - 1 : -1])
    return torch.stack(rows)


@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_of_each_step_are_those_of_the_whole_text(
    family: str, attention: str, fixed_shapes: bool
) -> None:
    policy = tiny(family, attention)
    assert has_decoder(policy)
    found = decoded(Decoder(policy, PROMPTS, MASK, STEPS, fixed_shapes=fixed_shapes))
    torch.testing.assert_close(found, expected(policy), rtol=0, atol=1e-5)
    shifted = expected(policy).roll(1, dims=1)
    assert (found - shifted).abs().max() > 0.1


@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_with_the_same_prompt_share_its_pass(
    family: str, attention: str, fixed_shapes: bool
) -> None:
    policy = tiny(family, attention)
    rows = PROMPTS[REPEATED], MASK[REPEATED]
    decoder = Decoder(policy, *rows, STEPS, fixed_shapes=fixed_shapes)
    assert torch.equal(decoder.ids, PROMPTS[[0, 1, 2, 0]])
    found = decoded(decoder, GIVEN_TO_REPEATED)
    wanted = expected(policy, *rows, GIVEN_TO_REPEATED)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    of_others = expected(policy, *(part.roll(1, dims=0) for part in rows), GIVEN_TO_REPEATED)
    assert (found - of_others).abs().max() > 0.1


def test_prompts_that_differ_in_their_padding_alone_are_not_the_same() -> None:
    """The padding's id can be a token of the prompt too."""
    policy, ids = tiny("llama"), PROMPTS[:1].expand(2, -1)
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    found = decoded(Decoder(policy, ids, mask, STEPS), GIVEN[:2])
    wanted = expected(policy, ids, mask, GIVEN[:2])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_families_that_need_more_than_a_full_cache_have_no_decoder() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    windows = AutoConfig.for_model("mistral", sliding_window=4, **sizes)
    both = AutoConfig.for_model("gemma2", **sizes)
    bloom = AutoConfig.for_model("bloom", hidden_size=32, n_layer=2, n_head=4, vocab_size=64)
    for config in (windows, both, bloom):
        assert not has_decoder(Policy(AutoModelForCausalLM.from_config(config)))


def test_rows_that_are_finished_end_the_decoding_at_the_next_check() -> None:
    policy, steps = tiny("llama"), 3 * STEPS_BETWEEN_CHECKS
    calls = 0

    def choose(logits: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.full((3,), 5)

    decoder = Decoder(policy, PROMPTS, MASK, steps)
    decoder.run(choose, lambda: torch.tensor([calls > 3] * 3))
    assert calls == STEPS_BETWEEN_CHECKS + 1
    calls = 0
    Decoder(policy, PROMPTS, MASK, steps).run(choose, lambda: torch.tensor([True, True, False]))
    assert calls == steps


def test_a_layer_keeps_the_states_in_their_columns() -> None:
    prompt_of = torch.tensor([0, 0, 1])
    columns = Columns(capacity=4, prompt_of=prompt_of, reads_all=False)
    layer = PreallocatedLayer(columns)
    first = torch.arange(24.0).view(2, 2, 2, 3)
    keys, _ = layer.update(first, -first)
    assert torch.equal(keys, first)
    columns.advance(2)
    before = layer.keys
    keys, values = layer.update(torch.ones(3, 2, 1, 3), torch.zeros(3, 2, 1, 3))
    assert layer.keys is before  # not allocated again
    of_rows = first[prompt_of]
    assert torch.equal(keys, torch.cat([of_rows, torch.ones(3, 2, 1, 3)], 2))
    assert torch.equal(values, torch.cat([-of_rows, torch.zeros(3, 2, 1, 3)], 2))
    assert layer.get_mask_sizes(1) == (3, 0)


@pytest.mark.parametrize("rows", [1, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_give_the_same_product(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 32, bias=bias)
    states = torch.randn(rows, 1, 48)
    with torch.no_grad():
        usual = layer(states)
        with few_rows(layer):
            found = layer(states)
        torch.testing.assert_close(found, usual, rtol=0, atol=1e-5)
        assert found.is_contiguous()
    assert "forward" not in layer.__dict__
