"""Decodes with a policy: a prompt in one pass, then one token of every row per step.

Consecutive rows with the same prompt share its pass: each begins with a copy of its cache.

Nothing in a step waits for the device. On a GPU the step is captured once as a CUDA graph and then
replayed: a step of a model with 24 layers launches about 440 kernels, and launching them one by one
takes longer than they run.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from training.models.decoding.cache import Columns, PreallocatedLayer
from training.models.decoding.few_rows import few_rows
from training.models.families.own_head import decoder_of
from training.models.logprobs import position_ids
from training.models.policy import Policy

STEPS_BETWEEN_CHECKS = 16
"""Steps after which it is asked whether all rows are finished, the only wait for the device."""

EAGER_STEPS = 3
"""Steps before the capture, in which CUDA's libraries allocate what they need."""

Chooser = Callable[[Tensor], Tensor]
"""Takes logits [rows, vocabulary] float32 and returns the next token of each row, [rows]."""


def has_decoder(policy: Policy) -> bool:
    """Whether the policy's layers follow a given mask, positions and cache, judged by its config.

    Whether they compute the same then is found out by comparison when the model is loaded.
    """
    decoder = decoder_of(policy.model)
    config = policy.model.config.get_text_config()
    takes = inspect.signature(decoder.forward).parameters
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    return (
        {"past_key_values", "position_ids", "attention_mask"} <= takes.keys()
        and getattr(config, "_attn_implementation", "") in ("sdpa", "eager")
        and not getattr(config, "is_encoder_decoder", False)
        and set(kinds) == {"full_attention"}
        and not getattr(config, "sliding_window", None)
        and isinstance(getattr(config, "num_hidden_layers", None), int)
    )


class Decoder:
    """Decodes one batch of left-padded prompts."""

    def __init__(
        self, policy: Policy, ids: Tensor, mask: Tensor, steps: int, fixed_shapes: bool = False
    ) -> None:
        """
        Args:
            ids, mask: [rows, prompt columns], padded on the left. If they are on the host, nothing
                waits for the device.
            steps: the most tokens that are drawn for each row.
            fixed_shapes: every step has the same shapes, as a CUDA graph needs; always so on a GPU.
        """
        self.policy = policy
        self.model = decoder_of(policy.model)
        self.steps = steps
        rows, prompt = ids.shape
        device = policy.model.device
        distinct, prompt_of = torch.unique_consecutive(
            torch.stack([ids, mask.long()]), dim=1, return_inverse=True
        )
        self.prompt_of = prompt_of.to(device)
        self.ids, prompt_mask = distinct.to(device)
        self.prompt_mask = prompt_mask.bool()
        on_gpu = device.type == "cuda"
        self.captures = on_gpu and torch.cuda.is_available()
        self.fixed_shapes = fixed_shapes or on_gpu
        config = policy.model.config.get_text_config()
        self.columns = Columns(prompt + steps - 1, self.prompt_of, reads_all=self.fixed_shapes)
        layers = [PreallocatedLayer(self.columns) for _ in range(config.num_hidden_layers)]
        self.cache = Cache(layers=list(layers))
        additive = config._attn_implementation == "eager"
        dtype = policy.model.dtype if additive else torch.bool
        self.seen = 0.0 if additive else True
        self.hidden = torch.finfo(dtype).min if additive else False
        # What the next token of each row attends to, [rows, 1, 1, columns].
        self.mask = torch.full(
            (rows, 1, 1, self.columns.capacity), self.hidden, dtype=dtype, device=device
        )
        self.mask[:, 0, 0, :prompt].masked_fill_(self.prompt_mask[self.prompt_of], self.seen)
        self.prompt_positions = position_ids(prompt_mask)
        self.position = self.prompt_positions[self.prompt_of, -1:]
        self.token = torch.zeros_like(self.position)

    @torch.no_grad()
    def run(
        self,
        choose: Chooser,
        finished: Callable[[], Tensor],
        steps_between_checks: int = STEPS_BETWEEN_CHECKS,
    ) -> None:
        """Draw up to `steps` tokens for each row.

        Args:
            choose: is called once per step, with the logits of the next tokens.
            finished: says for each row, [rows] bool, whether its further tokens are not needed.
            steps_between_checks: steps after which `finished` is asked; each time waits for the
                device.
        """
        with few_rows(self.policy.model):
            self.token.copy_(choose(self._read_prompt())[:, None])
            advance = self._eager(choose)
            for step in range(1, self.steps):
                if self.captures and step == EAGER_STEPS:
                    advance = self._captured(advance)
                advance()
                if step % steps_between_checks == 0 and bool(finished().all()):
                    break

    def _read_prompt(self) -> Tensor:
        """Logits [rows, vocabulary] of each row's first token."""
        columns, prompt = self.prompt_mask.shape[1], self.prompt_mask
        causal = torch.ones(columns, columns, dtype=torch.bool, device=self.ids.device).tril()
        itself = torch.eye(columns, dtype=torch.bool, device=self.ids.device)  # padding's only one
        visible = self.mask.new_full((len(prompt), 1, columns, columns), self.hidden)
        visible[:, 0].masked_fill_(causal & (prompt[:, None] | itself), self.seen)
        return self._logits(self.ids, visible, self.prompt_positions)[self.prompt_of]

    def _eager(self, choose: Chooser) -> Callable[[], None]:
        def advance() -> None:
            self.position += 1
            self.mask.index_fill_(3, self.columns.next, self.seen)
            read = self.columns.capacity if self.fixed_shapes else self.columns.filled + 1
            logits = self._logits(self.token, self.mask[..., :read], self.position)
            self.token.copy_(choose(logits)[:, None])

        return advance

    def _captured(self, advance: Callable[[], None]) -> Callable[[], None]:
        """Record one step, which is not executed by that, and return its replay."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            advance()
        return graph.replay

    def _logits(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.columns.advance(ids.shape[1])
        return self.policy.logits(output.last_hidden_state[:, -1])
