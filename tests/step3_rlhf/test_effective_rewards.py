"""The rewards that a trainer hands to PPO where a regularizer puts something in r's place."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from step3_rlhf.checks import check_answer_key
from step3_rlhf.prompts import Prompts
from step3_rlhf.rollout import Rollout, assemble, sample
from step3_rlhf.trainer import PPOTrainer
from training.data import encode_responses, read_records, response_end
from training.errors import RunError, UserError

pytestmark = pytest.mark.usefixtures("process_group")

Build = Callable[..., PPOTrainer]


def rollout_of(trainer: PPOTrainer) -> tuple[Rollout, Tensor]:
    """An iteration's responses, and their rewards: a tenth of their lengths in characters."""
    prompts = trainer.prompts.of_iteration(0)
    rollout = sample(trainer.reference, trainer.tokenizer, *prompts, trainer.config.sampling)
    return rollout, trainer.reward(rollout)


def log_softplus(rewards: Tensor) -> Tensor:
    return (1.0 + (rewards / 0.5).exp()).log().log() * 0.5


def test_luce_takes_log_g_and_centers_it_afterwards(build: Build) -> None:
    """g(r − center)/Σg would be another target."""
    regularizer = {"name": "generalized_pl", "g": "softplus", "target": "luce", "beta": 0.5}
    trainer = build(regularizer=regularizer, reward_centering_samples=32)
    rollout, raw = rollout_of(trainer)
    torch.testing.assert_close(trainer.shape_rewards(raw, rollout), log_softplus(raw))
    prompts = trainer.prompts.for_centering(32)
    drawn = sample(trainer.reference, trainer.tokenizer, *prompts, trainer.config.sampling)
    center = log_softplus(trainer.reward(drawn).double()).mean().item()
    trainer.center_rewards()
    assert trainer.reward_center == pytest.approx(center, rel=1e-6)
    shaped = trainer.shape_rewards(raw, rollout)
    torch.testing.assert_close(shaped, log_softplus(raw) - center)
    assert (log_softplus(raw - center) - shaped).abs().max() > 0.01


def test_a_reward_without_log_g_ends_the_run_before_a_step(build: Build, tmp_path: Path) -> None:
    regularizer = {"name": "generalized_pl", "g": "power", "exponent": 2.0, "target": "luce"}
    trainer = build(regularizer=regularizer, output_dir=str(tmp_path))
    trainer.reward = lambda rollout: torch.arange(len(rollout)).float()  # the first one is 0
    message = r"β log g\(r/β\) \(power: only positive rewards have it\): 1 not finite"
    with pytest.raises(RunError, match=message):
        trainer.iteration(0)


def with_key(tmp_path: Path, prompts: Prompts, responses: dict[str, list[str]]) -> dict[str, Any]:
    """The regularizer of an answer key that has these classes for every prompt."""
    texts = {dialogue[-1]["content"] for dialogue in prompts.dialogues}
    lines = (json.dumps({"prompt": text, "classes": responses}) + "\n" for text in sorted(texts))
    (tmp_path / "key.jsonl").write_text("".join(lines))
    classes = {"answer_key": str(tmp_path / "key.jsonl")}
    return {"name": "conditional_pm", "level": "class", "classes": classes, "beta": 0.5}


def test_a_rare_class_gains_what_the_reference_lacks(build: Build, tmp_path: Path) -> None:
    """r − β log π_ref(c|x) for responses in the key, r for others."""
    regularizer = with_key(tmp_path, build().prompts, {"tea": ["Tea", "A tea"], "oat": ["Oat"]})
    trainer = build(regularizer=regularizer)
    tokenizer, prompts = trainer.tokenizer, trainer.prompts
    texts = ["Tea", "A tea", "Oat", "Water"]
    rollout = assemble(
        [prompts.ids[0]] * 4,
        encode_responses(texts, tokenizer),
        [prompts.dialogues[0]] * 4,
        tokenizer,
        torch.device("cpu"),
        (response_end(tokenizer),),
    )
    raw = torch.tensor([1.0, 2.0, 3.0, 4.0])
    logps = trainer.reference_logp(rollout).sum(-1).double()
    tea = logps[:2].logsumexp(0).item()
    gains = torch.tensor([-tea, -tea, -logps[2].item(), 0.0]) * 0.5
    shaped = trainer.shape_rewards(raw, rollout)
    torch.testing.assert_close(shaped, raw + gains, rtol=0, atol=1e-4)
    assert gains[0] > 1.0
    metrics = trainer.iteration(0)
    assert math.isfinite(metrics["objective/rlhf_reward"])


def test_a_key_says_how_many_prompts_it_has(
    build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = build()
    check_answer_key(trainer.config, read_records(trainer.config.data, "ppo"))
    assert capsys.readouterr().out == ""
    regularizer = with_key(tmp_path, trainer.prompts, {"tea": ["Tea"]})
    config = build(regularizer=regularizer).config
    records = read_records(config.data, "ppo")
    check_answer_key(config, records)
    count = len(records.train)
    said = f"key.jsonl has classes for {count} of {count} training prompts"
    assert said in capsys.readouterr().out
    (tmp_path / "key.jsonl").write_text('{"prompt": "x", "classes": {"tea": ["Tea"]}}\n')
    with pytest.raises(UserError, match=f"has classes for 0 of {count} training prompts"):
        check_answer_key(config, records)
