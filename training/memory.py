"""The memory that a GPU needs: formulae in bytes, from shapes alone.

Model states follow Rajbhandari et al. 2020 (ZeRO, section 3.1) and DeepSpeed's own estimators.
Activations count the tensors that a decoder layer keeps for its backward pass, as in Korthikanti et
al. 2022, for an attention that keeps no [length, length] matrix.
"""

from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig, PreTrainedModel

from training.models.logprobs import BLOCK, MOST_KEPT_LOGITS, ROWS_PER_CHUNK

ADAM = 8
"""Bytes per trained parameter: two float32 moments."""
FLOAT32 = 4
RESIDUAL_DROPOUT = ("dropout", "hidden_dropout", "resid_pdrop")
"""Names that configs give the dropout before each of a layer's two residual additions."""


@dataclass(frozen=True)
class Shape:
    """What the formulae need to know about a model."""

    parameters: int
    trained: int
    largest_layer: int
    """Parameters of the largest single module."""
    layers: int = 0
    hidden: int = 0
    query: int = 0
    """Heads x head size."""
    key: int = 0
    """Key-value heads x head size."""
    intermediate: int = 0
    gated: bool = False
    """As in Llama: a gate beside the up-projection, and norms that compute in float32."""
    inner: int = 0
    """Vectors of the intermediate size that a layer keeps for its backward pass."""
    dropout: bool = False
    vocabulary: int = 0

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Shape":
        """Read the shape from `model`, which may be on the meta device."""
        config = model.config.get_text_config()
        gated = any(name.endswith("gate_proj") for name, _ in model.named_modules())
        return replace(
            cls.of_weights(model),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            query=config.num_attention_heads * _head_size(config),
            key=_key_heads(config) * _head_size(config),
            intermediate=_intermediate(config),
            gated=gated,
            inner=_activation_vectors(config) + (2 if gated else 0),  # up-projection, product
            dropout=any(getattr(config, name, 0) for name in RESIDUAL_DROPOUT),
            vocabulary=model.get_input_embeddings().num_embeddings,
        )

    @classmethod
    def of_weights(cls, model: PreTrainedModel) -> "Shape":
        """Count the parameters only, for a model whose architecture the formulae do not know."""
        parameters = list(model.parameters())
        return cls(
            parameters=sum(p.numel() for p in parameters),
            trained=sum(p.numel() for p in parameters if p.requires_grad),
            largest_layer=max(
                sum(p.numel() for p in module.parameters(recurse=False))
                for module in model.modules()
            ),
        )


def _head_size(config: PretrainedConfig) -> int:
    own = getattr(config, "head_dim", None)
    return own or config.hidden_size // config.num_attention_heads


def _key_heads(config: PretrainedConfig) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _intermediate(config: PretrainedConfig) -> int:
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return 4 * config.hidden_size


def _activation_vectors(config: PretrainedConfig) -> int:
    """The number of inner vectors that the activation function keeps.

    ReLU keeps its output. A function computed by one kernel keeps its input, and the next matrix
    keeps its output. A function composed of single operations, such as GPT-2's, keeps one vector
    for each of them.
    """
    name = str(getattr(config, "hidden_act", None) or getattr(config, "activation_function", ""))
    return {"relu": 1, "silu": 2, "gelu": 2, "gelu_pytorch_tanh": 2}.get(name, 5)


@dataclass(frozen=True)
class Sharding:
    """How DeepSpeed partitions and offloads a model's states."""

    zero_stage: int = 0
    processes: int = 1
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int = 0
    """Gradients that DeepSpeed gathers before reducing them, in all buffers together."""


