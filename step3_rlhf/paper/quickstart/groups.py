"""The picture of two groups of people: what becomes of both under each kind of reward."""

from typing import TYPE_CHECKING

from step3_rlhf.paper.quickstart.findings import Run
from step3_rlhf.paper.quickstart.shares import by_topic, mean_shares
from training.plotting import KL, PM, POPULATION, REWARD, new_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ANSWERS = ("first group's favourite", "everybody's second", "second group's favourite")
"""The answers of a topic that has three. The second group likes them in the reverse order."""


RUNS_OF_GROUPS = {
    "weighted_sum": ("weighted sum of the groups' rewards", KL),
    "pooled": ("pooled comparisons", REWARD),
    "mixture": ("mixture of the groups", PM),
}
"""Name and colour of each run, in the picture's order."""


def group_shares(runs: dict[str, Run]) -> dict[str, list[float]]:
    """Mean share of each of ANSWERS, of the population and of each run; {} if a run is missing.

    Means over the topics with three answers, and over each topic's test prompts before.
    """
    if not RUNS_OF_GROUPS.keys() <= runs.keys():
        return {}
    sources = {"population": (runs["mixture"], "population")}
    sources |= {name: (runs[name], "policy") for name in RUNS_OF_GROUPS}
    found = {}
    for name, (run, key) in sources.items():
        topics = [mean_shares(entries, key) for entries in by_topic(run.sets).values()]
        three = [list(topic.values()) for topic in topics if len(topic) == len(ANSWERS)]
        found[name] = [sum(shares) / len(three) for shares in zip(*three, strict=True)]
    return found if found["population"] else {}


def draw_groups(shares: dict[str, list[float]]) -> "Figure":
    """Grouped bars: a group for each of ANSWERS, a bar for the population and for each run."""
    figure = new_figure(9.0, 3.8)
    axes = figure.subplots()
    styles = {"population": ("population", POPULATION), **RUNS_OF_GROUPS}
    width = 0.8 / len(shares)
    for number, (name, values) in enumerate(shares.items()):
        label, colour = styles[name]
        offset = (number - (len(shares) - 1) / 2) * width
        places = [place + offset for place in range(len(values))]
        bars = axes.bar(places, values, width, color=colour, label=label)
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axes.set_xticks(range(len(ANSWERS)), ANSWERS)
    axes.set(ylabel="share", ylim=(0, 1.15 * max(max(values) for values in shares.values())))
    style_axes(axes)
    figure.legend(loc="outside upper center", ncols=len(shares), frameon=False, fontsize=9)
    return figure
