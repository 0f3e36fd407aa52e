"""β from the reward model's calibration: what `"beta": "calibrated"` stands for."""

import json
from pathlib import Path
from typing import Any

from training.config import Positive, StrictModel
from training.runtime.weights import weights_digest

CALIBRATED = "calibrated"
EXPONENTIAL = "exponential"
FILE = "calibration.json"
COMMAND = "bash scripts/calibrate.sh"

OF_MAXIMUM_ENTROPY = (
    "maximum_entropy has none, and its tau is chosen freely: with the calibrated temperature as "
    'tau it is pm, which {"name": "pm", "beta": "calibrated"} gives'
)


class BetaCalibration(StrictModel):
    """Where β came from; written by the run, not by the user."""

    beta: Positive
    """The temperature at which the reward model is calibrated: its maximum-likelihood estimate."""
    low: Positive | None = None
    """Lower bound of its 95 % confidence interval over groups of comparisons; null without one."""
    high: Positive | None = None
    """Upper bound of its 95 % confidence interval."""
    split: str
    """The held-out prompts that it is from; the test, which neither trained nor chose the model."""
    clusters: int
    """Number of groups of comparisons."""
    file: str
    """The calibration.json that it was read from."""


def with_calibrated_beta(settings: Any) -> tuple[Any, str]:
    """Put the number in place of `"beta": "calibrated"`, and where it came from beside it.

    Args:
        settings: of a config with `regularizer` and `reward`, not yet checked.

    Returns:
        The settings, and why there is no such number, with the remedy; empty if there is.
    """
    regularizer = settings.get("regularizer") if isinstance(settings, dict) else None
    if not isinstance(regularizer, dict):
        return settings, ""
    rest = {name: value for name, value in regularizer.items() if value != CALIBRATED}
    if regularizer.get("name") == "maximum_entropy" and rest != regularizer:
        return {**settings, "regularizer": rest}, OF_MAXIMUM_ENTROPY
    if regularizer.get("beta") != CALIBRATED:
        return settings, ""
    generalized = regularizer.get("name") == "generalized_pl"
    link = regularizer.get("g") if generalized else EXPONENTIAL
    try:
        found = read_calibration(settings.get("reward"), str(link))
    except ValueError as error:
        return {**settings, "regularizer": rest}, str(error)
    source = found.model_dump(mode="json")
    return {
        **settings,
        "regularizer": {**rest, "beta": found.beta},
        "beta_calibration": source,
    }, ""


def read_calibration(reward: Any, link: str = EXPONENTIAL) -> BetaCalibration:
    """The calibration that lies beside the reward model, or in its directory.

    Args:
        link: the g under which the regularizer takes rewards.

    Raises:
        ValueError: there is none, it is of another link, or the model has other weights by now.
    """
    name = reward.get("model_name_or_path") if isinstance(reward, dict) else None
    if not isinstance(name, str):
        raise ValueError(
            '"calibrated" needs a single reward model as '
            "reward.model_name_or_path; give beta as a number"
        )
    model = Path(name)
    places = [model.parent / FILE, model / FILE]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        directory = model.parent if model.name == "model" else model
        raise ValueError(f"{name} has no {FILE} beside it; `{COMMAND} {directory}` makes one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        beta, split, weights = content["beta"], content["split"], content["weights"]
        found = BetaCalibration(
            beta=beta["mean"],
            low=beta["low"],
            high=beta["high"],
            split=split,
            clusters=beta["clusters"],
            file=str(path),
        )
    except (KeyError, TypeError, ValueError) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{path} is no calibration: {message}") from error
    if (calibrated := content.get("link", EXPONENTIAL)) != link:
        raise ValueError(
            f"{path} is of the link {calibrated}, and the regularizer takes rewards under {link}"
        )
    if weights != weights_digest(model):
        raise ValueError(
            f"{path} is of other weights than {name} has; `{COMMAND} {path.parent}` makes a new one"
        )
    return found