@dataclass(frozen=True)
class ModelStates:
    """Bytes on one GPU that are held for the whole run."""

    weights: int
    gradients: int
    optimizer: int
    buckets: int = 0
    host: int = 0
    """Offloaded to the hosts' memory, over all processes together."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.buckets


def trained_states(shape: Shape, precision: torch.dtype, sharding: Sharding) -> ModelStates:
    """Weights, gradients and AdamW states of a model that is trained.

    In 16 bit each parameter takes 2 bytes of weights, 2 of gradients, and 4 + 4 + 8 of float32
    weights, gradients and moments. In float32, ZeRO keeps these copies too; without ZeRO there are
    none. Stage 1 partitions the optimizer, stage 2 also the gradients, and stage 3 also the
    weights, of which it holds one whole layer (weights and gradients) and whose only other
    gradients are the float32 ones. If all parameters are trained, the result equals DeepSpeed's
    `estimate_zero2_model_states_mem_needs` and `estimate_zero3_model_states_mem_needs`, plus the
    buckets, which those leave out; stage 1 has buckets in float32.
    """
    size, n = precision.itemsize, sharding.processes
    copies = 2 * FLOAT32 if size < FLOAT32 or sharding.zero_stage > 0 else 0
    optimizer = (copies + ADAM) * shape.trained
    gradients = size * shape.trained
    if sharding.zero_stage >= 1:
        optimizer //= n
    if sharding.zero_stage >= 2:
        gradients //= n
    if sharding.zero_stage == 3:
        gradients = 0
    host = offloaded_weights(shape, precision, sharding)
    if sharding.offload_optimizer:  # float32 weights, gradients, moments: once in all
        optimizer = gradients = 0
        host += (2 * FLOAT32 + ADAM) * shape.trained
    weights = frozen_weights(shape, precision, sharding, True)
    buckets = sharding.bucket * (FLOAT32 if sharding.zero_stage == 1 else size)
    return ModelStates(weights, gradients, optimizer, buckets, host)


def frozen_weights(
    shape: Shape, precision: torch.dtype, sharding: Sharding, with_gradients: bool = False
) -> int:
    """All weights, or ZeRO-3's share plus one whole layer (and, if asked for, its gradients)."""
    size = precision.itemsize
    if sharding.zero_stage < 3:
        return size * shape.parameters
    part = 0 if sharding.offload_parameters else size * shape.parameters // sharding.processes
    return part + (2 if with_gradients else 1) * size * shape.largest_layer


def offloaded_weights(shape: Shape, precision: torch.dtype, sharding: Sharding) -> int:
    """Weights in the hosts' memory, once over all processes; only ZeRO-3 can offload them."""
    offloads = sharding.zero_stage == 3 and sharding.offload_parameters
    return precision.itemsize * shape.parameters if offloads else 0


def activations(
    shape: Shape, tokens: int, precision: torch.dtype, checkpointing: bool, dropout: bool = False
) -> int:
    """What a forward pass over `tokens` (padding included) keeps for the backward pass.

    A layer keeps the inputs and outputs of its two norms (Llama's also two float32 vectors); the
    queries, keys, values and output of the attention, with keys and values repeated for each query
    head, as attention with a padding mask does; and the inner vectors of the feed-forward part.
    Checkpointing keeps the input of every layer, and everything in the layer being recomputed.

    Args:
        dropout: whether the model's dropout is on; it adds two masks, counted as wide as the
            vectors (a GPU needs one byte per entry).
    """
    masks = 2 * shape.hidden if dropout and shape.dropout else 0
    vectors = 4 * shape.hidden + masks + 4 * shape.query + shape.inner * shape.intermediate
    wide = 2 * shape.hidden * FLOAT32 if shape.gated else 0
    layer = (vectors * precision.itemsize + wide) * tokens
    if not checkpointing:
        return shape.layers * layer
    return shape.layers * shape.hidden * tokens * precision.itemsize + layer


def forward(shape: Shape, tokens: int, precision: torch.dtype) -> int:
    """What a forward pass without gradients holds: the vectors of one layer."""
    one = replace(shape, layers=1)
    return activations(one, tokens, precision, checkpointing=False)


def logits(shape: Shape, scored_tokens: int, precision: torch.dtype, kept: bool = True) -> int:
    """The logits (logprobs.py) at the peak of the backward pass, which turns them into gradients.

    They exist in float32. A block of them exists once more; after that, their gradients in the
    model's own precision, if that is not float32.

    Args:
        kept: activations are not recomputed, so that logits are kept up to `MOST_KEPT_LOGITS`.
    """
    chunks = -(-scored_tokens // ROWS_PER_CHUNK)
    kept = kept and chunks * ROWS_PER_CHUNK * shape.vocabulary <= MOST_KEPT_LOGITS
    rows = scored_tokens if kept else min(scored_tokens, ROWS_PER_CHUNK)
    block = min(rows * shape.vocabulary, max(BLOCK, shape.vocabulary))
    copy = precision.itemsize if precision.itemsize < FLOAT32 else 0
    every = rows * shape.vocabulary
    return every * FLOAT32 + max(every * copy, block * FLOAT32)


def key_value_cache(shape: Shape, sequences: int, length: int, precision: torch.dtype) -> int:
    """Keys and values of every layer for all tokens of the sequences drawn together."""
    return 2 * shape.layers * shape.key * sequences * length * precision.itemsize


def drawing(shape: Shape, sequences: int) -> int:
    """The sampler's float64 distribution and its cumulative sum, beside float32 logits."""
    return (2 * 8 + FLOAT32) * sequences * shape.vocabulary
