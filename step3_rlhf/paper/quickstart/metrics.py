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
    in_terminal: bool = True
    """Whether the terminal's table, which is narrow, has the column too."""


METRICS = (
    Metric(
        "pm_divergence",
        "PM div.",
        "PM divergence",
        True,
        "KL divergence, in nats, between the choices that the policy and the reward model make "
        "between two of the policy's own responses (section 6.1); equal responses count as 0, so "
        "that a policy with a single answer has 0",
    ),
    Metric(
        "pm_divergence_unequal",
        "PM neq.",
        "PM divergence, unequal pairs",
        True,
        "the same over the pairs whose two responses differ; none if no pair does",
        in_terminal=False,
    ),
    Metric(
        "pm_divergence_reference",
        "PM ref.",
        "PM divergence, reference's pairs",
        True,
        "the same over unequal pairs that the reference drew, from which no policy can hide",
        in_terminal=False,
    ),
    Metric(
        "equal_pairs",
        "equal",
        "Equal pairs",
        False,
        "share of the policy's pairs whose two responses are the same",
        in_terminal=False,
    ),
    Metric(
        "natural_mass",
        "π(M)",
        "Natural mass",
        False,
        "probability of the responses in the set that the run's regularizer counts as natural, "
        "M(x); only conditional PM has such a set",
        in_terminal=False,
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
        "optimum_kl",
        "KL opt.",
        "KL to own optimum",
        True,
        "estimate of KL(π ‖ π*), in nats, from the spread of r + R + πR′ within each prompt's "
        "responses; it needs no response set, and only log-linear regularizers have it",
        in_terminal=False,
    ),
    Metric(
        "optimum_gap",
        "gap",
        "Gap to own optimum",
        True,
        "half that spread's variance over β: what the objective can still gain, in units of reward",
        in_terminal=False,
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


DISTANCES = tuple(
    next(metric for metric in METRICS if metric.name == name)
    for name in ("tv_to_optimum", "tv_to_population", "outside_mass")
)
"""The columns by which methods are compared."""


def number(value: float | None) -> str:
    """Three decimals where they mean something, in at most eight characters; a dash for None."""
    if value is None:
        return "–"
    if abs(value) >= 1e6:
        return f"{value:.1e}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{3 if abs(value) < 10 else 2 if abs(value) < 100 else 1}f}"
