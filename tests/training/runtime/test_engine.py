"""DeepSpeed engines: one optimizer step, by hand, however the global batch is divided."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from step1_sft.config import SFTConfig
from training.config import check_config
from training.errors import NotFiniteError, UserError
from training.models.options import precision
from training.models.partitioned import whole_parameters
from training.models.policy import Policy
from training.runtime import engine
from training.runtime.engine import TrainedModule, deepspeed_config, optimizer_step

pytestmark = pytest.mark.usefixtures("process_group")

LEARNING_RATE = 0.1


@pytest.fixture
def configured(stage_settings):
    """An SFT config whose first AdamW step is −lr · g / (|g| + 1), a function of the gradient."""

    def config(**changes: Any) -> SFTConfig:
        settings = stage_settings("sft") | {
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "adam_epsilon": 1.0,
            "max_grad_norm": 0.0,
        }
        return check_config(SFTConfig, settings | changes, "config:")

    return config


class Point(nn.Module):
    """w, with the loss ½ (w − x)² for each number x: the gradient at 0 is −x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return 0.5 * ((self.w - numbers) ** 2).sum()


def one_step(
    config: SFTConfig, micro_batches: Sequence[Sequence[float]]
) -> tuple[float, float, TrainedModule]:
    """The loss and w after one step."""
    trained = TrainedModule(Point(), config, config, total_steps=10)
    batches = [torch.tensor(numbers) for numbers in micro_batches]
    (loss,) = optimizer_step([trained], batches, lambda batch: [trained(batch)], len)
    parameters = list(trained.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=hasattr(parameters[0], "ds_id")):
        return loss, trained.module.w.item(), trained


def adam(gradient: float) -> float:
    """w after the first step from 0."""
    return -LEARNING_RATE * gradient / (abs(gradient) + 1)


