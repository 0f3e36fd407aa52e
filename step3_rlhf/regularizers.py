"""The registry of regularizers, and their form in a config.

The contract is in regularization.py; the classes are in log_linear.py (kl, pm, conditional_pm, …),
divergences.py (f_divergence) and generalized_pl.py. One more is one class and one line here, or
none: `{"class": "my_package.my_module:MyRegularizer", ...}` names a subclass from anywhere.
"""

import importlib
import inspect
import math
import sys
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, PlainSerializer
from torch import Tensor

from step3_rlhf.divergences import FDivergence
from step3_rlhf.generalized_pl import GeneralizedPL
from step3_rlhf.log_linear import (
    KL,
    ConditionalPM,
    KLInterpolation,
    LogLinear,
    MaximumEntropy,
    PreferenceMatching,
)
from step3_rlhf.optimum import ResponseSet
from step3_rlhf.regularization import Marginal, Regularizer, unbound
from training.errors import did_you_mean

__all__ = [
    "REGULARIZERS",
    "LogLinear",
    "Marginal",
    "Regularizer",
    "RegularizerField",
    "dump_regularizer",
    "parse_regularizer",
]


class NoRegularizer(Regularizer):
    """objective E[r]; marginal 0; optimum: all mass on the responses of highest reward (Prop. 3.1).

    Where several share it, `log_optimum` is uniform over them.
    """

    name: Literal["none"] = "none"

    def value(self, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
        return torch.zeros_like(logp[:, 0])

    def marginal(self, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Marginal:
        return Marginal(torch.zeros_like(logp), unbound(mask))

    def log_optimum(self, responses: ResponseSet) -> Tensor:
        best = responses.rewards == responses.rewards.max()
        return torch.where(best, 0.0, -math.inf).double().log_softmax(0)


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
    module_name, _, class_name = str(path).partition(":")
    if not module_name or not class_name:
        raise ValueError(f'class: {path!r}; write it as "package.module:Class"')
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # the module's own code runs here
        raise ValueError(f"class: {module_name} cannot be imported: {error!r}") from error
    for part in class_name.split("."):
        found = getattr(found, part, None)
    if found is None:
        known = [key for key, entry in vars(sys.modules[module_name]).items() if _is_one(entry)]
        raise ValueError(
            f"class: {module_name} has no {class_name}{did_you_mean(class_name, known)}"
        )
    if not _is_one(found):
        raise ValueError(f"class: {path} is not a subclass of step3_rlhf.regularizers.Regularizer")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ValueError(f"class: {path} does not define {missing}")
    return found


def _is_one(entry: Any) -> bool:
    return inspect.isclass(entry) and issubclass(entry, Regularizer)


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
