"""What a saved folder needs to be loaded by a process that has not imported uhd: names, and a module of a few lines.

``trust_remote_code=True`` makes transformers import that module, which imports the installed package: nothing of the
library is copied, and the classes are the package's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODULE = "uhd_classes"

SOURCE = '''\
"""Finds the classes of this folder in the installed package, for trust_remote_code=True."""

try:
    from uhd.hf import (
        UHDConfig,
        UHDForConditionalGeneration,
        UHDImageProcessor,
        UHDImageProcessorPil,
        UHDModel,
        UHDProcessor,
        UHDVideoProcessor,
    )
except ImportError as problem:
    raise ImportError(f"this model needs the package llava-uhd ({problem}): pip install llava-uhd") from problem

__all__ = [
    "UHDConfig",
    "UHDForConditionalGeneration",
    "UHDImageProcessor",
    "UHDImageProcessorPil",
    "UHDModel",
    "UHDProcessor",
    "UHDVideoProcessor",
]
'''


def auto_map(**classes: str) -> dict[str, str]:
    """Auto class -> where a folder has the class for it.

    >>> auto_map(AutoConfig="UHDConfig")
    {'AutoConfig': 'uhd_classes.UHDConfig'}
    """
    return {auto: f"{MODULE}.{name}" for auto, name in classes.items()}


def write_module(folder: Any) -> None:
    """Write the module that the names of :func:`auto_map` point to; the folder is made where it is missing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{MODULE}.py").write_text(SOURCE, encoding="utf-8")


class FromPackage:
    """Before a class of transformers: it is the package's whatever folder named it, so its code is never saved."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: ``auto_map`` is written by uhd."""
