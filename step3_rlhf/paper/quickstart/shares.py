"""The report's main picture: how often each answer is given, topic by topic."""

import textwrap
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from training.plotting import KL, MUTED, PM, POPULATION, REFERENCE, REWARD, style_axes

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
    from matplotlib.patches import Patch

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
    figure.legend(
        handles=[Patch(color=colour, label=name) for name, colour in DISTRIBUTIONS.values()],
        loc="upper center",
        ncols=len(DISTRIBUTIONS),
        frameon=False,
        fontsize=12,
        handlelength=1.2,
    )
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
    """Draw one panel; an answer's bars lie one below the other, in the order of the legend."""
    thickness = 0.8 / len(DISTRIBUTIONS)
    for place, (name, (_, colour)) in enumerate(DISTRIBUTIONS.items()):
        offset = (place - (len(DISTRIBUTIONS) - 1) / 2) * thickness
        rows = [number + offset for number in range(len(topic.answers))]
        axes.barh(rows, topic.shares[name], height=0.92 * thickness, color=colour, zorder=2)
    axes.set_title(topic.topic.capitalize(), fontsize=11, fontweight="bold", loc="left", pad=4)
    axes.set_yticks(range(len(topic.answers)), [abbreviated(a) for a in topic.answers], fontsize=9)
    axes.set(xlim=(0, limit), ylim=(len(topic.answers) - 0.5, -0.5))
    ticks = [tick / 5 for tick in range(6) if tick / 5 <= limit]
    axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks], fontsize=8, color=MUTED)
    axes.tick_params(length=0)
    style_axes(axes, grid="x")
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_color("0.7")


def abbreviated(answer: str, width: int = 22, lines: int = 2) -> str:
    """The answer in at most `lines` lines of `width` characters."""
    return "\n".join(textwrap.wrap(answer, width, max_lines=lines, placeholder=" …"))
