"""A conversation in a terminal: answers grow while they are drawn, several models side by side."""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from step3_rlhf.chat.bars import colour, printable, shares_bars
from step3_rlhf.chat.session import Session
from step3_rlhf.chat.settings import ChatSettings
from training.errors import UserError

NARROWEST = 28
"""Columns of the terminal that an answer needs; with fewer, the models answer one below another."""
MARGIN = 3
"""Columns left free on the right: a terminal shows ^C there, which else would begin a new line."""
COMMANDS = """/share [N]  the distribution of N answers to the last question
/reset      forget the dialogue
/quit       end; Ctrl-D and Ctrl-C do so too, and while an answer is drawn Ctrl-C stops it"""


class Screen:
    """Shows a session in a terminal."""

    def __init__(
        self, session: Session, settings: ChatSettings, console: Console | None = None
    ) -> None:
        self.session = session
        self.settings = settings
        self.console = console or Console(highlight=False)

    def converse(self, read: Callable[[str], str] = input) -> None:
        """Ask and answer until the user ends it."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # arrow keys in `input`
        self._say("/share, /reset, /quit; /help explains")
        while True:
            self.console.print()
            try:
                line = read("> ").strip()
            except EOFError:
                self.console.print()
                return
            if line == "/quit":
                return
            try:
                self._obey(line)
            except KeyboardInterrupt:
                self._say("\nstopped")
            except UserError as error:
                self._say(str(error))

    def answer(self, question: str) -> None:
        """Show every model's answer to a question, or the distribution of its answers."""
        if self.settings.share:
            self.shares(question)
        elif len(self.session.names) > 1 and self._side_by_side:
            self._answer_side_by_side(question)
        else:
            self._answer_in_turn(question)

    def shares(self, question: str | None = None) -> None:
        """Show the distribution of answers to a question, by default the last one."""
        names, settings = self.session.names, self.settings
        with self._progress(settings.samples * len(names)) as advance:
            found = self.session.distributions(
                settings.samples, settings.batch_size, question, advance
            )
        self.console.print()
        self.console.print(shares_bars(names, found, settings.top, self.console.width))

    def _obey(self, line: str) -> None:
        command, *words = line.split() or [""]
        if not command.startswith("/"):
            if line:
                self.answer(line)
        elif command == "/share" and all(re.fullmatch("0*[1-9][0-9]*", word) for word in words):
            if words:
                self.settings = replace(self.settings, samples=int(words[0]))
            self.shares()
        elif command == "/reset":
            self.session.reset()
            self._say("the dialogue is forgotten")
        else:
            self._say(COMMANDS if command == "/help" else f"{line} is no command\n{COMMANDS}")

    @property
    def _side_by_side(self) -> bool:
        return self.console.width >= NARROWEST * len(self.session.names)

    def _answer_in_turn(self, question: str) -> None:
        """The models one below the other; only what is new is printed."""
        names = self.session.names
        speaking, shown = -1, ""

        def watch(place: int, text: str) -> None:
            nonlocal speaking, shown
            text = printable(text)
            if place != speaking and len(names) > 1:
                self.console.print("\n" if speaking >= 0 else "", end="")
                self.console.print(Rule(Text(names[place]), align="left", style=colour(place)))
            if place != speaking:
                speaking, shown = place, ""
            # A token rarely changes the letters before it; then the whole text is printed again.
            extends = text.startswith(shown)
            self._print(text[len(shown) :] if extends else f"\n{text}")
            shown = text

        self.session.ask(question, watch)
        self.console.print()

    def _answer_side_by_side(self, question: str) -> None:
        """A column for each model; while answers are drawn, the end of each is seen."""
        texts = [""] * len(self.session.names)
        try:
            with Live(console=self.console, transient=True, refresh_per_second=12) as live:

                def watch(place: int, text: str) -> None:
                    texts[place] = text
                    live.update(self._columns(texts, lines=self.console.height - 4))

                self.session.ask(question, watch)
        finally:  # also what was drawn before the user or a fault stopped it
            self.console.print(self._columns(texts))

    def _columns(self, texts: list[str], lines: int | None = None) -> Table:
        whole = self.console.width - MARGIN
        grid = Table.grid(expand=True)
        grid.width = whole
        row = []
        width = whole // len(texts) - 4  # inside of a panel's frame
        for place, (name, text) in enumerate(zip(self.session.names, texts, strict=True)):
            grid.add_column(ratio=1)
            body = Text(printable(text))
            if lines is not None:
                body = Text("\n").join(body.wrap(self.console, width)[-lines:])
            row.append(
                Panel(body, title=Text(name), title_align="left", border_style=colour(place))
            )
        grid.add_row(*row)
        return grid

    @contextlib.contextmanager
    def _progress(self, total: int) -> Iterator[Callable[[int], None]]:
        bar = Progress(
            TextColumn("drawing answers"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        with bar:
            task = bar.add_task("", total=total)
            yield lambda count: bar.advance(task, count)

    def _say(self, text: str) -> None:
        self.console.print(Text(text, "dim"))

    def _print(self, text: str) -> None:
        self.console.print(text, end="", markup=False, soft_wrap=True)
