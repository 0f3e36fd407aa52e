"""What the bundled world talks about: its topics, answers, phrasings and openers.

The population's shares and the writers' shares are percentages. The writers, whose texts the SFT
stage learns from, differ strongly from the population: that difference is the bias that a
KL-regularized policy inherits. Answers of one topic that voice the same opinion in other words
(tea, tea with milk) carry the same `opinion`: the drink topic is 51 to 49 between coffee and tea.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """One of a topic's answers and how likely each group is to give it, in percent."""

    text: str
    population: float
    writers: float
    opinion: str


@dataclass(frozen=True)
class Topic:
    """A question's subject: `noun` completes "Which ...", `article` + noun "Please suggest ..."."""

    name: str
    article: str
    noun: str
    answers: tuple[Answer, ...]


def _topic(name: str, subject: str, *answers: tuple[str, float, float] | Answer) -> Topic:
    article, _, noun = subject.partition(" ")
    return Topic(
        name,
        article,
        noun,
        tuple(a if isinstance(a, Answer) else Answer(*a, opinion=a[0]) for a in answers),
    )


TOPICS: tuple[Topic, ...] = (
    _topic(
        "drink",
        "a drink",
        Answer("A strong cup of coffee", 51, 8, "coffee"),
        Answer("Tea", 26, 52, "tea"),
        Answer("I would suggest tea with a little milk.", 23, 40, "tea"),
    ),
    _topic(
        "pet",
        "a pet",
        Answer("A friendly dog", 70, 10, "dog"),
        Answer("A cat", 17, 60, "cat"),
        Answer("A cat that sleeps on the sofa all day", 13, 30, "cat"),
    ),
    _topic(
        "season",
        "a season for a trip",
        Answer("Summer", 60, 10, "summer"),
        Answer("Winter", 22, 50, "winter"),
        Answer("Winter, because I love fresh snow.", 18, 40, "winter"),
    ),
    _topic(
        "weekend",
        "a weekend plan",
        ("A long hike in the hills", 40, 8),
        ("Staying home with a good book", 27, 14),
        ("Staying home to cook", 19, 25),
        ("Visiting old friends in the city", 14, 53),
    ),
    _topic(
        "breakfast",
        "a breakfast",
        ("Pancakes with honey", 34, 8),
        ("Toast", 26, 10),
        ("Toast with butter and strawberry jam", 17, 15),
        ("A bowl of oatmeal with fresh berries", 13, 20),
        ("Two boiled eggs", 10, 47),
    ),
    _topic(
        "hobby",
        "a hobby",
        ("Painting", 28, 8),
        ("Playing chess with the neighbors", 22, 8),
        ("Playing the piano", 18, 8),
        ("Gardening", 14, 15),
        ("Taking photos of birds early in the morning", 10, 41),
        ("Running", 8, 20),
    ),
    _topic(
        "instrument",
        "a musical instrument",
        ("The guitar", 45, 8),
        ("The piano", 28, 13),
        ("The violin, even though it takes many years to learn", 15, 59),
        ("The drums", 12, 20),
    ),
    _topic(
        "color",
        "a color for a bedroom",
        ("Light blue", 42, 8),
        ("Light green, like young leaves in spring", 30, 12),
        ("White", 16, 60),
        ("A warm yellow", 12, 20),
    ),
    _topic(
        "dessert",
        "a dessert",
        ("Chocolate cake", 35, 8),
        ("Apple pie with vanilla ice cream", 25, 9),
        ("Apple pie", 16, 15),
        ("A bowl of fresh fruit", 13, 20),
        ("Cheesecake", 11, 48),
    ),
    _topic(
        "sport",
        "a sport",
        ("Swimming", 50, 12),
        ("Soccer, because you can play it almost anywhere.", 30, 18),
        ("Tennis", 20, 70),
    ),
    _topic(
        "vacation",
        "a vacation spot",
        ("A quiet beach", 44, 8),
        ("A quiet village in the mountains", 26, 13),
        ("Paris", 18, 25),
        ("A big city with many museums", 12, 54),
    ),
    _topic(
        "gift",
        "a gift for a friend",
        ("Tickets to a concert", 33, 8),
        ("A book", 24, 9),
        ("A book about the history of your town", 18, 12),
        ("Flowers", 14, 24),
        ("A box of chocolates", 11, 47),
    ),
    _topic(
        "commute",
        "a way to get to work",
        ("By bike", 40, 8),
        ("By train", 28, 12),
        ("By train, with a good book to read", 18, 20),
        ("On foot, whenever the weather is nice", 14, 60),
    ),
    _topic(
        "movie",
        "a kind of movie",
        ("A comedy", 32, 8),
        ("A mystery with a clever detective", 26, 8),
        ("An old western", 18, 16),
        ("A documentary about the sea and its animals", 14, 20),
        ("A love story", 10, 48),
    ),
    _topic(
        "dinner",
        "a dish for dinner",
        ("Pizza", 27, 8),
        ("Pasta with tomato sauce", 22, 8),
        ("Pasta with mushrooms and a little cream", 18, 9),
        ("Grilled fish and rice", 14, 14),
        ("Vegetable soup", 11, 41),
        ("Tacos", 8, 20),
    ),
    _topic(
        "evening",
        "an evening activity",
        ("Watching a film", 48, 10),
        ("Watching the stars with a cup of hot chocolate", 32, 15),
        ("Board games with the whole family", 20, 75),
    ),
)

# {a} is the noun with its article, {noun} the bare noun.
PHRASINGS: tuple[str, ...] = (
    "Please suggest {a}.",
    "Which {noun} would you pick?",
    "Can you recommend {a}?",
    "What is your favorite {noun}?",
    "Name {a} that you like.",
    "If you had to choose {a}, what would it be?",
    "I am looking for {a}. Any ideas?",
    "What {noun} do you like best?",
    "Tell me which {noun} you prefer.",
    "Help me choose {a}.",
    "I need {a}. What do you suggest?",
    "What would be a good {noun}?",
    "Which {noun} suits you best?",
    "Give me one idea for {a}.",
    "Do you have a favorite {noun}?",
    "I cannot decide on {a}. What do you say?",
)

OPENERS: tuple[str, ...] = ("", "Hi! ", "Quick question: ", "One more thing. ")
