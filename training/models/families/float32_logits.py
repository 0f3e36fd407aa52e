"""A language model's head whose logits are float32, whatever the precision of its weights.

bfloat16 keeps 8 bits of a logit: at 10 its neighbours are 0.06 apart, and the log-probabilities of
a response of 256 tokens get an error of .2 to .5 nats. Preferences are differences of these.
"""

from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 2**20
"""Weights that are turned to float32 at the same time: 4 MiB, which a CPU's caches hold."""


class Float32Logits(nn.Linear):
    """A linear head with float32 output, computed from its weights as they are."""

    @classmethod
    def like(cls, head: nn.Linear) -> "Float32Logits":
        """Build a head with the same weights under the same names."""
        own = cls(head.in_features, head.out_features, head.bias is not None, device="meta")
        own.weight, own.bias = head.weight, head.bias
        return own

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] float32 of states [..., hidden] in the weights' precision."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits: Tensor = _Product.apply(rows, self.weight)
        bias = self._parameters["bias"]
        if bias is not None:
            logits = logits + bias.float()
        return logits.reshape(*hidden.shape[:-1], self.out_features)


class _Product(torch.autograd.Function):
    """x Wᵀ in float32; its gradients are those of a linear layer, in the weights' precision."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return float32_product(hidden, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        gradient = gradients[0].to(weight.dtype)
        needed = ctx.needs_input_grad
        return (
            gradient @ weight if needed[0] else None,
            gradient.T @ hidden if needed[1] else None,
        )


def float32_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """[rows, vocabulary] float32 x Wᵀ of [rows, hidden] and [vocabulary, hidden] in 16 bit.

    A GPU adds in float32 in any case and only has to keep the result. A CPU's library has no such
    product, so that the weights are turned to float32 there, a block at a time.
    """
    if hidden.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):  # PyTorch 2.8
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    states, size = hidden.float(), max(1, BLOCK // weight.shape[1])
    logits = states.new_empty(len(states), len(weight))
    for first in range(0, len(weight), size):
        part = slice(first, first + size)
        torch.mm(states, weight[part].float().T, out=logits[:, part])
    return logits
