"""report.html: the data that templates/people.html.jinja lays out."""

from dataclasses import dataclass
from typing import Any

from step3_rlhf.paper.pages import TEMPLATES, Sample, samples_of
from step3_rlhf.paper.people.boards import Board
from step3_rlhf.paper.people.measure import MINORITY, SAMPLED_PEOPLE
from step3_rlhf.paper.people.report.findings import GROUPS, Findings, Row
from step3_rlhf.paper.people.report.pictures import DISTRIBUTIONS
from step3_rlhf.paper.people.report.targets import Target, targets
from step3_rlhf.paper.people.report.word_list import BAWDY, fit_to_show
from step3_rlhf.paper.people.reward_model import RewardModel
from step3_rlhf.paper.quickstart.machine import Machine
from step3_rlhf.paper.quickstart.metrics import number
from step3_rlhf.paper.quickstart.page import parameters
from training.statistics import Estimate

SAMPLED_PROMPTS = 4
"""Questions to which sampled answers are shown."""

SHOWN_CHARACTERS = 60

NAMES = {
    "people": "People",
    "reward": "Reward model, softmax(r/β)",
    "sft": "SFT",
    "kl": "KL",
    "conditional_pm": "Conditional PM",
    "uniform": "Every answer equally often",
    "majority": "Only the most frequent answer",
    "squared": "KL's optimum under a perfect reward model",
    "other_people": f"A fresh sample of {SAMPLED_PEOPLE} people",
}


@dataclass(frozen=True)
class Column:
    """A column of the tables."""

    name: str
    title: str
    meaning: str
    lower_is_better: bool = False


COLUMNS = (
    Column("tv_to_people", "TV to people", "total variation, within the board, to the shares in "
           "which people gave the answers", True),
    Column("tv_to_reward", "TV to reward model", "the same, to softmax(r/β) of the reward model, "
           "which preference matching is to reach", True),
    Column("tv_to_optimum", "TV to own optimum", "the same, to the closed-form optimum of the "
           "run's own regularizer on the board", True),
    Column("outside_mass", "Outside mass", "the policy's probability of everything that is not on "
           "the board: answers that too few people gave, other words, and nonsense"),
    Column("other_answers", "Other real answers", "the part of it that other strings have which "
           "people wrote and which count as answers"),
    Column("pm_divergence", "PM divergence", "KL divergence, in nats, between the choices that the "
           "policy and the reward model make between two answers that the policy draws from the "
           "board (section 6.1); equal answers count as 0, so a collapsed policy has 0", True),
    Column("pm_divergence_unequal", "PM divergence, unequal", "the same, given that the two "
           "answers differ", True),
    Column("pm_divergence_reference", "PM divergence, reference's pairs", "the same over unequal "
           "pairs that SFT draws, from which no policy can hide", True),
    Column("entropy", "Entropy", "of the distribution over the board's answers, in nats"),
    Column("top_share", "Share of the top answer", "of the answer that most people gave"),
    Column("minority_share", "Minorities' share", f"of all answers together that fewer than "
           f"{MINORITY:.0%} of people gave, over the questions that have such answers"),
)  # fmt: skip


@dataclass(frozen=True)
class Pictures:
    """Data URIs."""

    panel: str
    minorities: str
    reliability: str


@dataclass(frozen=True)
class Table:
    """One group of questions."""

    title: str
    questions: int
    columns: tuple[Column, ...]
    rows: list[Row]


@dataclass(frozen=True)
class Page:
    """Everything that the page shows."""

    findings: Findings
    tables: list[Table]
    headline: list[Row]
    reward_models: list[tuple[str, RewardModel]]
    targets: list[Target]
    prompts: list[str]
    samples: list[tuple[str, list[list[Sample]]]]
    """For each policy its answers to each prompt."""
    parameters: dict[str, str]
    seeds: list[str]
    word_list: str
    hidden: int
    """Unseen questions that the word list keeps from being shown."""
    pictures: Pictures
    machine: Machine
    seconds: float


def page(findings: Findings, pictures: Pictures, machine: Machine) -> str:
    """The page, self-contained: images are data URIs and nothing is fetched."""
    (unseen,) = findings.runs["sft"].of("unseen")
    runs = findings.runs.values()
    content = Page(
        findings,
        [table(group, findings) for group in GROUPS],
        [row for row in findings.tables["seen"] if row.name in findings.runs],
        [(GROUPS[group], found) for group, found in findings.reward_models.items()],
        targets(findings),
        *samples(findings, unseen),
        {run.name: parameters(run.regularizer) for run in runs if run.regularizer},
        [seed for seed in findings.runs["conditional_pm"].boards if seed],
        ", ".join(word.replace(".", " ") for word in BAWDY),
        sum(not fit_to_show(board.prompt, *board.answers) for board in unseen),
        pictures,
        machine,
        sum(step["seconds"] for step in findings.steps.values()),
    )
    return TEMPLATES.get_template("people.html.jinja").render(
        page=content, number=number, figure=shown, names=NAMES, colours=colours()
    )


def table(group: str, findings: Findings) -> Table:
    """Columns that no row has are left out."""
    rows = findings.tables[group]
    columns = tuple(c for c in COLUMNS if any(row.figures.get(c.name) for row in rows))
    questions = len(findings.runs["sft"].of(group)[0])
    return Table(GROUPS[group], questions, columns, rows)


def shown(estimate: Estimate | None) -> dict[str, str]:
    """A mean and half the width of its interval, as text."""
    if estimate is None:
        return {"mean": "–", "ci95": ""}
    ci95 = "" if estimate.ci95 is None else f"± {number(estimate.ci95)}"
    return {"mean": number(estimate.mean), "ci95": ci95}


def colours() -> dict[str, str]:
    return {name: colour for name, (_, colour) in DISTRIBUTIONS.items()}


def samples(
    findings: Findings, unseen: list[Board]
) -> tuple[list[str], list[tuple[str, list[list[Sample]]]]]:
    """The first unseen questions that are fit to be shown, with two answers of each policy."""
    rows = []
    drawn = {
        name: {line["prompt"]: line["responses"] for line in next(iter(run.instances.values()))}
        for name, run in findings.runs.items()
    }

    def fit(prompt: str) -> bool:
        answers: list[dict[str, Any]] = [y for of in drawn.values() for y in of.get(prompt, [])]
        return fit_to_show(prompt, *(y["text"] for y in answers))

    prompts = [board.prompt for board in unseen if fit(board.prompt)][:SAMPLED_PROMPTS]
    for name, responses in drawn.items():
        cells = [samples_of(responses.get(prompt, [])[:2], SHOWN_CHARACTERS) for prompt in prompts]
        rows.append((name, cells))
    return [prompt.partition("\n")[0] for prompt in prompts], rows
