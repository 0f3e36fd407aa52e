"""Which questions are shown to readers: those without a word of this list.

ProtoQA comes from fan sites of a game show, some of whose questions are bawdy. They are learned and
measured like all others, but not shown.
"""

import re

BAWDY = (
    "affair ass bare bathroom bedroom behind bikini bimbo birthday.suit boob booty bosom bra bras "
    "breast brothel buns bust butt buttocks cheat cleavage condom crotch curvy drunk erotic fart "
    "fling flirt foreplay g.string groin hickey honeymoon hooker hooters horny hump "
    "in.the.mood intimate kinky kiss lap.dance lingerie lover lovemaking make.love making.love "
    "mistress naked naughty nipple nude nudist one.night.stand orgasm panties panty pee penis "
    "playboy poop porn pregnant private.parts privates prostitute rear romp romantic seduce sex "
    "sexiest sexy skinny.dip sleep.with spank sperm strip stripper swinger thong toilet tush "
    "underwear undress vagina viagra virgin wiener"
).split()
"""Words, also with endings such as -s, -ed and -ing; a dot is a space or a hyphen."""

_WORDS = "|".join(word.replace(".", r"[\s-]?") for word in BAWDY)
_ENDINGS = "s|es|ed|er|ers|ing|ping|ting|ual|y|ty|iest"
_PATTERN = re.compile(rf"\b(?:{_WORDS})(?:{_ENDINGS})?\b", re.IGNORECASE)


def fit_to_show(*texts: str) -> bool:
    """Whether no text has a word of the list."""
    return not any(_PATTERN.search(text) for text in texts)
