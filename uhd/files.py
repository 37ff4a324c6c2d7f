"""Files that are read so that an error says which file is at fault."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    from safetensors import SafetensorError
except ModuleNotFoundError:  # planning does without, and nothing then reads such a file
    SafetensorError = ValueError

DAMAGE = (
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(AssertionError, RuntimeError, EOFError, SafetensorError),
)
"""What readers raise where a file's content is wrong."""


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn whatever is wrong with a file's content into one ``ValueError`` that names the file."""
    try:
        yield
    except DAMAGE as problem:
        if isinstance(problem, ValueError) and str(path) in str(problem):
            raise
        detail = problem if isinstance(problem, ValueError) else repr(problem)
        raise ValueError(f"{path} does not fit or is damaged: {detail}") from problem


def read_json(path: Path) -> dict[str, Any]:
    """Read an object of settings from a JSON file; a ``ValueError`` names the file where it holds none."""
    with damage_named(path):
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"it holds a {type(settings).__name__}, expected an object of settings")
    return settings
