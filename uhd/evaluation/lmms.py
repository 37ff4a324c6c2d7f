"""Models for lmms-eval, which finds this function by the entry point ``lmms_eval.models``.

``python -m lmms_eval --model uhd --model_args pretrained=FOLDER --tasks ...``; see :mod:`uhd.evaluation.lmms_model`.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval registers as ``uhd``: a class for chat tasks, one for tasks that score continuations."""
    from lmms_eval.models.registry_v2 import ModelManifest

    home = "uhd.evaluation.lmms_model"
    return ModelManifest("uhd", simple_class_path=f"{home}.UHDSimple", chat_class_path=f"{home}.UHDChat")