WHOLE = [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
UNEVEN = [[1.0, 2.0, 3.0], [4.0], [5.0, 6.0], []]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("micro_batches", [WHOLE, UNEVEN], ids=["whole", "uneven"])
def test_the_division_into_micro_batches_changes_nothing(configured, micro_batches, stage) -> None:
    config = configured(
        gradient_accumulation_steps=len(micro_batches),
        deepspeed={"zero_optimization": {"stage": stage}},
    )
    loss, w, _ = one_step(config, micro_batches)
    assert loss == pytest.approx(0.5 * 91 / 6, rel=1e-6)
    assert w == pytest.approx(adam(-3.5), rel=1e-5)
    mean_of_means = adam(-(2 + 4 + 5.5) / 3)
    assert abs(w - mean_of_means) > 1e-3


def test_gradients_are_equal_whatever_the_accumulation(configured, tiny_llama) -> None:
    """A policy's own gradients, with micro-batches of 5, 1, 3 and no scored tokens."""
    ids = torch.tensor([[1, 9, 8, 7, 6, 5], [1, 4, 30, 31, 32, 33], [1, 50, 51, 52, 2, 20]])
    lengths = (5, 1, 3, 0)
    rows = [
        (ids[min(k, 2)][None], torch.arange(6)[None] >= 6 - length)
        for k, length in enumerate(lengths)
    ]
    whole = [(torch.cat([row for row, _ in rows]), torch.cat([scored for _, scored in rows]))]
    start = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    found = []
    for parts in (whole, rows):
        tiny_llama.load_state_dict(start)
        trained = TrainedModule(
            Policy(tiny_llama), (config := configured(gradient_accumulation_steps=len(parts))),
            config, total_steps=1,
        )  # fmt: skip
        gradients: list[torch.Tensor] = []
        trained.engine.optimizer.register_step_pre_hook(
            lambda optimizer, *rest, into=gradients: into.extend(
                p.grad.clone() for group in optimizer.param_groups for p in group["params"]
            )
        )

        def loss_sums(part, trained=trained):
            ids, scored = part
            return [-trained(ids, torch.ones_like(ids), scored)[0].sum()]

        (loss,) = optimizer_step([trained], parts, loss_sums, lambda part: int(part[1].sum()))
        found.append((loss, gradients))
    (loss_1, gradients_1), (loss_4, gradients_4) = found
    assert loss_1 == pytest.approx(loss_4, rel=1e-6)
    assert max(gradient.abs().max() for gradient in gradients_1) > 1e-2
    for one, four in zip(gradients_1, gradients_4, strict=True):
        torch.testing.assert_close(one, four, rtol=1e-4, atol=1e-6)


def test_several_modules_step_together(configured) -> None:
    config = configured()
    points = [TrainedModule(Point(), config, config, 10) for _ in range(2)]
    losses = optimizer_step(
        points,
        [torch.tensor([1.0, 3.0])],
        lambda batch: [points[0](batch), points[1](2 * batch)],
        len,
    )
    assert losses == pytest.approx([2.5, 10.0])
    assert [p.module.w.item() for p in points] == pytest.approx([adam(-2.0), adam(-4.0)], rel=1e-5)


def test_a_batch_without_items_changes_nothing(configured) -> None:
    loss, w, _ = one_step(configured(), [[]])
    assert (loss, w) == (0.0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_before_the_step(configured, bad: float) -> None:
    config = configured(gradient_accumulation_steps=2)
    trained = TrainedModule(Point(), config, config, 10)
    with pytest.raises(NotFiniteError, match=r"the loss is \[(nan|inf)\]"):
        optimizer_step(
            [trained],
            [torch.tensor([bad]), torch.tensor([1.0])],
            lambda batch: [trained(batch)],
            len,
        )
    assert trained.module.w.item() == 0.0


class Root(Point):
    """√|w| at 0: the value is 0, the gradient is not a number."""

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return self.w.abs().sqrt().sum() * numbers.sum()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_ends_before_any_step(configured, stage, bf16) -> None:
    config = configured(
        gradient_accumulation_steps=2,
        bf16=bf16,
        deepspeed={"zero_optimization": {"stage": stage}},
    )
    dtype = precision(config)
    sound, broken = (TrainedModule(m().to(dtype), config, config, 10) for m in (Point, Root))
    batches = [torch.tensor([1.0], dtype=dtype), torch.tensor([2.0], dtype=dtype)]
    with pytest.raises(NotFiniteError, match=r"gradients are not \(2 parameter tensors\)"):
        optimizer_step([sound, broken], batches, lambda batch: [sound(batch), broken(batch)], len)
    for trained in (sound, broken):
        parameters = list(trained.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
            assert trained.module.w.item() == 0.0


@pytest.fixture
def fp16_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs compute in float16, if slowly; not all of them to DeepSpeed's satisfaction."""
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)


def test_fp16_is_refused_where_it_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)
    engine.require_fp16(False)
    with pytest.raises(UserError, match="fp16: this machine's cpu does not train in it"):
        engine.require_fp16(True)


@pytest.mark.usefixtures("fp16_everywhere")
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_fp16_gradients_that_never_are_finite_end_the_run(configured, stage: int) -> None:
    """At every loss scale: after the smallest one there is nothing left to try."""
    config = configured(fp16=True, deepspeed={"zero_optimization": {"stage": stage}})
    trained = TrainedModule(Root().half(), config, config, 10)
    batch = torch.tensor([1.0]).half()

    def steps() -> None:
        for _ in range(100):
            optimizer_step([trained], [batch], lambda batch: [trained(batch).float()], len)

    with pytest.raises(NotFiniteError, match="gradients are not finite, at a loss scale of 1"):
        steps()
    assert trained.module.w.item() == 0.0


@pytest.mark.usefixtures("fp16_everywhere")
def test_fp16_skips_a_step_that_overflows_and_says_so(configured) -> None:
    config = configured(fp16=True, deepspeed={"zero_optimization": {"stage": 2}})
    trained = TrainedModule(Point().half(), config, config, 10)

    def step(number: float) -> dict[str, float]:
        batch = torch.tensor([number]).half()
        optimizer_step([trained], [batch], lambda batch: [trained(batch).float()], len)
        return trained.loss_scaling("train")

    scale = step(200.0)["train/loss_scale"]  # 200 · 65536 is beyond float16
    assert trained.module.w.item() == 0.0
    for skipped in range(2, 30):
        figures = step(200.0)
        if trained.module.w.item() > 0.0:
            break
        assert figures["train/skipped_steps"] == skipped
    assert figures["train/loss_scale"] < scale / 100
    assert trained.module.w.item() == pytest.approx(adam(-200.0), rel=1e-2)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("bf16", [False, True])
def test_an_offloaded_optimizer_takes_the_same_steps(configured, stage: int, bf16: bool) -> None:
    """DeepSpeed's own CPU Adam in place of torch's: what the 7B configs rely on."""
    found = []
    for offload in (None, {"device": "cpu"}):
        zero = {"stage": stage} | ({"offload_optimizer": offload} if offload else {})
        config = configured(
            bf16=bf16, weight_decay=0.1, adam_epsilon=1e-8, deepspeed={"zero_optimization": zero}
        )
        torch.manual_seed(0)
        trained = TrainedModule(nn.Linear(8, 4).to(precision(config)), config, config, 10)
        adam_class = type(trained.engine.optimizer.optimizer).__name__
        assert adam_class == ("DeepSpeedCPUAdam" if offload else "AdamW")
        batch = torch.linspace(-1, 1, 16).view(2, 8).to(precision(config))
        for _ in range(3):
            optimizer_step(
                [trained], [batch], lambda b, t=trained: [t(b).float().pow(2).sum()], len
            )
        parameters = list(trained.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
            found.append([parameter.detach().float().clone() for parameter in parameters])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-2 if bf16 else 1e-5)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_gradient_checkpointing_takes_the_same_step(configured, tiny_llama, stage: int) -> None:
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    scored = torch.ones_like(ids).bool()
    scored[:, 0] = False
    start = copy.deepcopy(tiny_llama.state_dict())
    found = []
    for checkpointing in (False, True):
        config = configured(deepspeed={"zero_optimization": {"stage": stage}})
        model = type(tiny_llama)(tiny_llama.config)
        model.load_state_dict(start)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        trained = TrainedModule(Policy(model), config, config, 10)
        (loss,) = optimizer_step(
            [trained],
            [ids],
            lambda b, t=trained: [-t(b, torch.ones_like(b), scored)[0].sum()],
            lambda b: int(scored.sum()),
        )
        parameters = list(model.parameters())
        with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
            found.append([parameter.detach().clone() for parameter in parameters])
    assert math.isfinite(loss)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", [0, 2])
def test_gradients_are_clipped_by_their_global_norm(configured, stage: int) -> None:
    config = configured(max_grad_norm=1.0, deepspeed={"zero_optimization": {"stage": stage}})
    _, w, trained = one_step(config, WHOLE)
    assert w == pytest.approx(adam(-1.0), rel=1e-4)
    if stage == 2:
        assert trained.grad_norm == pytest.approx(3.5, rel=1e-4)
    else:
        assert math.isnan(trained.grad_norm) or trained.grad_norm == pytest.approx(3.5, rel=1e-4)


def test_learning_rate_is_that_of_the_step_just_taken(configured) -> None:
    """Two warm-up steps and a linear decay over four: 0, ½, 1, ½ of the maximum."""
    config = configured(lr_scheduler_type="linear", warmup_ratio=0.5)
    trained = TrainedModule(Point(), config, config, total_steps=4)
    rates, positions = [], []
    for _ in range(4):
        optimizer_step([trained], [torch.ones(1)], lambda batch: [trained(batch)], len)
        rates.append(trained.learning_rate)
        positions.append(trained.module.w.item())
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.05])
    moved = [b - a for a, b in zip([0.0, *positions], positions, strict=False)]
    assert moved[0] == 0.0
    assert all(step > 0 for step in moved[1:])


