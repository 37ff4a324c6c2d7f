"""Own questions about own images: how well a saved model answers them under each slicing rule, and at what cost.

``uhd evaluate MODEL DATA.jsonl --strategies own,llava-next`` is the command; :func:`evaluate` the same in Python.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from uhd.lazily import lazily

if TYPE_CHECKING:
    from uhd.evaluation.judging import encoder_with, evaluate, table
    from uhd.evaluation.questions import Asked, read_questions
    from uhd.evaluation.scores import anls
    from uhd.nano.answer import load_model

_HOMES = dict.fromkeys(("encoder_with", "evaluate", "table"), "uhd.evaluation.judging")
_HOMES |= dict.fromkeys(("Asked", "read_questions"), "uhd.evaluation.questions")
_HOMES |= {"anls": "uhd.evaluation.scores", "load_model": "uhd.nano.answer"}
__all__ = ["Asked", "anls", "encoder_with", "evaluate", "load_model", "read_questions", "table"]

__getattr__ = lazily(__name__, _HOMES)  # the command line asks for its words only
