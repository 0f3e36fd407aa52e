"""Rewards from a user's Python function, which may be asynchronous."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from torch import Tensor

from step3_rlhf.rewards.answers import agreed, checked, described
from step3_rlhf.rollout import Rollout
from training.errors import UserError
from training.plugins import import_callable

RewardFunction = Callable[[list[str], list[str]], Any]
"""Takes B prompts and B responses; gives B numbers, or something to await that gives them."""


class FunctionReward:
    """Rewards from `module:callable`, which must give one finite number per response."""

    def __init__(self, function: RewardFunction, name: str) -> None:
        self.function = function
        self.name = name
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, rollout: Rollout) -> Tensor:
        return agreed(lambda: self._checked(rollout), rollout)

    def _checked(self, rollout: Rollout) -> list[float]:
        source = f"reward.function {self.name}"
        try:
            answer = self._answer(list(rollout.prompts), list(rollout.responses))
        except Exception as error:
            where = self._culprit(rollout, error)
            raise UserError(f"{source} raised {error!r}{where}") from error
        return checked(answer, rollout, source)

    def _answer(self, prompts: list[str], responses: list[str]) -> Any:
        answer = self.function(prompts, responses)
        if not inspect.isawaitable(answer):
            return answer
        if self._loop is None:  # one for the whole run: a client's connections belong to their loop
            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(_awaited(answer))

    def _culprit(self, rollout: Rollout, error: Exception) -> str:
        """Which response the function fails on, found by giving it one at a time."""
        for row, (prompt, response) in enumerate(
            zip(rollout.prompts, rollout.responses, strict=True)
        ):
            try:
                self._answer([prompt], [response])
            except Exception as again:
                same = type(again) is type(error)
                return f" for {described(rollout, row)}" if same else ""
        return ""


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


def import_function(path: str) -> RewardFunction:
    """The function that the config names; see import_callable."""
    function: RewardFunction = import_callable(path, "reward.function")
    return function
