"""A conversation: all models are asked the same, and each remembers its own answers."""

from collections.abc import Callable, Sequence
from functools import partial

from step3_rlhf.chat.arguments import is_utf8
from step3_rlhf.chat.shares import Distribution
from step3_rlhf.chat.speakers import Answer, Speaker
from training.data import Dialogue, Message
from training.errors import UserError

ANSWER, SHARE = 3, 4
"""Purposes of a draw, beside those of prompts.py; a draw's seed is (seed, purpose, its number)."""

Watch = Callable[[int, str], None]
"""Is given the number of the model that answers and its text so far, at last the whole answer."""
Advance = Callable[[int], None]
"""Is given the number of answers that have just been drawn."""


def ignore(*_: object) -> None:
    """Watches nothing."""


class Session:
    """The dialogues with all models, and the draws so far."""

    def __init__(
        self, speakers: Sequence[Speaker], beginning: Sequence[Message], seed: int
    ) -> None:
        """
        Args:
            beginning: the system message, if there is one.
            seed: two sessions with the same seed and the same questions get the same answers.
        """
        self.speakers = speakers
        self.seed = seed
        self._beginning: Dialogue = tuple(beginning)
        self._answered = 0
        self.reset()

    @property
    def names(self) -> list[str]:
        return [speaker.name for speaker in self.speakers]

    def reset(self) -> None:
        """Forget the dialogue. The draws go on, so that the same question gets another answer."""
        self._dialogues = [self._beginning for _ in self.speakers]
        self._asked: list[Dialogue] = []

    def ask(self, question: str, watch: Watch = ignore) -> list[Answer]:
        """Every model's answer, one after the other; all of them draw with the same uniforms.

        The dialogues grow only when all have answered: a question whose answer was stopped is
        forgotten, but `distributions` can still be asked for it.

        Raises:
            UserError: the question is not UTF-8, or a model cannot take the dialogue.
        """
        self._begin(question)
        seed = (self.seed, ANSWER, self._answered)
        self._answered += 1
        answers: list[Answer] = []
        for place, (speaker, prompt) in enumerate(zip(self.speakers, self._asked, strict=True)):
            answers.append(speaker.answer(prompt, seed, partial(watch, place)))
            watch(place, str(answers[-1]))
        self._dialogues = [
            (*prompt, {"role": "assistant", "content": answer.text})
            for prompt, answer in zip(self._asked, answers, strict=True)
        ]
        return answers

    def distributions(
        self, samples: int, batch: int, question: str | None = None, advance: Advance = ignore
    ) -> list[Distribution]:
        """The distribution of every model's answers to a question; the dialogues stay as they are.

        Args:
            samples: answers to draw from each model.
            batch: answers to draw at the same time.
            question: None is the last one that was asked.

        Raises:
            UserError: nothing was asked, or a model cannot take the dialogue.
        """
        if question is not None:
            self._begin(question)
        if not self._asked:
            raise UserError("ask something first: /share shows the answers to the last question")
        seeds = [(self.seed, SHARE, number) for number in range(samples)]
        found = []
        for speaker, prompt in zip(self.speakers, self._asked, strict=True):
            drawn: list[str] = []
            for start in range(0, samples, batch):
                part = speaker.answers(prompt, seeds[start : start + batch])
                drawn += map(str, part)
                advance(len(part))
            found.append(Distribution(drawn))
        return found

    def _begin(self, question: str) -> None:
        if not is_utf8(question):
            raise UserError("the question is not UTF-8; convert it with iconv")
        turn = {"role": "user", "content": question}
        self._asked = [(*dialogue, turn) for dialogue in self._dialogues]
