"""LoRA: what is trained, what the adapter adds, what is exported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from step1_sft import main as sft
from step1_sft.config import SFTConfig
from step2_reward import main as reward
from step2_reward.config import RewardConfig
from step3_rlhf import main as ppo
from step3_rlhf.config import PPOConfig
from training.config import check_config
from training.errors import UserError
from training.models.export import export
from training.models.loading import load_policy, load_scalar_model
from training.models.lora import WithoutAdapter, adapter_off, add_adapter, merged_state
from training.models.options import LoadOptions
from training.models.partitioned import whole_parameters
from training.models.policy import Policy
from training.models.pretrained import Pretrained
from training.runtime import engine
from training.stage_config import LoraSettings

pytestmark = pytest.mark.usefixtures("process_group")

SETTINGS = LoraSettings(r=3, lora_alpha=6.0)
IDS = torch.tensor([[1, 9, 8, 7, 6, 2]])
MASK = torch.ones_like(IDS)
SCORED = torch.tensor([[False, True, True, True, True, True]])


def logps(policy: Policy) -> torch.Tensor:
    return policy(IDS, MASK, SCORED)[0].detach()


def randomize(model: PreTrainedModel) -> None:
    """What training does to B: it is no longer 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)


def test_a_new_adapter_adds_nothing_and_has_r_times_inputs_and_outputs_weights(
    any_model: PreTrainedModel,
) -> None:
    before = logps(Policy(any_model))
    linear = sum(
        SETTINGS.r * (layer.weight.shape[0] + layer.weight.shape[1])
        for name, layer in any_model.named_modules()
        if type(layer).__name__ in ("Linear", "Conv1D") and "lm_head" not in name
    )
    add_adapter(any_model, SETTINGS)
    assert torch.equal(logps(Policy(any_model)), before)
    trained = [p.numel() for p in any_model.parameters() if p.requires_grad]
    assert sum(trained) == linear > 0


def test_switched_off_it_is_the_model_of_before(any_model: PreTrainedModel) -> None:
    before = logps(Policy(any_model))
    add_adapter(any_model, SETTINGS)
    randomize(any_model)
    trained = [name for name, p in any_model.named_parameters() if p.requires_grad]
    with adapter_off(any_model):
        assert torch.equal(logps(Policy(any_model)), before)
    assert not torch.allclose(logps(Policy(any_model)), before, atol=1e-2)  # and on it is not
    assert [name for name, p in any_model.named_parameters() if p.requires_grad] == trained


