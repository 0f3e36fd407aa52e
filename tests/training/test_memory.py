"""Memory by formula: against DeepSpeed's estimators, known counts, and measured bytes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    FNetConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from training.dry_run import sharding_of
from training.memory import (
    Shape,
    Sharding,
    activations,
    forward,
    frozen_weights,
    key_value_cache,
    logits,
    offloaded_weights,
    trained_states,
)
from training.models.families.float32_logits import Float32Logits
from training.models.logprobs import token_logprobs
from training.models.pretrained import Pretrained

BF16, FLOAT32 = torch.bfloat16, torch.float32
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "model_configs"
KNOWN = {
    "opt-1.3b": 1_315_758_080,
    "llama-2-7b": 6_738_415_616,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "smollm2": 134_515_008,
}


def shape_of(name: str) -> Shape:
    data = json.loads((FIXTURES / f"{name}.json").read_text())
    config = AutoConfig.for_model(data.pop("model_type"), **data)
    return Shape.of(Pretrained("model", config=config).on_meta(AutoModelForCausalLM))


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_are_the_known_ones(name: str) -> None:
    assert shape_of(name).parameters == KNOWN[name]


@pytest.mark.parametrize("processes", [1, 4, 8])
@pytest.mark.parametrize("name", ["opt-1.3b", "llama-2-7b"])
def test_model_states_are_deepspeeds_own_estimates(name: str, processes: int) -> None:
    shape = shape_of(name)
    _, zero_2 = estimate_zero2_model_states_mem_needs(
        shape.parameters, processes, 1, cpu_offload=False
    )
    own = trained_states(shape, BF16, Sharding(2, processes))
    assert own.total == pytest.approx(zero_2, abs=8)
    _, zero_3, _ = estimate_zero3_model_states_mem_needs(
        shape.parameters, shape.largest_layer, processes, 1, cpu_offload=False
    )
    own = trained_states(shape, BF16, Sharding(3, processes))
    assert own.total == pytest.approx(zero_3, abs=8)
    host, offloaded = estimate_zero2_model_states_mem_needs(shape.parameters, processes, 1)
    own = trained_states(shape, BF16, Sharding(2, processes, offload_optimizer=True))
    assert own.total == offloaded
    if processes <= 4:  # beyond that DeepSpeed counts a copy of the weights for each
        assert own.host * 1.5 == host  # with its buffers
    _, offloaded, _ = estimate_zero3_model_states_mem_needs(
        shape.parameters, shape.largest_layer, processes, 1, cpu_offload_params=False
    )
    own = trained_states(shape, BF16, Sharding(3, processes, offload_optimizer=True))
    assert own.total == pytest.approx(offloaded, abs=8)


def test_by_hand() -> None:
    """10 parameters of which 4 are trained; the largest layer has 3; two processes."""
    shape = Shape(10, 4, 3, 1, 1, 1, 1, 1, False, 1, False, 1)
    whole = trained_states(shape, FLOAT32, Sharding(0, 2))
    assert (whole.weights, whole.gradients, whole.optimizer) == (40, 16, 32)
    one = trained_states(shape, BF16, Sharding(1, 2))
    assert (one.weights, one.gradients, one.optimizer) == (20, 8, 32)
    three = trained_states(shape, BF16, Sharding(3, 2))
    assert (three.weights, three.gradients, three.optimizer) == (10 + 12, 0, 32)
    assert frozen_weights(shape, BF16, Sharding(3, 2)) == 10 + 6
    assert frozen_weights(shape, BF16, Sharding(3, 2, offload_parameters=True)) == 6
    assert trained_states(shape, BF16, Sharding(1, bucket=5)).buckets == 20
    assert trained_states(shape, BF16, Sharding(2, bucket=5)).buckets == 10


@pytest.mark.parametrize(
    ("zero", "elements"),
    [
        (None, 0),
        ({"stage": 0}, 0),
        ({"stage": 2}, 500_000_000),  # DeepSpeed's own default
        ({"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000}, 2000),  # two in turn
        ({"stage": 3, "reduce_bucket_size": 1000}, 1000),
        ({"stage": 1, "contiguous_gradients": False}, 0),
    ],
)
def test_gradient_buckets_are_deepspeeds(zero: dict[str, object] | None, elements: int) -> None:
    section = {} if zero is None else {"zero_optimization": zero}
    assert sharding_of(section, 1).bucket == elements


def test_cache_and_logits_by_hand() -> None:
    shape = replace(shape_of("llama-3.2-1b"), vocabulary=100)
    # 2 (keys, values) x 16 layers x 8 heads x 64 x 3 sequences x 50 tokens x 2 bytes
    assert key_value_cache(shape, 3, 50, BF16) == 2 * 16 * 8 * 64 * 3 * 50 * 2
    # Logits in float32, and a block of them once more, or their gradients in bfloat16
    assert logits(shape, 10, BF16) == (4 + 4) * 10 * 100
    assert logits(shape, 10**6, BF16) == (4 + 2) * 10**8  # all are kept
    assert logits(shape, 10**6, BF16, kept=False) == (4 + 4) * 1024 * 100  # chunk by chunk
    assert logits(shape, 10**7, BF16) == (4 + 4) * 1024 * 100  # too many to keep
    assert logits(shape, 10, FLOAT32) == (4 + 4) * 10 * 100


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes that the CPU's allocator holds at one time during `work`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("with_entropy", [False, True])
def test_logits_are_what_their_backward_pass_holds(with_entropy: bool) -> None:
    rows, vocabulary = 512, 4000
    head = Float32Logits.like(nn.Linear(16, vocabulary, bias=False).to(BF16))
    hidden = torch.randn(rows, 16, dtype=BF16, requires_grad=True)
    targets = torch.randint(vocabulary, (rows,))

    def work() -> None:
        logp, _ = token_logprobs(hidden, targets, head, with_entropy, keep_logits=True)
        logp.sum().backward()

    work()
    shape = replace(shape_of("opt-1.3b"), vocabulary=vocabulary)
    assert peak_of(work) == pytest.approx(logits(shape, rows, BF16), rel=0.1)


def kept_by_autograd(model: PreTrainedModel, tokens: torch.Tensor) -> int:
    """Bytes that the decoder's forward pass keeps for its backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    mask = torch.ones_like(tokens)
    mask[0, :10] = 0  # padding, as in training
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.get_decoder()(input_ids=tokens, attention_mask=mask, use_cache=False)
    total = sum(found.values())  # while `output` holds the graph, no address is used twice
    del output
    return total


