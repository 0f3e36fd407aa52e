"""Import of users' own code by name; no other module imports what a config names."""

import importlib
import os
import sys
from typing import Any

from training.errors import UserError, did_you_mean


def import_object(path: str, form: str = "package.module:name") -> Any:
    """Import the object that `package.module:name` (or `package.module:Outer.inner`) names.

    Args:
        form: the form of the path that the error message asks for.

    Raises:
        ValueError: the path is malformed, or there is no such module or name.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ValueError(f'{path!r}; write it as "{form}"')
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # modules beside the user; last, so that they replace none
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module's own code runs here
        raise ValueError(f"{module_name} cannot be imported: {error!r}") from error
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if found is None:
        known = [name for name, value in vars(module).items() if callable(value)]
        raise ValueError(f"{module_name} has no {attribute}{did_you_mean(attribute, known)}")
    return found


def import_callable(path: str, setting: str) -> Any:
    """Import the callable that `module:callable`, the value of `setting`, names.

    Raises:
        UserError: it cannot be imported, or is not callable.
    """
    try:
        found = import_object(path, form="module:callable")
    except ValueError as error:
        raise UserError(f"{setting}: {path} cannot be imported: {error}") from error
    if not callable(found):
        raise UserError(f"{setting}: {path} is not callable")
    return found


def module_file(path: str) -> str | None:
    """The file of the module in `package.module:name`; None if the module has no file."""
    return getattr(importlib.import_module(path.partition(":")[0]), "__file__", None)