def test_export_has_the_adapter_merged_and_the_model_keeps_it(
    any_model: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    names = set(any_model.state_dict())
    add_adapter(any_model, SETTINGS)
    randomize(any_model)
    own = logps(Policy(any_model))
    assert set(merged_state(any_model) or {}) == names
    export(any_model, world_tokenizer, tmp_path / "model")
    loaded = Policy(AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval())
    torch.testing.assert_close(logps(loaded), own, rtol=0, atol=1e-5)
    assert torch.equal(logps(Policy(any_model)), own)


def test_by_hand() -> None:
    """W x + lora_alpha / r · B A x."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[5.0, 7.0]])
    settings = LoraSettings(r=1, lora_alpha=4.0, target_modules=["0"])
    add_adapter(model, settings)  # type: ignore[arg-type]
    model[0].lora_A["default"].weight.data = torch.tensor([[1.0, 2.0]])
    model[0].lora_B["default"].weight.data = torch.tensor([[3.0]])
    assert model(torch.tensor([1.0, 1.0])).item() == 12.0 + 4.0 * 3.0 * 3.0
    state = merged_state(model)  # type: ignore[arg-type]
    assert state is not None
    assert state["0.weight"].tolist() == [[5.0 + 12.0, 7.0 + 24.0]]


def test_a_reward_models_head_is_trained_in_full(tiny_world: Path, tmp_path: Path) -> None:
    base = str(tiny_world / "base")
    tokenizer = Pretrained(base).tokenizer
    scalar = load_scalar_model(
        Pretrained(base), tokenizer, LoadOptions(lora=SETTINGS), new_head=True
    )
    trained = {name for name, p in scalar.named_parameters() if p.requires_grad}
    assert "model.score.weight" in trained
    assert all("lora_" in name for name in trained - {"model.score.weight"})
    randomize(scalar.model)
    torch.nn.init.normal_(scalar.model.score.weight)
    own = scalar.rewards(IDS, MASK).detach()
    export(scalar.model, tokenizer, tmp_path / "model")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(loaded(input_ids=IDS).logits[:, 0], own, rtol=0, atol=1e-5)
    again = load_scalar_model(Pretrained(str(tmp_path / "model")), tokenizer)
    torch.testing.assert_close(again.rewards(IDS, MASK), own, rtol=0, atol=1e-5)


def test_layers_that_are_not_there_are_refused(tiny_world: Path) -> None:
    base = str(tiny_world / "base")
    settings = LoraSettings(target_modules=["attention_of_another_model"])
    with pytest.raises(UserError, match=r"lora\.target_modules: .*attention_of_another_model"):
        load_policy(Pretrained(base), Pretrained(base).tokenizer, LoadOptions(lora=settings))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_adapter_gets_a_gradient(tiny_world: Path, checkpointing: bool) -> None:
    base = str(tiny_world / "base")
    tokenizer = Pretrained(base).tokenizer
    policy = load_policy(
        Pretrained(base),
        tokenizer,
        LoadOptions(gradient_checkpointing=checkpointing, lora=SETTINGS),
    )
    randomize(policy.model)
    policy.train()
    policy(IDS, MASK, SCORED)[0].sum().backward()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("zero", [0, 3])
def test_the_reference_is_the_actor_without_its_adapter(
    stage_settings: Callable[[str], dict[str, Any]], tiny_llama: PreTrainedModel, zero: int
) -> None:
    section = {"zero_optimization": {"stage": zero}}
    config = check_config(SFTConfig, stage_settings("sft") | {"deepspeed": section}, "config:")
    before = logps(Policy(tiny_llama))
    add_adapter(tiny_llama, SETTINGS)
    randomize(tiny_llama)
    actor = engine.TrainedModule(Policy(tiny_llama), config, config, 10)
    reference = WithoutAdapter(actor.engine)
    actor.engine.eval()
    for _ in range(2):  # ZeRO-3 meets two orders of layers in turn
        torch.testing.assert_close(reference(IDS, MASK, SCORED)[0], before, rtol=0, atol=1e-5)
        with_adapter = actor(IDS, MASK, SCORED)[0].detach()
        assert not torch.allclose(with_adapter, before, atol=1e-2)
    with whole_parameters(reference) as bare:
        torch.testing.assert_close(logps(bare), before, rtol=0, atol=1e-5)
    with whole_parameters(actor.engine) as bare:
        torch.testing.assert_close(logps(bare), with_adapter, rtol=0, atol=1e-5)


STAGES = {
    "sft": (SFTConfig, sft, ["model"], {}),
    "reward": (RewardConfig, reward, ["model"], {}),
    "ppo": (PPOConfig, ppo, ["actor", "critic"], {"total_episodes": 24}),
}


@pytest.mark.long
@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_resumes_and_exports(
    stage: str,
    zero: int,
    stage_settings: Callable[[str], dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The base model's own weights stay, the exported ones differ; a resumed run is the same."""
    (tmp_path / "lora_rewards.py").write_text(
        "def by_length(prompts, responses):\n    return [len(text) / 10 for text in responses]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config_class, module, exports, changes = STAGES[stage]
    settings = stage_settings(stage) | {
        "lora": {"r": 4},
        "save_steps": 1,
        "deepspeed": {"zero_optimization": {"stage": zero}},
        **changes,
    }
    if stage == "ppo":
        settings["reward"] = {"function": "lora_rewards:by_length"}
    module.main(check_config(config_class, settings, "config:"))
    output = Path(settings["output_dir"])
    whole = {name: load_file(output / name / "model.safetensors") for name in exports}
    base = load_file(Path(settings["model_name_or_path"]) / "model.safetensors")
    for weights in whole.values():
        assert not any("lora" in name or "base_layer" in name for name in weights)
        changed = [n for n in base if n in weights and not torch.equal(base[n], weights[n])]
        assert changed
        assert all("proj" in name for name in changed)  # no embedding, no norm

    newest = sorted((output / "checkpoints").iterdir())
    for checkpoint in newest[1:]:
        (checkpoint / "state.json").unlink()
    module.main(
        check_config(config_class, settings | {"resume_from_checkpoint": "latest"}, "config:")
    )
    for name, weights in whole.items():
        resumed = load_file(output / name / "model.safetensors")
        assert all(torch.equal(weights[key], resumed[key]) for key in weights)


def test_dropout_is_refused_in_ppo(stage_settings: Callable[[str], dict[str, Any]]) -> None:
    settings = stage_settings("ppo") | {"lora": {"lora_dropout": 0.1}}
    with pytest.raises(UserError, match=r"lora\.lora_dropout: PPO scores what it trains"):
        check_config(PPOConfig, settings, "config:")
