"""Logits of a head in 16 bit: as exact as its weights and states are, in float32."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from training.models.families.float32_logits import Float32Logits
from training.models.loading import load_policy
from training.models.logprobs import token_logprobs
from training.models.options import LoadOptions
from training.models.pretrained import Pretrained

TOKENS, VOCABULARY, HIDDEN = 256, 2_000, 64
PRECISIONS = [torch.bfloat16, torch.float16]


@pytest.fixture(params=PRECISIONS, ids=["bfloat16", "float16"])
def head(request: pytest.FixtureRequest) -> nn.Linear:
    """A head whose logits are a few nats, in 16 bit."""
    torch.manual_seed(0)
    made = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    nn.init.normal_(made.weight, std=0.3)
    return made.to(request.param)


def states(head: nn.Linear, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, HIDDEN, generator=generator).to(head.weight.dtype)


def response_logp(head: nn.Module, hidden: Tensor) -> Tensor:
    """log π of a response whose tokens are those after the row's number."""
    targets = torch.arange(TOKENS) * 7 % VOCABULARY
    return token_logprobs(hidden, targets, head)[0].double().sum()


@torch.no_grad()
def test_the_log_odds_of_long_responses_are_those_of_float64(head: nn.Linear) -> None:
    exact = nn.Linear(HIDDEN, VOCABULARY, bias=False).double()
    exact.weight.copy_(head.weight)
    ours, errors, plain_errors = Float32Logits.like(head), [], []
    for seed in range(8):
        first, second = states(head, 2 * seed), states(head, 2 * seed + 1)
        expected = [exact(part.double()).log_softmax(-1) for part in (first, second)]
        targets = torch.arange(TOKENS) * 7 % VOCABULARY
        known = [rows[torch.arange(TOKENS), targets].sum() for rows in expected]
        for layer, kept in ((ours, errors), (head, plain_errors)):
            odds = response_logp(layer, first) - response_logp(layer, second)
            kept.append((odds - (known[0] - known[1])).abs().item())
    print(f"{head.weight.dtype}: largest error {max(errors):.1e}, rounded {max(plain_errors):.1e}")
    assert max(errors) < 1e-3
    # The wrong variant: logits in the weights' precision.
    assert max(plain_errors) > (0.1 if head.weight.dtype == torch.bfloat16 else 0.01)


def test_the_gradients_are_those_of_a_linear_layer(head: nn.Linear) -> None:
    ours, hidden = Float32Logits.like(head), states(head, 0).requires_grad_()
    assert ours.weight is head.weight
    weights = torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((ours(hidden) * weights).sum(), [hidden, head.weight])
    plain = head(hidden)
    own = torch.autograd.grad((plain * weights.to(plain.dtype)).sum(), [hidden, head.weight])
    for one, other in zip(found, own, strict=True):
        torch.testing.assert_close(one, other)


def test_bias_and_shapes() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(8, 20).bfloat16()
    hidden = torch.randn(2, 3, 8).bfloat16()
    logits = Float32Logits.like(plain)(hidden)
    assert (logits.shape, logits.dtype) == ((2, 3, 20), torch.float32)
    expected = nn.functional.linear(hidden.double(), plain.weight.double(), plain.bias.double())
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-6)
    assert Float32Logits.like(plain)(hidden[:, :0]).shape == (2, 0, 20)
    assert dict(Float32Logits.like(plain).named_parameters()).keys() == {"weight", "bias"}


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_policy_in_bfloat16_has_such_a_head(
    tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase, tied: bool
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(world_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=tied, initializer_range=0.5,
        pad_token_id=world_tokenizer.pad_token_id, eos_token_id=world_tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    world_tokenizer.save_pretrained(tmp_path / "model")
    pretrained = Pretrained(str(tmp_path / "model"))
    policy = load_policy(pretrained, world_tokenizer, LoadOptions(dtype=torch.bfloat16))
    head = policy.model.get_output_embeddings()
    assert type(head) is Float32Logits
    assert (head.weight is policy.model.get_input_embeddings().weight) == tied
    ids = torch.arange(10, 30)[None]
    logp, _ = policy(ids, torch.ones_like(ids), torch.arange(20)[None] > 0)
    hidden = policy.model.model(input_ids=ids).last_hidden_state[0, :-1].double()
    logits = hidden @ head.weight.double().T
    if policy.absent is not None:
        logits[:, policy.absent] = -torch.inf
    expected = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(logp[0, 1:].double(), expected, rtol=0, atol=1e-5)
    rounded = logits.bfloat16().double().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    assert (rounded - expected).abs().max() > 1e-3
    # What it writes is the same model.
    policy.model.save_pretrained(tmp_path / "again")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert torch.equal(again.lm_head.weight, head.weight)
    in_float32 = load_policy(pretrained, world_tokenizer, LoadOptions(dtype=torch.float32))
    assert type(in_float32.model.get_output_embeddings()) is nn.Linear
