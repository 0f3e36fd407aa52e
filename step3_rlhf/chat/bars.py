"""Distributions as horizontal bars in a terminal."""

import textwrap
from collections.abc import Sequence

from rich.bar import Bar
from rich.console import Group
from rich.table import Table
from rich.text import Text

from step3_rlhf.chat.shares import Distribution, Row, rows_of

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")
ANSWER, BAR, NUMBERS = 18, 8, 30
"""Columns of the terminal that an answer, a bar and the numbers beside it need, with a space."""
MOST_ANSWER, MOST_BAR = 48, 32
"""Columns that an answer and a bar get at most."""
LONGEST = 160
"""Letters of an answer that are shown."""


def shares_bars(
    names: Sequence[str], distributions: Sequence[Distribution], top: int, width: int
) -> Group:
    """A table with the models side by side, or one for each where `width` is too narrow for that.

    All bars have the same scale: the longest is the largest share.
    """
    rows = rows_of(distributions, top)
    places = list(range(len(names)))
    fits = width >= ANSWER + (BAR + NUMBERS) * len(names)
    tables = [
        _table([(names[place], place) for place in part], rows, width)
        for part in ([places] if fits else [[place] for place in places])
    ]
    summaries = [
        Text(f"{name}: {distribution}", colour(place))
        for place, (name, distribution) in enumerate(zip(names, distributions, strict=True))
    ]
    return Group(*tables, *summaries)


def _table(models: list[tuple[str, int]], rows: list[Row], width: int) -> Table:
    """A column of answers, and for each model its bars, shares with intervals, and counts."""
    largest = max(share.value for row in rows for share in row.shares)
    room = width - NUMBERS * len(models)
    answers = max(ANSWER, min(MOST_ANSWER, room - 2 * BAR * len(models)))
    bar = max(BAR, min(MOST_BAR, (room - answers) // len(models)))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", max_width=answers - 1)
    for name, place in models:
        table.add_column(Text(name, colour(place)), width=bar - 1)
        table.add_column(Text("share [95 %]", "dim"), no_wrap=True)
        table.add_column(Text("count", "dim"), no_wrap=True, justify="right")
    for row in rows:
        cells: list[Text | Bar] = [Text(printable(textwrap.shorten(row.label, LONGEST)))]
        for _, place in models:
            share = row.shares[place]
            cells.append(Bar(largest, 0.0, share.value, width=bar - 1, color=colour(place)))
            cells.append(Text(str(share)))
            cells.append(Text(str(share.count)))
        table.add_row(*cells)
    return table


def colour(place: int) -> str:
    """The colour of the model with this number."""
    return COLOURS[place % len(COLOURS)]


def printable(text: str) -> str:
    """Without what a terminal would obey in place of showing it, such as escape sequences."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
