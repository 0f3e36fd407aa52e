"""What a terminal shows, wide and narrow."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from step3_rlhf.chat.bars import printable, shares_bars
from step3_rlhf.chat.screen import Screen
from step3_rlhf.chat.session import Session, Watch, ignore
from step3_rlhf.chat.settings import ChatSettings
from step3_rlhf.chat.shares import Distribution
from step3_rlhf.chat.sources import Source
from step3_rlhf.chat.speakers import Answer, load_speakers
from step3_rlhf.config import SamplingSettings

Shown = Callable[..., str]


def console(width: int) -> Console:
    return Console(
        file=io.StringIO(), width=width, height=40, highlight=False, color_system=None,
        force_terminal=False,
    )  # fmt: skip


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class Hasty(Session):
    """The user stops every answer to "Stop!" as soon as there is one."""

    def ask(self, question: str, watch: Watch = ignore) -> list[Answer]:
        def stop(place: int, text: str) -> None:
            watch(place, text)
            if question == "Stop!" and text:
                raise KeyboardInterrupt

        return super().ask(question, stop)


@pytest.fixture
def session(two_answers: Path) -> Session:
    sources = [Source(str(two_answers), name, "") for name in ("first", "second")]
    return Hasty(load_speakers(sources, SamplingSettings(response_length=4)), (), seed=5)


def conversation(session: Session, width: int, *lines: str) -> str:
    """What a terminal of this width shows for these lines of a user, who then presses Ctrl-D."""
    typed: Iterator[str] = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    shown = console(width)
    Screen(session, ChatSettings(samples=20), shown).converse(read)
    return text_of(shown)


def test_side_by_side_or_one_below_the_other(session: Session) -> None:
    wide = conversation(session, 100, "Drink?").splitlines()
    assert any("first" in line and "second" in line for line in wide)
    narrow = conversation(session, 40, "Drink?").splitlines()
    assert any(line.startswith("first ─") for line in narrow)
    assert any(line.startswith("second ─") for line in narrow)
    assert max(map(len, narrow)) <= 40


@pytest.mark.parametrize("width", [100, 40])
def test_a_stopped_answer_returns_to_the_prompt(session: Session, width: int) -> None:
    shown = conversation(session, width, "Stop!", "/share", "/quit", "never read")
    assert shown.count("stopped") == 1
    assert shown.count("first: 20 answers, 2 different") == 1


def test_commands(session: Session) -> None:
    shown = conversation(session, 100, "", "/share", "/share 0", "/shar", "/help", "Drink?",
                         "/share 30", "/reset", "/share")  # fmt: skip
    assert shown.count("ask something first") == 2
    assert "/share 0 is no command" in shown
    assert "/shar is no command" in shown
    assert shown.count("30 answers") == 2
    assert shown.count("the dialogue is forgotten") == 1


def test_bars_are_on_one_scale() -> None:
    kl = Distribution(["Tea"] * 100)
    pm = Distribution(["Tea"] * 50 + ["Coffee"] * 50)
    shown = console(120)
    shown.print(shares_bars(["kl", "pm"], [kl, pm], top=10, width=120))
    tea, coffee = (
        next(line for line in text_of(shown).splitlines() if line.startswith(answer))
        for answer in ("Tea", "Coffee")
    )
    whole, half = (part.count("█") for part in tea.split("]")[:2])  # an interval ends each part
    assert whole > 10
    assert half == whole // 2
    assert [part.count("█") for part in coffee.split("]")[:2]] == [0, half]
    narrow = console(60)
    narrow.print(shares_bars(["kl", "pm"], [kl, pm], top=10, width=60))
    assert text_of(narrow).count("Coffee") == 2
    assert max(map(len, text_of(narrow).splitlines())) <= 60


def test_escape_sequences_are_shown_not_obeyed() -> None:
    assert printable("a\x1b[31mb\nc\td\r") == "a\ufffd[31mb\nc\td\ufffd"
