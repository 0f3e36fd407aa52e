"""Whether stage 3 takes rewards under the link g with which the reward model was trained (§3.4)."""

from collections.abc import Iterable

from step3_rlhf.regularizers.base import Regularizer
from step3_rlhf.rewards.calibration import EXPONENTIAL
from training.errors import UserError
from training.models.pretrained import Pretrained
from training.runtime.tracking import say


def check_links(regularizer: Regularizer | None, rewards: Iterable[Pretrained]) -> None:
    """Refuse reward models of another link than the regularizer assumes.

    Differences of rewards are log-odds under the exponential link only, and everything in stage 3
    takes them so (β, e^{r/β}, softmax(r/T)), but for generalized_pl with its own g.

    Args:
        regularizer: None, for an evaluation without one, is the exponential link.

    Raises:
        UserError: names the models, both links and what to change.
    """
    name = "the evaluation" if regularizer is None else regularizer.name
    assumed = EXPONENTIAL if regularizer is None else regularizer.assumed_link
    faults = []
    for reward in rewards:
        learned = reward.learned_link
        if learned is None and assumed != EXPONENTIAL:
            say(
                f"{reward} does not say under which link it learned preferences; {name} takes its "
                f"rewards under g = {assumed}"
            )
        elif learned not in (None, assumed):
            faults.append(
                f"reward: {reward} learned preferences under the link {learned}, and {name} takes "
                f"rewards under {assumed}, which are other preferences; {_remedy(learned, assumed)}"
            )
    if faults:
        raise UserError(faults)


def _remedy(learned: str, assumed: str) -> str:
    regularizer = (
        "pm"
        if learned == EXPONENTIAL
        else f'{{"name": "generalized_pl", "g": "{learned}", "target": "luce"}}'
    )
    retrained = (
        "the power link needs positive rewards, which stage 2 does not train"
        if assumed == "power"
        else f"or train the reward model with link={assumed}"
    )
    return f"set regularizer to {regularizer}, {retrained}"
