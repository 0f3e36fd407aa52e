"""Length and preference matching, on the bundled world: what each regularizer's optimum says.

The paper's section 7 asks how the length of a response bears on its preference. Each topic of the
bundled world is a finite set of answers of 1 to 10 words, the writers are the reference, and the
rewards are the population's utilities, so that the optimum of every regularizer is known exactly.
A long answer can be worded in many ways, and each wording is a string of its own.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from step3_rlhf.regularizers.base import Regularizer, ResponseSet
from step3_rlhf.regularizers.optimum import optimum
from step3_rlhf.regularizers.registry import parse_regularizer
from training.plotting import BACKDROP, KL, PM, REFERENCE, REWARD_LINE, new_figure, style_axes
from training.world.population import population_shares, utilities, writers_shares
from training.world.topics import TOPICS, Topic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LENGTHS = (2, 5)
"""Words at which a class of answers ends: 1 to 2, 3 to 5, and 6 or more, the long ones."""
PHRASINGS = (1, 2, 3, 5, 8, 12, 18, 25)
LARGEST = max(len(answer.text.split()) for topic in TOPICS for answer in topic.answers)

VIOLET = "#8F5FB0"

CURVES: dict[str, tuple[dict[str, Any], str]] = {
    "KL": ({"name": "kl"}, KL),
    "PM": ({"name": "pm"}, PM),
    "conditional PM, α = 0.02": (
        {"name": "conditional_pm", "level": "sequence", "alpha": 0.02},
        VIOLET,
    ),
    "conditional PM of classes by length": (
        {"name": "conditional_pm", "level": "class", "classes": {"lengths": LENGTHS}},
        REWARD_LINE,
    ),
}
"""Regularizers by their label, with their colour."""


def words(topic: Topic) -> list[int]:
    """Number of words of each answer."""
    return [len(answer.text.split()) for answer in topic.answers]


def shares(regularizer: Regularizer, topic: Topic, phrasings: int = 1) -> Tensor:
    """[answers] the optimum's share of each answer of a topic, all of its phrasings together.

    Args:
        phrasings: of each long answer, which share the writers' probability of it equally and are
            equally liked.
    """
    classes = [bisect_left(LENGTHS, count) for count in words(topic)]
    copies = [phrasings if c == len(LENGTHS) else 1 for c in classes]
    answer = torch.repeat_interleave(torch.tensor(copies))  # [strings] the answer of each string
    written = torch.tensor(writers_shares(topic))
    by_class = torch.zeros(len(LENGTHS) + 1).double().index_add(0, torch.tensor(classes), written)
    strings = ResponseSet(
        tokens=torch.arange(len(answer))[:, None],
        ref_logp=(written / torch.tensor(copies)).log()[answer][:, None],
        mask=torch.ones(len(answer), 1, dtype=torch.bool),
        rewards=torch.tensor(utilities(topic))[answer],
        class_logp=by_class.log()[torch.tensor(classes)][answer],
    )
    return torch.zeros_like(written).index_add(0, answer, optimum(regularizer, strings).exp())


def share_up_to(length: int, by_topic: list[Tensor]) -> float:
    """Mean over topics of the share of the answers with at most `length` words."""
    inside = [torch.tensor(words(topic)) <= length for topic in TOPICS]
    found = [share[short].sum() for share, short in zip(by_topic, inside, strict=True)]
    return torch.stack(found).mean().item()


def long_share(regularizer: Regularizer, phrasings: int) -> float:
    """Mean over topics of the share of long answers that have so many phrasings each."""
    by_topic = [shares(regularizer, topic, phrasings) for topic in TOPICS]
    return 1.0 - share_up_to(LENGTHS[-1], by_topic)


def figure_length() -> Figure:
    """Share against length, and the share of long answers against the ways of wording them."""
    figure = new_figure(10.5, 4.2)
    left, right = figure.subplots(1, 2)
    _draw_shares(left)
    _draw_phrasings(right)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _draw_shares(axes: Axes) -> None:
    lengths = range(1, LARGEST + 1)

    def draw(by_topic: list[Tensor], label: str, colour: str, width: float = 1.6) -> None:
        curve = [share_up_to(n, by_topic) for n in lengths]
        line = {REFERENCE: ":", VIOLET: "--"}.get(colour, "-")
        axes.step(lengths, curve, line, where="post", color=colour, linewidth=width, label=label)

    draw([torch.tensor(population_shares(topic)) for topic in TOPICS], "population", BACKDROP, 7.0)
    draw([torch.tensor(writers_shares(topic)) for topic in TOPICS], "reference", REFERENCE, 2.2)
    for label, (config, colour) in CURVES.items():
        regularizer = parse_regularizer(config)
        draw([shares(regularizer, topic) for topic in TOPICS], label, colour)
    axes.set(xlabel="words", ylabel="share of answers of at most so many", ylim=(0, 1.02))
    axes.set_title("One phrasing of each answer", fontsize=11)
    style_axes(axes)


def _draw_phrasings(axes: Axes) -> None:
    for config, colour in CURVES.values():
        regularizer = parse_regularizer(config)
        curve = [long_share(regularizer, count) for count in PHRASINGS]
        axes.plot(PHRASINGS, curve, color=colour, linewidth=1.6, marker="o", markersize=3)
    axes.set(
        xlabel="phrasings of each answer of 6 words or more", ylabel="their share", ylim=(0, 1.02)
    )
    axes.set_title("Long answers can be said in more ways", fontsize=11)
    style_axes(axes)
