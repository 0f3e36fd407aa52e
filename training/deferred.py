"""torch, imported when it is first used.

A config names mathematics that computes with tensors. It is checked in a fraction of a second,
before torch is imported: the modules of that mathematics import torch from here.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
    from torch import Tensor as Tensor
else:

    class _DeferredModule:
        """Looks like a module, and imports it when an attribute is asked for."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self._name), attribute)

    torch = _DeferredModule("torch")
    Tensor = Any  # for annotations only
