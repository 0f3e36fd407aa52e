"""What gives a response its class, if no answer key does: a user's function, or its length."""

from bisect import bisect_left
from collections.abc import Callable

from step3_rlhf.regularizers.classes import ClassSettings
from step3_rlhf.rollout import Rollout
from training.errors import UserError
from training.plugins import import_callable
from training.runtime import ranks

Labels = list[str | None]
"""The class of each response; None is outside every class."""

LabelFunction = Callable[[list[str], list[str]], Labels]


def labels_of(classes: ClassSettings) -> Callable[[Rollout], Labels]:
    """What finds the classes of a rollout's responses."""
    if classes.function:
        function, name = import_labels(classes.function), classes.function
        return lambda rollout: _checked(function, name, rollout)
    bounds = classes.lengths
    return lambda rollout: [str(bisect_left(bounds, n)) for n in rollout.lengths.tolist()]


def import_labels(path: str) -> LabelFunction:
    """The function that the config names; see import_callable."""
    function: LabelFunction = import_callable(path, "regularizer.classes.function")
    return function


def _checked(function: LabelFunction, name: str, rollout: Rollout) -> Labels:
    """The function's labels; a fault on one rank ends all of them, with its message."""
    labels: Labels = []
    fault = None
    try:
        labels = list(function(list(rollout.prompts), list(rollout.responses)))
    except Exception as error:  # the user's own code runs here
        fault = f"raised {error!r}"
    if not fault and len(labels) != len(rollout):
        fault = f"returned {len(labels)} classes for {len(rollout)} responses"
    if not fault and not all(label is None or isinstance(label, str) for label in labels):
        fault = "returned a class that is neither a text nor null"
    for found in filter(None, ranks.gather_objects([fault])):
        raise UserError(f"regularizer.classes.function {name} {found}")
    return labels
