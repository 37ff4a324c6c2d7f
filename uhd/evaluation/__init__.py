"""Own questions about own images: how well a saved model answers them under each slicing rule, and at what cost.

``uhd evaluate MODEL DATA.jsonl --strategies own,llava-next`` is the command; :func:`evaluate` the same in Python.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uhd.evaluation.judging import encoder_with, evaluate, load_model, table
    from uhd.evaluation.questions import Asked, read_questions
    from uhd.evaluation.scores import anls

_HOMES = dict.fromkeys(("encoder_with", "evaluate", "load_model", "table"), "judging")
_HOMES |= {"Asked": "questions", "read_questions": "questions", "anls": "scores"}
__all__ = ["Asked", "anls", "encoder_with", "evaluate", "load_model", "read_questions", "table"]


def __getattr__(name: str) -> Any:
    """Loaded on first use: the command line asks for its words only."""
    if name not in _HOMES:
        raise AttributeError(f"module 'uhd.evaluation' has no attribute {name!r}")
    return getattr(importlib.import_module(f"uhd.evaluation.{_HOMES[name]}"), name)
