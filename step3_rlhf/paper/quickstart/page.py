"""report.html: the data that templates/quickstart.html.jinja lays out."""

from dataclasses import dataclass
from typing import Any

from step3_rlhf.paper.pages import TEMPLATES, Sample, samples_of
from step3_rlhf.paper.quickstart.findings import Findings, Run
from step3_rlhf.paper.quickstart.machine import Machine
from step3_rlhf.paper.quickstart.methods import METHODS, Method, runs_of_methods
from step3_rlhf.paper.quickstart.metrics import DISTANCES, METRICS, Metric, number
from step3_rlhf.paper.quickstart.shares import DISTRIBUTIONS
from step3_rlhf.paper.quickstart.table1 import (
    PAPER,
    THRESHOLDS,
    Statement,
    Thresholds,
    Verdict,
    in_papers_order,
    perplexity_limit,
    verdict,
)

SAMPLED_PROMPTS = 3
"""Prompts for which every run's sampled responses are shown."""


SHOWN_CHARACTERS = 90
"""Length beyond which a sampled response is abbreviated."""


HEADLINE = ("sft", "kl", "conditional_pm")
"""The runs whose distance to the reward model is the page's headline."""


NAMES = {
    "kl": "KL",
    "kl_interpolation": "KL interpolation",
    "generalized_pl": "Generalized PL",
    "none": "No regularizer",
    "maximum_entropy": "Maximum entropy",
    "pm": "PM",
    "conditional_pm": "Conditional PM",
    "reverse_kl": "Reverse KL",
    "forward_kl": "Forward KL",
    "js_divergence": "Jensen–Shannon",
    "alpha_divergence": "α-divergence",
    "chi_squared": "χ²",
    "total_variation": "Total variation",
    "hellinger": "Squared Hellinger",
}


SYMBOLS = {"alpha": "α", "beta": "β", "tau": "τ", "kappa": "κ", "epsilon": "ε"}


@dataclass(frozen=True)
class Policy:
    """A run as the page presents it."""

    run: Run
    label: str
    """What its regularizer is called."""
    parameters: str
    """The regularizer's parameters, such as "α 0.02, β 1"."""
    colour: str
    """Its colour in the picture of the shares."""


@dataclass(frozen=True)
class Table1Row:
    """A row of Table 1: as measured, and as the paper has it."""

    policy: Policy
    verdict: Verdict
    paper: Statement


@dataclass(frozen=True)
class Samples:
    """Two responses of every policy to the same prompts."""

    prompts: list[str]
    rows: list[tuple[Policy, list[list[Sample]]]]
    """For every policy its responses to each prompt."""


@dataclass(frozen=True)
class Pictures:
    """Data URIs."""

    shares: str
    reliability: str
    figure2: str
    figure2_f_divergences: str
    figure9: str
    groups: str | None = None
    """Of two groups of people; None where those runs are missing."""
    calibrated: str = ""
    """Reliability at the calibrated β; empty where that is unknown."""


@dataclass(frozen=True)
class Page:
    """Everything that the page shows."""

    findings: Findings
    policies: dict[str, Policy]
    """By the name of their run."""
    headline: list[Policy]
    metrics: tuple[Metric, ...]
    distances: tuple[Metric, ...]
    """The metrics by which methods are compared."""
    table1: list[Table1Row]
    thresholds: Thresholds
    perplexity_limit: float | None
    samples: Samples
    methods: list[tuple[Policy, Method]]
    """The further methods, after what they are compared with; empty where none was run."""
    pictures: Pictures
    seconds: dict[str, float]
    machine: Machine


def page(
    findings: Findings, pictures: Pictures, seconds: dict[str, float], machine: Machine
) -> str:
    """The page, self-contained: images are data URIs and nothing is fetched.

    Args:
        seconds: of each phase, the report's own included.
    """
    runs, sft = findings.runs, findings.runs["sft"]
    policies = {name: policy_of(run) for name, run in runs.items()}
    content = Page(
        findings,
        policies,
        [policies[name] for name in HEADLINE],
        METRICS,
        DISTANCES,
        [
            Table1Row(policies[run.name], verdict(run, sft), PAPER.get(run.kind, Statement()))
            for run in in_papers_order(list(runs.values()))
        ],
        THRESHOLDS,
        perplexity_limit(sft),
        samples(policies),
        [(policies[run.name], METHODS[run.name]) for run in runs_of_methods(runs)],
        pictures,
        seconds,
        machine,
    )
    return TEMPLATES.get_template("quickstart.html.jinja").render(page=content, number=number)


def policy_of(run: Run) -> Policy:
    _, colour = DISTRIBUTIONS.get(run.name, ("", "transparent"))
    if run.regularizer is None:
        return Policy(run, "SFT", "", colour)
    label = NAMES.get(run.regularizer.get("divergence", run.kind), run.name)
    if run.method != "PPO":
        label += f", {run.method}"
    if run.name in METHODS and METHODS[run.name].called:
        label += f", {METHODS[run.name].called}"
    return Policy(run, label, parameters(run.regularizer), colour)


def parameters(regularizer: dict[str, Any]) -> str:
    hidden = ("name", "divergence", "max_marginal", "c2", "classes")
    return ", ".join(
        f"{SYMBOLS.get(key, key.replace('_', ' '))} {shown(value)}"
        for key, value in sorted(regularizer.items())
        if key not in hidden and value is not None
    )


def shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def samples(policies: dict[str, Policy]) -> Samples:
    prompts = sampled_prompts({name: policy.run for name, policy in policies.items()})
    rows = []
    for policy in policies.values():
        responses = {entry["prompt"]: entry["responses"][:2] for entry in policy.run.instances}
        cells = [samples_of(responses.get(prompt, []), SHOWN_CHARACTERS) for prompt in prompts]
        rows.append((policy, cells))
    return Samples(prompts, rows)


def sampled_prompts(runs: dict[str, Run]) -> list[str]:
    """The first prompts of different topics to which every run responded."""
    topics = {entry["prompt"]: entry.get("topic") for entry in runs["conditional_pm"].sets}
    everywhere = set.intersection(*({e["prompt"] for e in r.instances} for r in runs.values()))
    found: dict[str, str] = {}
    for entry in runs["conditional_pm"].instances:
        prompt = entry["prompt"]
        if prompt in everywhere:
            found.setdefault(topics.get(prompt) or prompt, prompt)
    return list(found.values())[:SAMPLED_PROMPTS]
