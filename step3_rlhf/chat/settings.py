"""How answers are drawn and shown."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ChatSettings:
    """Of the options, those that views need."""

    share: bool = False
    """Every question gets the distribution of its answers in place of one answer."""
    samples: int = 200
    """Answers that are drawn for a distribution."""
    top: int = 10
    """Answers that a distribution shows one by one."""
    batch_size: int = 64
    """Answers of a distribution that are drawn at the same time."""
