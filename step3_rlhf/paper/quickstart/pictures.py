"""The report's pictures: shares per topic, the reliability diagram, the paper's figures."""

import base64
import io
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from step3_rlhf.paper import analytic_figures

DISTRIBUTIONS = {
    "population": ("Population", "#222222"),
    "reward": ("Reward model", "#5FB3E8"),
    "sft": ("SFT", "#F0BE3C"),
    "kl": ("KL", "#C8501E"),
    "conditional_pm": ("Conditional PM", "#0B7A5B"),
}
"""Name and colour of the five that the main picture compares, in their order. The colours stay
apart under every kind of colour blindness."""


SOURCES = {
    "population": ("conditional_pm", "population"),
    "reward": ("conditional_pm", "reward"),
    "sft": ("sft", "policy"),
    "kl": ("kl", "policy"),
    "conditional_pm": ("conditional_pm", "policy"),
}
"""The run, and the key of its exact per-prompt figures, from which each distribution is taken."""


COLUMNS = 4


WIDTH, LABELS, GAP = 12.6, 1.66, 0.18
"""Inches: the picture's width, of which per column the answers' labels and the space between."""


ANSWER, TITLE, TICKS, LEGEND = 0.43, 0.34, 0.30, 0.50
"""Inches: the height of an answer's five bars, a topic's title, its axis, the legend."""


MUTED = "#666666"


Entry = dict[str, Any]
"""What evaluation.json says about one prompt's response set."""


@dataclass(frozen=True)
class TopicShares:
    """How often each answer is given: means over a topic's held-out prompts."""

    topic: str
    answers: list[str]
    """The population's favourite first."""
    shares: dict[str, list[float]]
    """Of each distribution, one share per answer, conditional on the response set."""


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
        answers = [answer for answer, _ in means["population"].most_common()]
        shares = {name: [mean[answer] for answer in answers] for name, mean in means.items()}
        found.append(TopicShares(topic, answers, shares))
    return found


def by_topic(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Entries of the same topic together; a prompt without one is its own."""
    topics: dict[str, list[Entry]] = {}
    for entry in entries:
        topics.setdefault(entry.get("topic") or entry["prompt"], []).append(entry)
    return topics


def mean_shares(entries: list[Entry], key: str) -> Counter[str]:
    """Mean share of each answer."""
    means: Counter[str] = Counter()
    for entry in entries:
        for answer, share in zip(entry["responses"], entry[key], strict=True):
            means[answer] += share / len(entries)
    return means


def draw_shares(topics: list[TopicShares]) -> Figure:
    """Grouped bars: a panel per topic, a group per answer, a bar per distribution."""
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
    """Columns of about equal height, in each the topics with few answers first."""
    columns: list[list[TopicShares]] = [[] for _ in range(min(count, len(topics)))]
    for topic in sorted(topics, key=lambda topic: (-len(topic.answers), topic.topic)):
        min(columns, key=lambda column: sum(map(panel_height, column))).insert(0, topic)
    return columns


def panel_height(topic: TopicShares) -> float:
    """Inches."""
    return TITLE + ANSWER * len(topic.answers) + TICKS


def draw_topic(axes: Axes, topic: TopicShares, limit: float) -> None:
    """One panel; bars of an answer lie one below the other, in the order of the legend."""
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
    axes.grid(axis="x", color="0.9", linewidth=0.7, zorder=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color("0.7")


def abbreviated(answer: str, width: int = 22, lines: int = 2) -> str:
    """At most `lines` lines of `width` characters."""
    return "\n".join(textwrap.wrap(answer, width, max_lines=lines, placeholder=" …"))


def draw_reliability(reward: dict[str, Any]) -> Figure:
    """How often the response that the reward model prefers was chosen, by predicted probability."""
    bins = reward["reliability"]
    figure = Figure(figsize=(5.0, 4.0), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.bar(
        [b["low"] for b in bins],
        [b["pairs"] / reward["pairs"] for b in bins],
        width=[b["high"] - b["low"] for b in bins],
        align="edge",
        color="#DDE1E7",
        edgecolor="white",
        label="share of the pairs",
    )
    axes.plot([0.5, 1], [0.5, 1], color=MUTED, linestyle="--", label="perfectly calibrated")
    axes.plot(
        [b["confidence"] for b in bins],
        [b["accuracy"] for b in bins],
        marker="o",
        color="#1F6FB2",
        label=f"reward model (ECE {reward['ece']:.3f})",
    )
    axes.set(xlabel="predicted probability of the preferred response")
    axes.set(ylabel="how often it was chosen", xlim=(0.5, 1), ylim=(0, 1))
    axes.grid(color="0.92", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", fontsize=9, frameon=False)
    return figure


def paper_figures() -> dict[str, str]:
    """The analytic figures of figures.py by name, as data URIs."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for draw in (
            analytic_figures.figure2,
            analytic_figures.figure2_f_divergences,
            analytic_figures.figure9,
        ):
            path = Path(folder) / f"{draw.__name__}.svg"
            draw(path)
            found[draw.__name__] = data_uri(path.read_bytes())
    return found


def embedded(figure: Figure) -> str:
    """A figure as a data URI."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "report"}):  # the same figure gives the same bytes
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return data_uri(buffer.getvalue())


def data_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")
