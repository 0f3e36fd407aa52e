"""Answers and distributions as plain text, for pipes and files."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

from step3_rlhf.chat.session import Session
from step3_rlhf.chat.settings import ChatSettings
from step3_rlhf.chat.shares import Distribution, rows_of
from training.errors import UserError


def answer_lines(session: Session, settings: ChatSettings, lines: Iterable[str]) -> None:
    """Answer every line that is not blank, each in a dialogue of its own.

    Raises:
        UserError: a model cannot take a question; with the number of its line.
    """
    for number, line in enumerate(lines, 1):
        if question := line.strip():
            session.reset()
            try:
                answer_once(session, settings, question)
            except UserError as error:
                raise UserError(f"line {number}: {error}") from None


def answer_once(session: Session, settings: ChatSettings, question: str) -> None:
    """Print every model's answer to a question, or the distribution of its answers."""
    if not settings.share:
        answers = session.ask(question)
        for name, answer in zip(session.names, answers, strict=True):
            print(answer if len(answers) == 1 else f"{name}: {answer}", flush=True)
        return
    with tqdm(
        total=settings.samples * len(session.names), desc="answers", file=sys.stderr, disable=None
    ) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        found = session.distributions(settings.samples, settings.batch_size, question, advance)
    print(shares_text(question, session.names, found, settings.top), flush=True)


def shares_text(
    question: str, names: list[str], distributions: list[Distribution], top: int
) -> str:
    """The distributions of all models, the same answers in the same order in each."""
    rows = rows_of(distributions, top)
    lines = [question]
    for place, (name, distribution) in enumerate(zip(names, distributions, strict=True)):
        lines.append(f"\n{name}: {distribution}")
        width = len(str(distribution.total))
        for row in rows:
            share = row.shares[place]
            lines.append(f"  {share!s:<24} {share.count:>{width}}  {row.label}")
    return "\n".join(lines) + "\n"
