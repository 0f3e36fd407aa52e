"""The prompts of the bundled world, in training phrasings and in held-out ones."""

from training.world.topics import OPENERS, PHRASINGS, TOPICS

HELD_OUT_PHRASINGS = 4
"""Number of phrasings of each topic that no training file contains."""


def held_out(topic_index: int) -> tuple[int, ...]:
    """The indices in PHRASINGS of this topic's held-out phrasings.

    They rotate from topic to topic, so that every phrasing is trained on with other topics.
    """
    stride = len(PHRASINGS) // HELD_OUT_PHRASINGS
    return tuple(
        sorted((topic_index + k * stride) % len(PHRASINGS) for k in range(HELD_OUT_PHRASINGS))
    )


def prompts(topic_index: int, evaluation: bool, openers: int = len(OPENERS)) -> list[str]:
    """A topic's training prompts or, if `evaluation`, those with its held-out phrasings."""
    topic = TOPICS[topic_index]
    with_article = f"{topic.article} {topic.noun}"
    return [
        opener + phrasing.format(a=with_article, noun=topic.noun)
        for index, phrasing in enumerate(PHRASINGS)
        if (index in held_out(topic_index)) == evaluation
        for opener in OPENERS[:openers]
    ]
