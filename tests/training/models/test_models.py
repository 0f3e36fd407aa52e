"""Policy and scalar models against Hugging Face's own; padding; pad and EOS tokens."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from training.data import pad_prompts, pad_sequences
from training.models.policy import Policy
from training.models.scalar import ScalarModel, last_token

PAD, EOS = 3, 2
ROWS = ([1, 17, 33, 9, 40, EOS], [1, 21, 50], [1, 8, 60, 5])


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    if side == "left":
        return pad_prompts(ROWS, PAD)
    batch = pad_sequences(ROWS, [[]] * len(ROWS), PAD)
    return batch.input_ids, batch.attention_mask


def everything_after_the_first(attention_mask: torch.Tensor) -> torch.Tensor:
    return (attention_mask == 1) & (attention_mask.cumsum(-1) > 1)


def own_logps(model: PreTrainedModel, row: list[int]) -> torch.Tensor:
    """log π of a row's tokens after the first, from the model's own logits, without padding."""
    logits = model(input_ids=torch.tensor([row])).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None]).squeeze(1)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_policy_equals_the_models_own_logits_whatever_the_padding(
    any_model: PreTrainedModel, side: str
) -> None:
    input_ids, attention_mask = padded(side)
    scored = everything_after_the_first(attention_mask)
    logp, entropy = Policy(any_model)(input_ids, attention_mask, scored)
    assert entropy is None
    assert (logp[~scored] == 0).all()
    for row, ids in enumerate(ROWS):
        expected = own_logps(any_model, ids)
        torch.testing.assert_close(
            logp[row][scored[row]].double(), expected, rtol=0, atol=1e-5, msg=f"row {row}"
        )


@torch.no_grad()
def test_left_padding_without_positions_would_be_wrong(tiny_opt: PreTrainedModel) -> None:
    """The trap that `position_ids` avoid: positions that count padding."""
    input_ids, attention_mask = padded("left")
    shifted = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    hidden = tiny_opt.get_decoder()(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=shifted
    ).last_hidden_state
    logp = tiny_opt.lm_head(hidden)[1, -2].log_softmax(-1)[ROWS[1][-1]]
    assert abs(logp - own_logps(tiny_opt, ROWS[1])[-1]) > 1e-3


@torch.no_grad()
def test_policy_scores_only_what_is_asked_for(tiny_llama: PreTrainedModel) -> None:
    input_ids, attention_mask = padded("right")
    scored = torch.zeros_like(input_ids, dtype=torch.bool)
    scored[0, 4:6] = True
    rows: list[int] = []
    policy = Policy(tiny_llama)
    tiny_llama.lm_head.register_forward_hook(lambda m, given, logits: rows.append(logits.shape[0]))
    logp, entropy = policy(input_ids, attention_mask, scored, with_entropy=True)
    assert rows == [2]
    torch.testing.assert_close(
        logp[0, 4:6].double(), own_logps(tiny_llama, ROWS[0])[3:5], atol=1e-5, rtol=0
    )
    full = tiny_llama(input_ids=torch.tensor([ROWS[0]])).logits[0, 3].double().log_softmax(-1)
    assert entropy[0, 4].item() == pytest.approx(-(full.exp() * full).sum().item(), abs=1e-5)


def test_a_batch_of_fillers_gives_zero_and_no_gradient(tiny_llama: PreTrainedModel) -> None:
    input_ids, attention_mask = padded("right")
    nothing = torch.zeros_like(input_ids, dtype=torch.bool)
    logp, _ = Policy(tiny_llama)(input_ids, attention_mask, nothing)
    logp.sum().backward()
    assert logp.sum() == 0
    gradients = [p.grad for p in tiny_llama.parameters() if p.grad is not None]
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.fixture
def scalar_model(any_model: PreTrainedModel, tmp_path: Path) -> PreTrainedModel:
    """The same body with one random label."""
    any_model.save_pretrained(tmp_path / "body")
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "body", num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    return model.eval()


@torch.no_grad()
def test_rewards_equal_the_sequence_classification_models_own(
    scalar_model: PreTrainedModel,
) -> None:
    input_ids, attention_mask = padded("right")
    own = scalar_model(input_ids=input_ids, attention_mask=attention_mask).logits.squeeze(-1)
    ours = ScalarModel(scalar_model)
    torch.testing.assert_close(ours.rewards(input_ids, attention_mask), own, rtol=0, atol=1e-5)
    on_the_left = ours.rewards(*padded("left"))
    torch.testing.assert_close(on_the_left, own, rtol=0, atol=1e-5)
    one_early = ours(input_ids, attention_mask)[torch.arange(3), attention_mask.sum(-1) - 2]
    assert (one_early - own).abs().max() > 1e-3


def test_last_token_on_either_side() -> None:
    values = torch.arange(8.0).reshape(2, 4)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    assert last_token(values, mask).tolist() == [1.0, 7.0]


# Loading
