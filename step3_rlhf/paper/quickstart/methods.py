"""The methods that the paper does not have, as the quickstart's further runs show them."""

from dataclasses import dataclass

from step3_rlhf.paper.quickstart.findings import Run


@dataclass(frozen=True)
class Method:
    """What one run of the quickstart is there to show."""

    called: str
    """What a reader needs to tell the run from others of its regularizer; empty if its config says
    so already."""
    meaning: str


YARDSTICK = "conditional_pm"
"""The run that the others are compared with. It is in the paper."""


METHODS = {
    YARDSTICK: Method("", "PPO, with a critic: what the others are compared with"),
    "rloo": Method("", "no critic: the other responses to a prompt are the baseline"),
    "direct": Method("", "no reward model and no drawing: from the comparisons, with an anchor"),
    "dpo": Method("", "the same under KL without an anchor, which is DPO"),
    "classes": Method(
        "opinions",
        "opinions instead of strings: the strings of an opinion keep the reference's proportions, "
        "so that these shares of strings are not the population's",
    ),
    "luce": Method(
        "g(r)/Σg",
        "the preference of Theorem 3 itself, with g = softplus and a reward model of it; like PM "
        "it weighs every string, also those that are not language",
    ),
    "ptx": Method("PTX", "texts of SFT beside the rewards, which move the optimum"),
    "ema": Method("last weights", "PPO once more, while an average of its weights is kept"),
    "ema_average": Method("averaged weights", "that average"),
    "weighted_sum": Method(
        "weighted sum", "two groups of opposite tastes: half of each group's reward, added up"
    ),
    "pooled": Method(
        "pooled comparisons", "the same groups: one reward model of everybody's comparisons"
    ),
    "mixture": Method("mixture", "the same groups: the mixture of what each of them wants"),
}
"""By the name of the run, which is that of its phase in quickstart.sh; in the page's order."""


def is_further(run: Run) -> bool:
    """Whether the run shows a method that the paper does not have."""
    return run.name in METHODS and run.name != YARDSTICK


def runs_of_methods(runs: dict[str, Run]) -> list[Run]:
    """The yardstick and the further methods that were run; none if there are no further ones."""
    if not any(map(is_further, runs.values())):
        return []
    return [runs[name] for name in METHODS if name in runs]