def tall_models() -> dict[str, PreTrainedModel]:
    """Wide enough that what does not grow with the layers is small."""
    llama = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=352, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    opt = OPTConfig(
        vocab_size=64, hidden_size=128, ffn_dim=512, num_hidden_layers=6, num_attention_heads=8,
        word_embed_proj_dim=128, max_position_embeddings=128, dropout=0.1,
    )  # fmt: skip
    gpt2 = GPT2Config(
        vocab_size=64, n_embd=128, n_layer=6, n_head=8, n_positions=128, attn_pdrop=0.0
    )
    return {
        "llama": LlamaForCausalLM(llama),
        "opt": OPTForCausalLM(opt),
        "gpt2": GPT2LMHeadModel(gpt2),
    }


@pytest.mark.parametrize("dtype", [FLOAT32, BF16])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_activations_are_what_autograd_keeps(name: str, dropout: bool, dtype: torch.dtype) -> None:
    model = tall_models()[name].to(dtype).train(dropout)
    tokens = torch.randint(64, (4, 96))

    def estimate(checkpointing: bool) -> int:
        return activations(Shape.of(model), tokens.numel(), dtype, checkpointing, dropout)

    assert estimate(False) == pytest.approx(kept_by_autograd(model, tokens), rel=0.1)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    assert kept_by_autograd(model, tokens) < estimate(True) < estimate(False) / 2


def test_dropout_counts_where_a_model_has_it() -> None:
    shapes = {name: Shape.of(model) for name, model in tall_models().items()}
    assert [shapes[name].dropout for name in ("llama", "opt", "gpt2")] == [False, True, True]
    on, off = (activations(shapes["opt"], 10, BF16, False, dropout) for dropout in (True, False))
    assert on - off == 6 * 2 * 128 * 10 * 2  # layers, masks, hidden, tokens, bytes


def test_offloaded_frozen_weights_are_in_the_hosts_memory() -> None:
    """Once in all processes, beside what an offloaded optimizer keeps there."""
    shape = shape_of("opt-1.3b")
    offloaded = Sharding(3, 4, offload_parameters=True)
    assert offloaded_weights(shape, BF16, offloaded) == 2 * KNOWN["opt-1.3b"]
    assert offloaded_weights(shape, BF16, Sharding(3, 4)) == 0
    assert offloaded_weights(shape, BF16, Sharding(2, 4, offload_parameters=True)) == 0
    both = Sharding(3, 4, offload_optimizer=True, offload_parameters=True)
    assert trained_states(shape, BF16, both).host == (16 + 2) * KNOWN["opt-1.3b"]


def test_a_forward_pass_without_gradients_holds_one_layer() -> None:
    shape = shape_of("opt-1.3b")
    whole = activations(shape, 100, BF16, checkpointing=False)
    assert forward(shape, 100, BF16) * shape.layers == whole


def test_a_model_that_is_built_in_another_way_has_its_weights_counted() -> None:
    config = FNetConfig(num_hidden_layers=1, hidden_size=8, intermediate_size=8, vocab_size=9)
    model = Pretrained("model", config=config).on_meta(AutoModelForSequenceClassification)
    with pytest.raises(AttributeError):
        Shape.of(model)
    shape = Shape.of_weights(model)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert frozen_weights(shape, BF16, Sharding()) == 2 * shape.parameters
    assert forward(shape, 100, BF16) == 0
