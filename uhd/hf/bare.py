"""What a saved folder needs to be loaded by a process that has not imported uhd: names, and a module of a few lines.

``trust_remote_code=True`` makes transformers import that module, which imports the installed package: nothing of the
library is copied, and the classes are the package's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from transformers import ProcessorMixin

from uhd.checkpoint import own_code_named
from uhd.writing import finish, new_files

if TYPE_CHECKING:
    from typing_extensions import Self

MODULE = "uhd_classes"

SOURCE = '''\
"""Finds the classes of this folder in the installed package, for trust_remote_code=True."""

try:
    from uhd.hf import *
except ImportError as problem:
    raise ImportError(f"this model needs the package llava-uhd ({problem}): pip install llava-uhd") from problem
'''


def auto_map(**classes: str) -> dict[str, str]:
    """Auto class -> where a folder has the class for it.

    >>> auto_map(AutoConfig="UHDConfig")
    {'AutoConfig': 'uhd_classes.UHDConfig'}
    """
    return {auto: f"{MODULE}.{name}" for auto, name in classes.items()}


def save_beside(save: Callable[..., Any], folder: Any, *args: Any, **kwargs: Any) -> Any:
    """Save as transformers does, with the module that the names of :func:`auto_map` point to, all at once.

    Returns what it returns, the paths of files as they are in the end.
    """
    with new_files(folder) as new:
        (new / f"{MODULE}.py").write_text(SOURCE, encoding="utf-8")
        found = save(str(new), *args, **kwargs)
    return [str(Path(folder, Path(file).relative_to(new))) for file in found] if isinstance(found, list) else found


class FromPackage:
    """Before a class of transformers: it is the package's whatever folder named it, so its code is never saved."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: ``auto_map`` is written by uhd."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Self:
        """As in transformers; a save that was killed is finished first, see :mod:`uhd.writing`."""
        finish(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


class FoundByName(FromPackage, ProcessorMixin):
    """A processor whose parts are found by their names, too, where transformers cannot be told of them."""

    _by_name: Mapping[str, type] = MappingProxyType({})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Self:
        """As in transformers; code that the folder brings is run only where ``trust_remote_code=True`` asks for it."""
        kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))
        with own_code_named(pretrained_model_name_or_path, "pass trust_remote_code=True if you trust it"):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def load_by_name(cls, attribute: str, part: type) -> None:
        """Load and take an image or video processor of this class where transformers has no Auto class for it."""
        FoundByName._by_name = {**cls._by_name, part.__name__: part}
        setattr(cls, f"{attribute}_class", part.__name__)

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """As in transformers, which has no base class to compare with where there is no Auto class."""
        if isinstance(argument, known := tuple(self._by_name.values())):
            return known
        return super().check_argument_for_proper_class(argument_name, argument)

    @staticmethod
    def get_possibly_dynamic_module(module_name: str) -> Any:
        """As in transformers, which looks for classes by name among those of Auto classes."""
        found = FoundByName._by_name.get(module_name)
        return ProcessorMixin.get_possibly_dynamic_module(module_name) if found is None else found