def test_deepspeed_gets_what_the_stages_fields_say(configured) -> None:
    config = configured(
        per_device_train_batch_size=3,
        gradient_accumulation_steps=5,
        bf16=True,
        max_grad_norm=0.7,
        deepspeed={"zero_optimization": {"stage": 2}, "wall_clock_breakdown": False},
    )
    section = deepspeed_config(config, config)
    assert section["train_micro_batch_size_per_gpu"] == 3
    assert section["gradient_accumulation_steps"] == 5
    assert section["train_batch_size"] == 15
    assert section["gradient_clipping"] == 0.7
    assert section["bf16"] == {"enabled": True}
    assert section["fp16"] == {"enabled": False}
    assert section["zero_optimization"] == {"stage": 2}
    assert precision(config) == torch.bfloat16


def test_weight_decay_leaves_biases_and_norms_alone(configured) -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    config = configured(weight_decay=0.1)
    decayed, free = engine.adamw(list(module.parameters()), config, config).param_groups
    assert ([p.shape for p in decayed["params"]], decayed["weight_decay"]) == ([(2, 3)], 0.1)
    assert (len(free["params"]), free["weight_decay"]) == (3, 0.0)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_frozen_model_computes_the_same_and_is_not_trained(tiny_llama, stage: int) -> None:
    ids = torch.tensor([[1, 9, 8, 7]])
    scored = torch.tensor([[False, True, True, True]])
    own, _ = Policy(tiny_llama)(ids, torch.ones_like(ids), scored)
    continued = tiny_llama.generate(ids, max_new_tokens=4, do_sample=False).tolist()
    section = {"zero_optimization": {"stage": stage}} if stage else {}
    frozen = engine.frozen(Policy(tiny_llama).train(), section, torch.float32)
    assert not any(module.training for module in getattr(frozen, "module", frozen).modules())
    assert not any(p.requires_grad for p in frozen.parameters())
    with torch.no_grad():
        for _ in range(2):
            found, _ = frozen(ids, torch.ones_like(ids), scored)
            torch.testing.assert_close(found, own.detach())
            with whole_parameters(frozen) as module:
                output = module.model.generate(ids, max_new_tokens=4, do_sample=False)
            assert output.tolist() == continued


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_whole_parameters_generate_and_training_goes_on(configured, tiny_llama, stage: int) -> None:
    ids = torch.tensor([[1, 9, 8, 7]])
    expected = tiny_llama.generate(ids, max_new_tokens=4, do_sample=False).tolist()
    config = configured(deepspeed={"zero_optimization": {"stage": stage}})
    trained = TrainedModule(Policy(tiny_llama), config, config, 10)
    trained.engine.train()
    for _ in range(2):
        with whole_parameters(trained.engine) as module, torch.no_grad():
            assert not module.training
            found = module.model.generate(ids, max_new_tokens=4, do_sample=False).tolist()
            assert found == expected
        assert trained.engine.module.training
    scored = torch.tensor([[False, True, True, True]])
    losses = [
        optimizer_step(
            [trained], [ids], lambda i: [-trained(i, torch.ones_like(i), scored)[0].sum()], len
        )[0]
        for _ in range(2)
    ]
    assert losses[1] < losses[0]
