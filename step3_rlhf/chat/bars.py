"""Distributions as horizontal bars in a terminal."""

import textwrap
from collections.abc import Sequence

from rich.bar import Bar
from rich.table import Table
from rich.text import Text

from step3_rlhf.chat.shares import Distribution, Row, rows_of

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")
ANSWER, BAR, NUMBERS = 20, 8, 30
"""Columns of the terminal that an answer, a bar and the numbers beside it need."""
LONGEST = 160
"""Letters of an answer that are shown."""


def shares_tables(
    names: Sequence[str], distributions: Sequence[Distribution], top: int, width: int
) -> list[Table]:
    """A table with the models side by side; one for each where `width` is too narrow for that.

    All bars have the same scale: the longest is the largest share.
    """
    rows = rows_of(distributions, top)
    places = list(range(len(names)))
    fits = width >= ANSWER + (BAR + NUMBERS) * len(names)
    return [
        _table([(names[place], distributions[place], place) for place in part], rows, width)
        for part in ([places] if fits else [[place] for place in places])
    ]


def _table(models: list[tuple[str, Distribution, int]], rows: list[Row], width: int) -> Table:
    """A column of answers, and for each model a column of bars and one of numbers."""
    largest = max(share.value for row in rows for share in row.shares)
    answers = max(ANSWER, min(48, width - (BAR + NUMBERS + 8) * len(models)))
    bar = max(BAR, min(40, (width - answers) // len(models) - NUMBERS))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_footer=True)
    table.add_column("", max_width=answers)
    for name, distribution, place in models:
        table.add_column(
            Text(name, colour(place)), Text(f"entropy {distribution.entropy:.2f}", "dim"), width=bar
        )
        footer = f"{distribution.distinct} different of {distribution.total}"
        table.add_column("", Text(footer, "dim"), no_wrap=True)
    for row in rows:
        cells: list[Text | Bar] = [Text(printable(textwrap.shorten(row.label, LONGEST)))]
        for _, _, place in models:
            share = row.shares[place]
            cells.append(Bar(largest, 0.0, share.value, width=bar, color=colour(place)))
            cells.append(Text(f"{share} {share.count}"))
        table.add_row(*cells)
    return table


def colour(place: int) -> str:
    """The colour of the model with this number."""
    return COLOURS[place % len(COLOURS)]


def printable(text: str) -> str:
    """Without what a terminal would obey in place of showing it, such as escape sequences."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
