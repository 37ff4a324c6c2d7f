"""Names of a package that load on first use, and what is said where a library they need is missing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

_PROJECTS = {"PIL": "pillow"}


class LibraryMissing(ImportError):
    """A library is not installed, as where planning alone was wanted."""

    @classmethod
    def of(cls, what: str, problem: ModuleNotFoundError) -> ImportError:
        """What to raise for it; a module of our own that is missing stays what it is."""
        library = (problem.name or "").partition(".")[0]
        if library in ("", "uhd"):
            return problem
        words = f"{what} needs {_PROJECTS.get(library, library)}, which is missing here: pip install llava-uhd"
        return cls(f"{words} brings what uhd needs", name=problem.name)


def lazily(package: str, homes: Mapping[str, str], modules: Collection[str] = ()) -> Callable[[str], Any]:
    """A package's ``__getattr__``: ``homes`` has each name's module, ``modules`` are the package's own."""

    def find(name: str) -> Any:
        if name not in homes and name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(homes.get(name, f"{package}.{name}"))
        except ModuleNotFoundError as problem:
            raise LibraryMissing.of(f"{package}.{name}", problem) from None
        value = getattr(module, name) if name in homes else module
        setattr(sys.modules[package], name, value)
        return value

    return find
