"""Regularizers: the mathematics of each, its exact optimum, and its form in a config.

base.py defines what a regularizer is. log_linear.py has kl, pm, conditional_pm and their relatives;
f_divergence.py (generators in divergences.py), generalized_pl.py (link functions in links.py) and
none.py have the others. optimum.py computes the exact optimum of each on a finite set. registry.py
lists all of them by name: a new regularizer is one class and one line there. README.md beside this
file has the table of objectives and optima.
"""

from step3_rlhf.regularizers.base import Marginal, Regularizer, ResponseSet
from step3_rlhf.regularizers.registry import (
    REGULARIZERS,
    RegularizerField,
    dump_regularizer,
    parse_regularizer,
)

__all__ = [
    "REGULARIZERS",
    "Marginal",
    "Regularizer",
    "RegularizerField",
    "ResponseSet",
    "dump_regularizer",
    "parse_regularizer",
]
