"""Packed batches: the same hidden states as padded ones, in fewer rows."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from training.errors import UserError
from training.models import hidden_states
from training.models.packing import PACKABLE, Packed, pack, refuse_unpackable
from training.models.policy import Policy
from training.models.scalar import ScalarModel

PAD = 0


def padded(rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    gaps = [[PAD] * (width - len(row)) for row in rows]
    if side == "left":
        ids = [gap + row for gap, row in zip(gaps, rows, strict=True)]
        mask = [[0] * len(gap) + [1] * len(row) for gap, row in zip(gaps, rows, strict=True)]
    else:
        ids = [row + gap for gap, row in zip(gaps, rows, strict=True)]
        mask = [[1] * len(row) + [0] * len(gap) for gap, row in zip(gaps, rows, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def test_the_documented_example() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0], [0, 0, 0, 9]])
    packed = pack(ids, (ids != PAD).long())
    assert packed.input_ids.tolist() == [[5, 6, 7, 8], [9, 0, 0, 0]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
    assert packed.rows.tolist() == [0, 0, 0, 0, 0, 0, 1]
    assert packed.columns.tolist() == [0, 1, 2, 3, 0, 1, 0]
    back = packed.unpacked(packed.input_ids[..., None].float())
    assert back[..., 0].tolist() == ids.tolist()


def test_responses_see_their_prompt_and_not_one_another() -> None:
    """Two prompts, 5 6 and 7 8 9, with two responses each: one row of each, and their masks."""
    ids, mask = padded([[5, 6, 1], [5, 6, 2, 3], [7, 8, 9, 1], [7, 8, 9, 2]], "left")
    packed = pack(ids, mask)
    assert packed.input_ids.tolist() == [[5, 6, 1, 2, 3], [7, 8, 9, 1, 2]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 2, 3], [0, 1, 2, 3, 3]]
    assert packed.attention_mask[:, 0].int().tolist() == [
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]],
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 1]],
    ]


def test_only_what_is_worth_it_is_shared() -> None:
    """A begin-of-sequence token alone, 1, is computed for each; a row is at most four widths."""
    alone = [[1, *range(10 * s, 10 * s + 9)] for s in range(1, 4)]
    packed = pack(*padded(alone, "right"))
    assert packed.input_ids.shape == (3, 10)
    prompt = list(range(100, 110))
    many = [[*prompt, *range(10 * s, 10 * s + 10)] for s in range(1, 10)]
    packed = pack(*padded(many, "right"))  # 10 + 7 · 10 tokens fit into 4 · 20
    assert packed.input_ids.shape == (2, 80)
    assert (packed.input_ids == 100).sum() == 2


WORDS = st.lists(st.integers(1, 3), min_size=1, max_size=9)


@settings(deadline=None, derandomize=True)
@given(
    st.lists(WORDS, min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 3), WORDS), min_size=1, max_size=12),
    st.sampled_from(["left", "right"]),
)
def test_every_token_keeps_its_place_and_its_past(
    prompts: list[list[int]], responses: list[tuple[int, list[int]]], side: str
) -> None:
    rows = [prompts[number % len(prompts)] + response for number, response in responses]
    ids, mask = padded(rows, side)
    packed = pack(ids, mask)
    assert len(packed.input_ids) <= len(rows)
    assert ids.shape[1] <= packed.input_ids.shape[1] <= 4 * ids.shape[1]
    assert torch.equal(packed.unpacked(packed.input_ids[..., None])[..., 0], ids)
    places = zip(packed.from_rows, packed.rows, packed.columns, strict=True)
    depth = dict.fromkeys(range(len(rows)), 0)
    for sequence, row, column in places:
        place = depth[int(sequence)]
        depth[int(sequence)] += 1
        seen = packed.input_ids[row][packed.attention_mask[row, 0, column]].tolist()
        assert seen == rows[int(sequence)][: place + 1]
        assert packed.position_ids[row, column] == place
    assert packed.attention_mask.any(-1).all()  # a token that sees nothing would give NaN


def tiny_config(model_type: str) -> PretrainedConfig:
    sizes = {"vocab_size": 64, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2}
    if model_type == "gpt2":
        return AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64, **sizes)
    sizes |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if model_type == "opt":
        return AutoConfig.for_model("opt", ffn_dim=48, word_embed_proj_dim=32, **sizes)
    if model_type == "mistral":
        sizes |= {"sliding_window": None}
    return AutoConfig.for_model(
        model_type, intermediate_size=48, num_key_value_heads=2, head_dim=8, **sizes
    )


@pytest.fixture(params=sorted(PACKABLE))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """One of each kind that may be packed; random weights, large enough to tell tokens apart."""
    torch.manual_seed(0)
    config = tiny_config(request.param)
    refuse_unpackable(config, "tiny")
    tiny = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in tiny.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    return tiny


ROWS = [[5, 6, 7, 8, 9, 10], [11, 12], [5, 6, 7, 9], [13, 14, 15], [16], [5, 6, 7, 8, 9]]


def logps(policy: Policy, side: str) -> Tensor:
    ids, mask = padded(ROWS, side)
    return policy(ids, mask, (mask == 1) & (mask.cumsum(-1) > 1))[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_log_probabilities_and_gradients_are_the_padded_ones(
    model: PreTrainedModel, side: str
) -> None:
    padded_logps = logps(Policy(model), side)
    packed_logps = logps(Policy(model, packing=True), side)
    torch.testing.assert_close(packed_logps, padded_logps, rtol=1e-5, atol=1e-5)
    gradients = []
    for packing in (False, True):
        model.zero_grad()
        logps(Policy(model, packing), side).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    largest = max(gradient.abs().max().item() for gradient in gradients[0])
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * largest)


def test_sequences_that_saw_one_another_would_be_noticed(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mixed(ids: Tensor, mask: Tensor) -> Packed:
        packed = pack(ids, mask)
        everything = torch.ones_like(packed.attention_mask).tril()
        return replace(packed, attention_mask=everything)

    expected = logps(Policy(model), "right")
    monkeypatch.setattr(hidden_states, "pack", mixed)
    assert (logps(Policy(model, packing=True), "right") - expected).abs().max() > 1e-2


@torch.no_grad()
def test_packed_values_are_the_padded_ones(model: PreTrainedModel) -> None:
    from transformers import AutoModelForSequenceClassification

    model.config.num_labels = 1
    scalar = AutoModelForSequenceClassification.from_config(model.config).eval()
    torch.nn.init.normal_(scalar.score.weight)
    ids, mask = padded(ROWS, "left")
    expected = ScalarModel(scalar)(ids, mask)
    found = ScalarModel(scalar, packing=True)(ids, mask)
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        AutoConfig.for_model("mistral", sliding_window=8),
        AutoConfig.for_model(
            "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0
        ),
        AutoConfig.for_model("bloom"),
        AutoConfig.for_model("mamba"),
    ],
    ids=lambda config: config.model_type,
)
def test_models_of_other_attention_are_refused(config: PretrainedConfig) -> None:
    with pytest.raises(UserError, match=r"packing: models/one is a .*packing=false"):
        refuse_unpackable(config, "models/one")


def test_attention_that_adds_the_mask_is_refused() -> None:
    config = AutoConfig.for_model("llama", attn_implementation="eager")
    with pytest.raises(UserError, match=r"of models/one sets attn_implementation to eager, .*sdpa"):
        refuse_unpackable(config, "models/one")
    refuse_unpackable(AutoConfig.for_model("llama", attn_implementation="sdpa"), "models/one")
