"""Decoding on its own, in a process of its own:

    python -m step3_rlhf.gpu_check.decoding graph
    python -m step3_rlhf.gpu_check.decoding SHAPE

The first draws tokens with a CUDA graph and without one; the second measures decode steps of a
model of the given shape. Prints one line of JSON.
"""

import json
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    set_seed,
)

from step3_rlhf.benchmark.floor import read_rate
from step3_rlhf.config import SamplingSettings
from step3_rlhf.generation.drawing import Draws, uniforms
from training.models.decoding.decoder import Decoder
from training.models.policy import Policy
from training.runtime.ranks import device

SHAPES: dict[str, PretrainedConfig] = {
    "tiny": LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    ),
    "opt-1.3b": OPTConfig(
        vocab_size=50272, hidden_size=2048, ffn_dim=8192, num_hidden_layers=24,
        num_attention_heads=32, word_embed_proj_dim=2048,
    ),
    "llama-1b": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    ),
}  # fmt: skip
"""Models whose decode steps are measured; `llama-1b` is that of Llama 3.2."""
FAMILIES: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4),
    "llama": SHAPES["tiny"],
    "opt": OPTConfig(
        vocab_size=512, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=64,
    ),
}  # fmt: skip
"""Tiny models that a graph must draw the same tokens from."""
ROWS = (4, 24, 64)
"""Responses that are decoded together."""
PROMPT = 128
"""Tokens."""
WARM, STEPS = 16, 64
"""Steps before those that are measured, which include the capture of a graph; and these."""
TRIES = 3
"""Of which the fastest counts."""


def same_tokens(config: PretrainedConfig, rows: int = 5, steps: int = 24) -> bool:
    """Whether a CUDA graph draws the tokens of single launches, from left-padded prompts.

    In float32, and with weights that make distributions uneven: products that round differently
    would show as other tokens in no more than one draw of a million.
    """
    policy = random_policy(config, torch.float32)
    for parameter in policy.parameters():
        nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(5, config.vocab_size, (rows, 9), device=device())
    mask = torch.arange(9, device=device()) >= torch.arange(rows, device=device())[:, None]
    captured, launched = (
        drawn(policy, ids, mask.long(), steps, captures) for captures in (True, False)
    )
    return torch.equal(captured, launched)


def step_seconds(policy: Policy, rows: int, captures: bool) -> float:
    """Seconds of a decode step of `rows` responses: what further steps add to a decoding."""
    ids = torch.randint(5, policy.model.config.vocab_size, (rows, PROMPT), device=device())

    def seconds(steps: int) -> float:
        start = time.perf_counter()
        drawn(policy, ids, torch.ones_like(ids), steps, captures)
        return time.perf_counter() - start

    few, many = (min(seconds(steps) for _ in range(TRIES)) for steps in (WARM, WARM + STEPS))
    return (many - few) / STEPS


def drawn(policy: Policy, ids: Tensor, mask: Tensor, steps: int, captures: bool) -> Tensor:
    """Draw [rows, steps] tokens, which end nowhere; returns once the device has drawn them."""
    seeds = [(0, row) for row in range(len(ids))]
    settings = SamplingSettings(response_length=steps)
    draws = Draws(uniforms(seeds, steps), settings, (-1,), 0, ids.device)
    decoder = Decoder(policy, ids, mask, steps)
    decoder.captures = captures and decoder.captures
    decoder.run(draws.choose, lambda: draws.ended)
    return draws.tokens.cpu()


def random_policy(config: PretrainedConfig, dtype: torch.dtype) -> Policy:
    """A policy with random weights on the device."""
    set_seed(0)
    with torch.device(device()):
        return Policy(AutoModelForCausalLM.from_config(config, dtype=dtype)).eval()


def measured(shape: str) -> dict[str, Any]:
    """Milliseconds of a decode step for each number of rows, and of reading the weights once."""
    on_gpu = device().type == "cuda"
    policy = random_policy(SHAPES[shape], torch.bfloat16 if on_gpu else torch.float32)
    kinds = {"graph": True, "single launches": False} if on_gpu else {"eager": False}
    size = sum(parameter.numel() * parameter.element_size() for parameter in policy.parameters())
    return {
        "ms_per_step": {
            kind: {rows: 1000 * step_seconds(policy, rows, captures) for rows in ROWS}
            for kind, captures in kinds.items()
        },
        "ms_to_read_weights": 1000 * size / read_rate(),
    }


def main(what: str) -> dict[str, Any]:
    if what == "graph":
        return {family: same_tokens(config) for family, config in FAMILIES.items()}
    return measured(what)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
