"""Equal weights give equal numbers: actor, reference and reward model before the first step.

DeepSpeed keeps the buffers of a 16-bit model in float32, and rotary frequencies are buffers:
rounded to bfloat16 they turn position 100 by 0.2 rad. A frozen model whose buffers were cast would
differ from the actor from the start, and the KL would not begin at 0.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
)

from step3_rlhf.config import EvaluationConfig, PPOConfig
from step3_rlhf.evaluation.run import load_models
from step3_rlhf.main import build
from step3_rlhf.prompts import Prompts
from step3_rlhf.roles import roles_of, training_roles_of
from step3_rlhf.rollout import Rollout, assemble
from step3_rlhf.trainer import PPOTrainer
from training.config import check_config
from training.data import read_records, tokenize
from training.models.export import export
from training.runtime import ranks

pytestmark = [pytest.mark.usefixtures("process_group", "fp16_everywhere"), pytest.mark.long]

PROMPT, RESPONSE, ROWS = 90, 20, 4
ROTARY = ["llama", "qwen2", "gpt_neox"]
KEEPS_FLOAT32 = "ernie4_5_moe"
"""transformers loads its router in float32 whatever it is asked for."""
EXPERTS = {
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "moe_layer_start_index": 0,
    "moe_layer_end_index": 1,
}
PRECISIONS = ["bf16", "fp16"]
ZERO_3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


@pytest.fixture
def fp16_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs compute in float16, if slowly; not all of them to DeepSpeed's satisfaction."""
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)


def write_models(directory: Path, model_type: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """A policy and, if the family has one, a reward model with large random weights."""
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        num_labels=1,
        **(EXPERTS if model_type == KEEPS_FLOAT32 else {}),
    )
    torch.manual_seed(0)
    kinds = {"policy": AutoModelForCausalLM}
    if model_type != KEEPS_FLOAT32:  # which has no classifier
        kinds["reward"] = AutoModelForSequenceClassification
    for name, kind in kinds.items():
        model = kind.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(5.0)
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)


