"""Names that have moved: their old import path works for one more release, with a ``DeprecationWarning``."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def moved(module: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Make a module's ``__getattr__`` from old name -> the module that has it now, or ``"module:new_name"``."""

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, new = homes[name].partition(":")
        warnings.warn(f"{module}.{name} has moved: use {home}.{new or name}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(home), new or name)

    return __getattr__
