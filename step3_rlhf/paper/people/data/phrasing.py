"""A second phrasing of a question by rules, so that a question can be asked in unseen words."""

import re

# "what would you name a dog" has a verb of another kind, "to name a few" another meaning
_SUBJECT = r"(?<!\byou )(?<!\bto )(?<!\bthey )(?<!\bpeople )(?<!\bparents )(?<!\bcan )(?<!\bnot )"
_VERB = rf"(?<!\w){_SUBJECT}(?:please )?(?:name|tell me|give me) "

RULES = (
    (rf"{_VERB}something(?: else)?\b", "one thing"),
    (rf"{_VERB}(?:someone|somebody)\b", "one person"),
    (rf"{_VERB}(?:someplace|somewhere)\b", "one place"),
    (rf"{_VERB}(?:an?|one)\b(?! of\b)", "one"),
    (rf"{_VERB}(the|your)\b", r"what is \1"),
)
"""Patterns of the words that ask, and what stands in their place."""


def rephrased(question: str) -> str | None:
    """The question in other words; None if no rule fits, or if several places fit.

    `name something that smells` becomes `one thing that smells`.
    """
    changed = [re.subn(pattern, words, question, flags=re.I) for pattern, words in RULES]
    found = [text for text, places in changed if places]
    return found[0] if sum(places for _, places in changed) == 1 else None
