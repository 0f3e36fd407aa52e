"""Shortens long dialogues: whole old turns go first, then the beginning of what is left."""

from bisect import bisect_left
from collections.abc import Callable, Sequence

from training.data.messages import Dialogue


def shortened(
    messages: Dialogue,
    limit: int,
    length: Callable[[Dialogue], int],
    starts: Callable[[str], Sequence[int]],
) -> Dialogue | None:
    """The dialogue with at most `limit` tokens; its system turn and all headers stay.

    A user's turn and what answers it go together, oldest first, so that roles still alternate. If
    the last of the user's turns alone is too long, its text loses its beginning.

    Args:
        length: the tokens of a dialogue as it is written in the end.
        starts: where a text may be cut, in characters, ascending from 0.

    Returns:
        None if the system turn and the headers alone are too long.
    """
    if length(messages) <= limit:
        return messages
    first = next((n for n, turn in enumerate(messages) if turn["role"] != "system"), len(messages))
    system, turns = messages[:first], messages[first:]
    asked = [n for n, turn in enumerate(turns) if turn["role"] == "user"]
    if not asked:
        return None
    later = [start for start in asked if start > 0]

    def fits(start: int) -> bool:
        return length((*system, *turns[start:])) <= limit

    place = bisect_left(later, True, key=fits)  # the fewer turns are left, the shorter they are
    if place < len(later):
        return (*system, *turns[later[place] :])
    long, *rest = turns[asked[-1] :]
    places = starts(long["content"])
    place, excess = 0, length((*system, long, *rest)) - limit
    while place + excess < len(places):
        place += excess
        content = long["content"][places[place] :].lstrip()
        kept = (*system, {**long, "content": content}, *rest)
        if not content:
            return None
        if (excess := length(kept) - limit) <= 0:
            return kept
    return None
