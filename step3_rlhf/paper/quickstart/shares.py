"""The report's main picture: how often each answer is given, topic by topic."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from step3_rlhf.paper.bars import abbreviated, draw_bars, draw_legend
from training.plotting import KL, PM, POPULATION, REFERENCE, REWARD

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DISTRIBUTIONS = {
    "population": ("Population", POPULATION),
    "reward": ("Reward model", REWARD),
    "sft": ("SFT", REFERENCE),
    "kl": ("KL", KL),
    "conditional_pm": ("Conditional PM", PM),
}
"""Name and colour of the five distributions that the picture compares, in their order."""


SOURCES = {
    "population": ("conditional_pm", "population"),
    "reward": ("conditional_pm", "reward"),
    "sft": ("sft", "policy"),
    "kl": ("kl", "policy"),
    "conditional_pm": ("conditional_pm", "policy"),
}
"""The run that each distribution is taken from, and its key in that run's exact figures."""


COLUMNS = 4


WIDTH, LABELS, GAP = 12.6, 1.66, 0.18
"""Inches: the whole picture, the answers' labels in each column, the gap between columns."""


ANSWER, TITLE, TICKS, LEGEND = 0.43, 0.34, 0.30, 0.50
"""Inches: the height of an answer's five bars, a topic's title, its tick labels, the legend."""


Entry = dict[str, Any]
"""What evaluation.json says about one prompt's response set."""


@dataclass(frozen=True)
class TopicShares:
    """How often each answer to a topic's question is given: means over its held-out prompts."""

    topic: str
    answers: list[str]
    """The population's favourite first."""
    shares: dict[str, list[float]]
    """For each distribution one share per answer, conditional on the response set."""


def topic_shares(sets: dict[str, list[Entry]]) -> list[TopicShares]:
    """The five distributions of every topic.

    Args:
        sets: exact per-prompt figures by run.
    """
    grouped = {run: by_topic(sets[run]) for run, _ in SOURCES.values()}
    found = []
    for topic in grouped["conditional_pm"]:
        means = {
            name: mean_shares(grouped[run][topic], key) for name, (run, key) in SOURCES.items()
        }
        population = means["population"]
        answers = sorted(population, key=lambda answer: population[answer], reverse=True)
        shares = {name: [mean[answer] for answer in answers] for name, mean in means.items()}
        found.append(TopicShares(topic, answers, shares))
    return found


def by_topic(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """The entries of each topic; a prompt without one is a topic by itself."""
    topics: dict[str, list[Entry]] = {}
    for entry in entries:
        topics.setdefault(entry.get("topic") or entry["prompt"], []).append(entry)
    return topics


def mean_shares(entries: list[Entry], key: str) -> dict[str, float]:
    """Mean share of each answer."""
    means: dict[str, float] = defaultdict(float)
    for entry in entries:
        for answer, share in zip(entry["responses"], entry[key], strict=True):
            means[answer] += share / len(entries)
    return means


def draw_shares(topics: list[TopicShares]) -> "Figure":
    """Grouped bars: a panel per topic, a group per answer, a bar per distribution."""
    from matplotlib.figure import Figure

    columns = in_columns(topics, COLUMNS)
    height = LEGEND + max(sum(map(panel_height, column)) for column in columns)
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    limit = max(max(values) for topic in topics for values in topic.shares.values())
    step = WIDTH / COLUMNS
    for number, column in enumerate(columns):
        top = height - LEGEND
        for topic in column:
            bars = ANSWER * len(topic.answers)
            left, bottom = number * step + LABELS, top - TITLE - bars
            box = (left / WIDTH, bottom / height, (step - LABELS - GAP) / WIDTH, bars / height)
            draw_topic(figure.add_axes(box), topic, 1.04 * limit)
            top -= panel_height(topic)
    draw_legend(figure, DISTRIBUTIONS, "upper center")
    return figure


def in_columns(topics: list[TopicShares], count: int) -> list[list[TopicShares]]:
    """Columns of about equal height, each with the topics that have few answers first."""
    columns: list[list[TopicShares]] = [[] for _ in range(min(count, len(topics)))]
    for topic in sorted(topics, key=lambda topic: (-len(topic.answers), topic.topic)):
        min(columns, key=lambda column: sum(map(panel_height, column))).insert(0, topic)
    return columns


def panel_height(topic: TopicShares) -> float:
    """The height in inches."""
    return TITLE + ANSWER * len(topic.answers) + TICKS


def draw_topic(axes: "Axes", topic: TopicShares, limit: float) -> None:
    """The panel of one topic."""
    axes.set_title(topic.topic.capitalize(), fontsize=11, fontweight="bold", loc="left", pad=4)
    axes.set_yticks(range(len(topic.answers)), [abbreviated(a) for a in topic.answers], fontsize=9)
    draw_bars(axes, topic.shares, DISTRIBUTIONS, limit)
