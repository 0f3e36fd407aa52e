"""The registry of regularizers, and their form in a config.

A regularizer of your own needs no line here: {"class": "my_package.my_module:MyRegularizer", ...}
names any subclass of Regularizer.
"""

import inspect
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from step3_rlhf.regularizers.base import Regularizer
from step3_rlhf.regularizers.f_divergence import FDivergence
from step3_rlhf.regularizers.generalized_pl import GeneralizedPL
from step3_rlhf.regularizers.log_linear import (
    KL,
    ConditionalPM,
    KLInterpolation,
    MaximumEntropy,
    PreferenceMatching,
)
from step3_rlhf.regularizers.none import NoRegularizer
from training.errors import did_you_mean
from training.plugins import import_object

REGULARIZERS: dict[str, type[Regularizer]] = {
    "none": NoRegularizer,
    "kl": KL,
    "pm": PreferenceMatching,
    "maximum_entropy": MaximumEntropy,
    "conditional_pm": ConditionalPM,
    "kl_interpolation": KLInterpolation,
    "f_divergence": FDivergence,
    "generalized_pl": GeneralizedPL,
}


def parse_regularizer(value: Any) -> Regularizer:
    """Build a regularizer from {"name": ..., parameters} or {"class": "package.module:Class", ...}.

    Raises:
        ValueError: the name or class cannot be found.
        pydantic.ValidationError: the parameters do not fit; a config reports this as its own fault.
    """
    if isinstance(value, Regularizer):
        return value
    if not isinstance(value, dict):
        raise ValueError('an object with "name" or "class" was expected')
    if "class" in value:
        parameters = {key: entry for key, entry in value.items() if key != "class"}
        return _imported(value["class"]).model_validate(parameters)
    name = str(value.get("name", ""))
    if name not in REGULARIZERS:
        raise ValueError(f"name: no regularizer {name!r}{did_you_mean(name, REGULARIZERS)}")
    return REGULARIZERS[name].model_validate(value)


def _imported(path: Any) -> type[Regularizer]:
    """Import the subclass of Regularizer that `package.module:Class` names."""
    try:
        found = import_object(str(path), form="package.module:Class")
    except ValueError as error:
        raise ValueError(f"class: {error}") from error
    if not (inspect.isclass(found) and issubclass(found, Regularizer)):
        raise ValueError(f"class: {path} is not a subclass of step3_rlhf.regularizers.Regularizer")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ValueError(f"class: {path} does not define {missing}")
    return found


def dump_regularizer(regularizer: Regularizer) -> dict[str, Any]:
    """JSON data that `parse_regularizer` reads back; it has "class" if not from the registry."""
    data = regularizer.model_dump(mode="json")
    kind = type(regularizer)
    if REGULARIZERS.get(regularizer.name) is kind:
        return data
    return {"class": f"{kind.__module__}:{kind.__qualname__}", **data}


RegularizerField = Annotated[
    Regularizer, BeforeValidator(parse_regularizer), PlainSerializer(dump_regularizer)
]
"""Type of a config field that holds any regularizer; `model_dump(mode="json")` keeps it."""