@pytest.fixture
def trainer(
    stage_settings: Callable[[str], dict[str, Any]],
    world_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> Callable[..., PPOTrainer]:
    def built(model_type: str, precision: str, **changes: Any) -> PPOTrainer:
        write_models(tmp_path / model_type, model_type, world_tokenizer)
        settings = stage_settings("ppo") | {
            "model_name_or_path": str(tmp_path / model_type / "policy"),
            "reward": {"model_name_or_path": str(tmp_path / model_type / "reward")},
            "regularizer": {"name": "kl"},
            "per_device_train_batch_size": ROWS,
            "per_device_eval_batch_size": ROWS,
            precision: True,
        }
        config = check_config(PPOConfig, settings | changes, "config:")
        data = tokenize(read_records(config.data, "ppo"), world_tokenizer, config.data, "ppo").train
        return build(config, training_roles_of(config), Prompts(data, config), 2)

    return built


def long_rollout(tokenizer: PreTrainedTokenizerBase) -> Rollout:
    """Given prompts and responses, long enough for a rounded frequency to show."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(
        8, len(tokenizer), (ROWS, PROMPT + RESPONSE), generator=generator
    ).tolist()
    prompts = [row[row_number:PROMPT] for row_number, row in enumerate(drawn)]
    responses = [row[PROMPT:] for row in drawn]
    return assemble(prompts, responses, [""] * ROWS, tokenizer, ranks.device())


def logp(model: Any, rollout: Rollout) -> torch.Tensor:
    with torch.no_grad():
        found, _ = model(rollout.input_ids, rollout.attention_mask, rollout.scored_mask)
    assert found.abs().sum() > 1.0
    return found


def values(model: Any, rollout: Rollout) -> torch.Tensor:
    with torch.no_grad():
        return model(rollout.input_ids, rollout.attention_mask)


def floats(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from (
        (name, buffer) for name, buffer in module.named_buffers() if buffer.dtype.is_floating_point
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model_type", ROTARY)
@pytest.mark.parametrize("stage", [0, 2])
def test_kl_is_0_before_the_first_step(
    trainer: Callable[..., PPOTrainer], model_type: str, precision: str, stage: int
) -> None:
    run = trainer(model_type, precision, deepspeed={"zero_optimization": {"stage": stage}})
    rollout = long_rollout(run.tokenizer)
    assert torch.equal(logp(run.actor, rollout), logp(run.reference, rollout))
    # The wrong variant: buffers rounded like the weights, which is what `.to(dtype)` would do.
    run.reference.to(dtype=run.actor.module.model.dtype)
    gap = (logp(run.actor, rollout) - logp(run.reference, rollout)).abs().sum() / (ROWS * RESPONSE)
    assert gap > 1e-4


def test_parameters_that_a_family_keeps_in_float32_are_the_same_in_all_roles(
    trainer: Callable[..., PPOTrainer], tiny_world: Path
) -> None:
    run = trainer(
        KEEPS_FLOAT32,
        "bf16",
        reward={"function": "operator:add"},
        critic_model_name_or_path=str(tiny_world / "base"),
    )
    kept = AutoModelForCausalLM.from_pretrained(run.config.model_name_or_path, dtype=torch.bfloat16)
    assert torch.float32 in {parameter.dtype for parameter in kept.parameters()}
    for module in (run.actor.module, run.reference):
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    rollout = long_rollout(run.tokenizer)
    assert torch.equal(logp(run.actor, rollout), logp(run.reference, rollout))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_first_iterations_kl_is_0(trainer: Callable[..., PPOTrainer], precision: str) -> None:
    metrics = trainer("llama", precision).iteration(0)
    assert metrics["objective/kl"] == 0.0
    assert metrics["response/length"] > 0


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model_type", ROTARY)
def test_models_divided_by_zero_3_compute_the_same(
    trainer: Callable[..., PPOTrainer], model_type: str, precision: str
) -> None:
    whole = trainer(model_type, precision)
    rollout = long_rollout(whole.tokenizer)
    expected, rewards = logp(whole.actor, rollout), whole.reward(rollout)
    divided = trainer(model_type, precision, frozen_deepspeed=ZERO_3, deepspeed=ZERO_3)
    assert torch.equal(logp(divided.reference, rollout), expected)
    assert torch.equal(logp(divided.actor, rollout), expected)
    assert torch.equal(divided.reward(rollout), rewards)
    for module in (divided.reference, divided.reward.model, divided.actor.engine):
        assert {buffer.dtype for _, buffer in floats(module)} == {torch.float32}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model_type", ROTARY)
def test_a_reward_model_and_the_critic_that_starts_from_it_agree(
    trainer: Callable[..., PPOTrainer], model_type: str, precision: str
) -> None:
    run = trainer(model_type, precision)
    rollout = long_rollout(run.tokenizer)
    assert torch.equal(values(run.critic, rollout), values(run.reward.model, rollout))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model_type", ROTARY)
def test_an_exported_policy_scores_as_it_did_in_training(
    trainer: Callable[..., PPOTrainer], model_type: str, precision: str, tmp_path: Path
) -> None:
    run = trainer(model_type, precision)
    run.iteration(0)
    run.actor.engine.eval()
    rollout = long_rollout(run.tokenizer)
    trained = logp(run.actor, rollout)
    assert not torch.equal(trained, logp(run.reference, rollout))
    export(run.actor.module.model, run.tokenizer, tmp_path / "actor")
    settings = EvaluationConfig.of(run.config).model_copy(
        update={
            "model_name_or_path": str(tmp_path / "actor"),
            "reference_model_name_or_path": run.config.model_name_or_path,
        }
    )
    alone = load_models(settings, roles_of(settings))
    assert torch.equal(logp(alone.policy, rollout), trained)
    assert torch.equal(logp(alone.reference, rollout), logp(run.reference, rollout))
    assert torch.equal(alone.reward(rollout), run.reward(rollout))
