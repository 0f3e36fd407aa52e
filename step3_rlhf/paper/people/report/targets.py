"""What the experiment was to show, set down before it was run, and whether it did."""

from dataclasses import dataclass

from step3_rlhf.paper.people.report.findings import Findings
from step3_rlhf.paper.quickstart.metrics import number
from training.statistics import Estimate


@dataclass(frozen=True)
class Target:
    """A statement about figures, and whether they bear it out."""

    statement: str
    measured: str
    holds: bool


def targets(findings: Findings) -> list[Target]:
    """Every target with what was measured."""
    seen, unseen = (
        {row.name: row.figures for row in findings.tables[group]} for group in ("seen", "unseen")
    )

    def mean(figures: dict[str, dict[str, Estimate | None]], run: str, name: str) -> float:
        found = figures[run][name]
        return float("nan") if found is None else found.mean

    def at_most(statement: str, value: float, bound: float) -> Target:
        return Target(statement, f"{number(value)} (at most {number(bound)})", value <= bound)

    pm, kl = "conditional_pm", "kl"
    found = [
        at_most(f"Conditional PM matches the reward model on {words}",
                mean(figures, pm, "tv_to_reward"), bound)
        for figures, words, bound in (
            (seen, "seen questions in unseen words", 0.10), (unseen, "unseen questions", 0.15))
    ]  # fmt: skip
    found += [
        at_most(f"Conditional PM's mass outside the board exceeds SFT's by at most 0.05 on {words}",
                mean(figures, pm, "outside_mass"), mean(figures, "sft", "outside_mass") + 0.05)
        for figures, words in ((seen, "seen questions"), (unseen, "unseen questions"))
    ]  # fmt: skip
    found += [
        at_most(f"KL reaches its own optimum on {words}", mean(figures, kl, "tv_to_optimum"), 0.10)
        for figures, words in ((seen, "seen questions"), (unseen, "unseen questions"))
    ]
    for figures, words in ((seen, "seen questions"), (unseen, "unseen questions")):
        far, near = mean(figures, kl, "tv_to_reward"), mean(figures, pm, "tv_to_reward")
        found.append(
            Target(
                f"KL is at least twice as far from the reward model as conditional PM on {words}",
                f"{number(far)} against {number(near)}",
                far >= 2 * near,
            )
        )
    people = seen[pm]["tv_to_people"]
    others = [seen[name]["tv_to_people"] for name in (kl, "sft")]
    found.append(
        Target(
            "On seen questions conditional PM is nearer to people than KL and SFT are, with "
            "separate 95 % intervals",
            f"{interval(people)} against KL {interval(others[0])}, SFT {interval(others[1])}",
            all(separate(people, other) for other in others),
        )
    )
    return found


def separate(lower: Estimate | None, higher: Estimate | None) -> bool:
    """Whether one interval ends below the beginning of the other."""
    if lower is None or higher is None or lower.high is None or higher.low is None:
        return False
    return lower.high < higher.low


def interval(figure: Estimate | None) -> str:
    """A mean with half the width of its interval."""
    if figure is None:
        return "–"
    return number(figure.mean) + ("" if figure.ci95 is None else f" ± {number(figure.ci95)}")
