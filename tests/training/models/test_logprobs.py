"""Log-probabilities against the full float64 log-softmax; masked sums; positions."""

import math

import pytest
import torch
from torch import nn

from training.models.logprobs import masked_sum, position_ids, token_logprobs

ROWS, HIDDEN, VOCABULARY = 37, 16, 50


@pytest.fixture
def scored() -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    nn.init.normal_(head.weight)
    return torch.randn(ROWS, HIDDEN), torch.randint(VOCABULARY, (ROWS,)), head


def full_log_softmax(hidden: torch.Tensor, head: nn.Linear) -> torch.Tensor:
    return (hidden.double() @ head.weight.double().T).log_softmax(-1)


def test_literal_distribution() -> None:
    head = nn.Linear(1, 3, bias=False)
    head.weight.data = torch.tensor([[1.0], [2.0], [5.0]]).log()
    logp, entropy = token_logprobs(torch.ones(3, 1), torch.arange(3), head, with_entropy=True)
    torch.testing.assert_close(logp, torch.tensor([1 / 8, 2 / 8, 5 / 8]).log())
    expected = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    torch.testing.assert_close(entropy, torch.full((3,), expected))


def test_equals_the_full_float64_log_softmax(scored) -> None:
    hidden, targets, head = scored
    full = full_log_softmax(hidden, head)
    logp, entropy = token_logprobs(hidden, targets, head, with_entropy=True)
    assert logp.dtype == entropy.dtype == torch.float32
    expected = full.gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(logp.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(full.exp() * full).sum(-1), rtol=0, atol=1e-5)
    off_by_one = full.gather(1, targets.roll(1)[:, None]).squeeze(1)
    assert (logp.double() - off_by_one).abs().max() > 0.1


def test_gradients_equal_those_of_the_full_log_softmax(scored) -> None:
    hidden, targets, head = scored
    weights = torch.randn(ROWS)
    hidden.requires_grad_()
    logp, entropy = token_logprobs(hidden, targets, head, with_entropy=True, rows_per_chunk=8)
    (weights * logp + entropy).sum().backward()
    ours = hidden.grad.clone(), head.weight.grad.clone()
    hidden.grad = head.weight.grad = None

    full = full_log_softmax(hidden, head)
    expected = weights * full.gather(1, targets[:, None]).squeeze(1) - (full.exp() * full).sum(-1)
    expected.sum().backward()
    for gradient, wanted in zip(ours, (hidden.grad, head.weight.grad), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows_per_chunk", [1, 8, ROWS, 1000])
def test_chunks_change_nothing(scored, rows_per_chunk: int) -> None:
    hidden, targets, head = scored
    whole, _ = token_logprobs(hidden, targets, head, rows_per_chunk=ROWS)
    parts, _ = token_logprobs(hidden, targets, head, rows_per_chunk=rows_per_chunk)
    torch.testing.assert_close(parts, whole, rtol=0, atol=5e-6)


@pytest.mark.parametrize("with_grad", [True, False])
def test_no_more_logits_than_a_chunk_at_a_time(scored, with_grad: bool) -> None:
    hidden, targets, head = scored
    rows: list[int] = []
    head.register_forward_hook(lambda module, given, logits: rows.append(logits.shape[0]))
    with torch.set_grad_enabled(with_grad):
        logp, _ = token_logprobs(hidden, targets, head, rows_per_chunk=8)
    assert rows == [8, 8, 8, 8, 5]
    if with_grad:
        logp.sum().backward()
        assert sorted(rows[5:]) == [5, 8, 8, 8, 8]  # recomputed, chunk by chunk


def test_the_backward_pass_keeps_no_logits(scored) -> None:
    """What autograd saves between forward and backward is hidden states, not [rows, vocabulary]."""
    hidden, targets, head = scored
    saved: list[torch.Size] = []

    def record(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        token_logprobs(hidden, targets, head, rows_per_chunk=8)
    assert not any(
        VOCABULARY in shape and len(shape) == 2 and HIDDEN not in shape for shape in saved
    )


def test_nothing_to_score(scored) -> None:
    hidden, targets, head = scored
    logp, entropy = token_logprobs(hidden[:0], targets[:0], head, with_entropy=True)
    assert logp.shape == entropy.shape == (0,)
    logp.sum().backward()


def test_low_precision_models_are_normalized_in_float32() -> None:
    torch.manual_seed(0)
    head = nn.Linear(8, 50_000, bias=False).bfloat16()
    hidden = torch.randn(4, 8).bfloat16()
    logits = head(hidden)
    logp, _ = token_logprobs(hidden, torch.arange(4), head)
    expected = logits.double().log_softmax(-1)[torch.arange(4), torch.arange(4)]
    torch.testing.assert_close(logp.double(), expected, rtol=0, atol=1e-4)
    in_bfloat16 = logits.log_softmax(-1)[torch.arange(4), torch.arange(4)]
    assert (in_bfloat16.double() - expected).abs().max() > 1e-3


@pytest.mark.parametrize("rows", [0, 3, 1024, 1025])
def test_a_rank_makes_as_many_calls_of_the_head_as_it_is_told(rows: int) -> None:
    """Under ZeRO-3 each call is a collective: a rank with fewer tokens calls with none."""
    torch.manual_seed(0)
    head, calls = nn.Linear(4, 7), []
    head.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    hidden = torch.randn(rows, 4, requires_grad=True)
    targets = torch.randint(7, (rows,))
    logp, entropy = token_logprobs(hidden, targets, head, with_entropy=True, chunks=3)
    assert len(calls) == 3
    assert sum(calls) == rows
    expected = head(hidden).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(logp, expected)
    assert entropy.shape == (rows,)
    calls.clear()
    logp.sum().backward()
    assert len(calls) == 3  # recomputed: as many in the backward pass
    assert hidden.grad is not None


def test_masked_sums_do_not_see_what_is_masked() -> None:
    values = torch.tensor([[1.0, 2.0, float("nan")], [4.0, float("inf"), 8.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    assert masked_sum(values, mask).item() == 15.0
    assert masked_sum(values, mask, dim=-1).tolist() == [3.0, 12.0]
    assert torch.isnan((values * mask).sum())  # the variant that leaks


def test_a_masked_nan_has_no_gradient() -> None:
    values = torch.tensor([3.0, float("nan")], requires_grad=True)
    masked_sum(values, torch.tensor([True, False])).backward()
    assert values.grad.tolist() == [1.0, 0.0]


def test_positions_count_tokens_only() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]
