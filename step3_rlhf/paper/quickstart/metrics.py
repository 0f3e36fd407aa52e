"""The columns of the report's tables, and how their numbers are written."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One column: a key of evaluation.json and of report.json."""

    name: str
    heading: str
    """For the terminal, at most seven characters."""
    title: str
    """For the page."""
    lower_is_better: bool
    meaning: str


METRICS = (
    Metric(
        "pm_divergence",
        "PM div.",
        "PM divergence",
        True,
        "KL divergence, in nats, between the choices that the policy and the reward model make "
        "between two of the policy's own responses (section 6.1)",
    ),
    Metric(
        "tv_to_reward",
        "TV rew.",
        "TV to reward model",
        True,
        "total variation, within the response set, to softmax(r/β) of the trained reward model",
    ),
    Metric(
        "tv_to_population",
        "TV pop.",
        "TV to population",
        True,
        "the same, to the population's shares",
    ),
    Metric(
        "tv_to_optimum",
        "TV opt.",
        "TV to own optimum",
        True,
        "the same, to the closed-form optimum of the run's own regularizer under the trained "
        "reward model; SFT has none",
    ),
    Metric(
        "outside_mass",
        "outside",
        "Outside mass",
        True,
        "probability of everything that is not in the response set",
    ),
    Metric("length", "length", "Length", False, "tokens per response, end-of-sequence included"),
    Metric(
        "perplexity",
        "perpl.",
        "Perplexity",
        False,
        "of the policy's own responses under the policy itself",
    ),
    Metric("entropy", "entropy", "Entropy", False, "mean of −log π(y|x), in nats per response"),
    Metric(
        "kl",
        "KL",
        "KL to reference",
        False,
        "mean of log π(y|x) − log π_ref(y|x), in nats per response; the reference is the SFT model",
    ),
)


def number(value: float | None) -> str:
    """Three decimals where they mean something, in at most eight characters; a dash for None."""
    if value is None:
        return "–"
    if abs(value) >= 1e6:
        return f"{value:.1e}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{3 if abs(value) < 10 else 2 if abs(value) < 100 else 1}f}"
