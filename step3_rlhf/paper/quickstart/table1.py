"""Table 1 of the paper: what it states of each regularizer, and when a run confirms it."""

from dataclasses import dataclass

from step3_rlhf.paper.quickstart.findings import Run
from step3_rlhf.paper.quickstart.methods import is_further


@dataclass(frozen=True)
class Thresholds:
    """When a column of Table 1 gets its tick."""

    outside_mass: float = 0.05
    """Natural language is kept if at most this much probability lies outside the response sets …"""
    reference_perplexity_over_sft: float = 5.0
    """… and the reference's perplexity on the responses is at most this many times SFT's own."""
    tv_to_reward: float = 0.1
    """Preferences are matched if the total variation to the reward model is at most this."""


THRESHOLDS = Thresholds()


@dataclass(frozen=True)
class Verdict:
    """A row of Table 1 as measured; None where a number is missing."""

    language: bool | None
    preferences: bool | None


def verdict(run: Run, sft: Run) -> Verdict:
    """Whether a run keeps natural language and whether it matches preferences."""
    outside, tv = run.mean("outside_mass"), run.mean("tv_to_reward")
    perplexity, limit = run.mean("reference_perplexity"), perplexity_limit(sft)
    language = None
    if outside is not None and perplexity is not None and limit is not None:
        language = outside <= THRESHOLDS.outside_mass and perplexity <= limit
    return Verdict(language, None if tv is None else tv <= THRESHOLDS.tv_to_reward)


def perplexity_limit(sft: Run) -> float | None:
    """The largest perplexity under the reference that still counts as natural language."""
    yardstick = sft.mean("reference_perplexity")
    return None if yardstick is None else THRESHOLDS.reference_perplexity_over_sft * yardstick


TICK, CROSS = "✓", "✗"


@dataclass(frozen=True)
class Statement:
    """A row of Table 1 as the paper has it."""

    language: str = "–"
    preferences: str = "–"


PAPER = {
    "kl": Statement(TICK, CROSS),
    "f_divergence": Statement(TICK, CROSS),
    "maximum_entropy": Statement(CROSS, f"{CROSS}, {TICK} at τ = 1"),
    "pm": Statement(CROSS, TICK),
    "conditional_pm": Statement(TICK, TICK),
}


ORDER = ("kl", "f_divergence", "kl_interpolation", "generalized_pl", "none", "maximum_entropy")
"""The paper's order of regularizers; any other follows, then pm and conditional_pm."""


def in_papers_order(runs: list[Run]) -> list[Run]:
    """The trained runs that Table 1 is about, in the order of its rows."""
    last = {"pm": len(ORDER) + 1, "conditional_pm": len(ORDER) + 2}

    def place(run: Run) -> int:
        return ORDER.index(run.kind) if run.kind in ORDER else last.get(run.kind, len(ORDER))

    return sorted((run for run in runs if run.regularizer and not is_further(run)), key=place)
