"""The registry of regularizers, and their form in a config.

base.py states the contract; the classes are in log_linear.py (kl, pm, conditional_pm, …),
f_divergence.py, generalized_pl.py and none.py. One more is one class and one line here, or
none: `{"class": "my_package.my_module:MyRegularizer", ...}` names a subclass from anywhere.
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
    """From config data: {"name": ..., parameters} or {"class": "package.module:Class", ...}.

    Raises:
        ValueError: for a name or class that cannot be found.
        pydantic.ValidationError: for parameters that do not fit, as a config section's own.
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
    """The subclass of Regularizer that `package.module:Class` names."""
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
    """What `parse_regularizer` turns back: JSON data, with "class" if not from the registry."""
    data = regularizer.model_dump(mode="json")
    kind = type(regularizer)
    if REGULARIZERS.get(regularizer.name) is kind:
        return data
    return {"class": f"{kind.__module__}:{kind.__qualname__}", **data}


RegularizerField = Annotated[
    Regularizer, BeforeValidator(parse_regularizer), PlainSerializer(dump_regularizer)
]
"""For a config: any regularizer, by name or by class; survives `model_dump(mode="json")`."""
