"""Numbers that a user's function or server gives to responses: checked before they are used."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from step3_rlhf.rollout import Rollout
from training.errors import UserError
from training.runtime import ranks

NAMES = ("rewards", "reward", "scores", "score")
"""Where the numbers are in an answer that is an object, as OpenRLHF's servers and functions give;
the first of these names that is there counts."""


def checked(answer: Any, rollout: Rollout, source: str) -> list[float]:
    """The rewards [B] of an answer to B prompts and responses.

    Args:
        answer: a list, array or tensor of numbers, or an object with one of NAMES.
        source: who gave it, for messages.

    Raises:
        UserError: there are more or fewer numbers than responses, or one is not finite.
    """
    if isinstance(answer, dict):
        name = next((name for name in NAMES if name in answer), None)
        if name is None:
            keys = ", ".join(map(repr, list(answer)[:5])) or "nothing in it"
            raise UserError(f"{source} returned an object without 'rewards': it has {keys}")
        answer = answer[name]
    try:
        values = list(answer)
    except TypeError:
        raise UserError(
            f"{source} returned {answer!r}; one number for each response is needed"
        ) from None
    if len(values) != len(rollout):
        raise UserError(f"{source} returned {len(values)} rewards for {len(rollout)} responses")
    rewards = []
    for row, value in enumerate(values):
        while isinstance(value, list | tuple) and len(value) == 1:
            value = value[0]
        try:
            rewards.append(float(value))
        except (TypeError, ValueError):
            rewards.append(math.nan)
        if not math.isfinite(rewards[-1]):
            raise UserError(f"{source} returned {value!r} for {described(rollout, row)}")
    return rewards


def described(rollout: Rollout, row: int) -> str:
    """A prompt and its response, for messages."""
    return f"the prompt {rollout.prompts[row]!r} and the response {rollout.responses[row]!r}"


def agreed(ask: Callable[[], list[float]], rollout: Rollout) -> Tensor:
    """[B] float32: what `ask` gives; a fault on one rank ends all of them, with its message.

    Raises:
        UserError: that of the first rank that had one.
    """
    try:
        rewards, fault = ask(), None
    except UserError as error:
        rewards, fault = [], error
    messages = [text for text in ranks.gather_objects([fault and str(fault)]) if text]
    if messages:
        raise UserError(messages[0]) from fault
    return torch.tensor(rewards, device=rollout.input_ids.device)
