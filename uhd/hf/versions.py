"""The one file that knows how releases of transformers differ: each difference is found by asking for the feature."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import nn
from transformers import ProcessorMixin, processing_utils, video_processing_utils

VideoProcessorBase: type = getattr(
    video_processing_utils, "VideoProcessorMixin", video_processing_utils.BaseVideoProcessor
)
"""Loads and saves a video processor; before 5.19 the class also brings tensor transforms, which are not used here."""

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What releases and model types call the key-value cache, or the state, in inputs and outputs."""


def take_cache(kwargs: dict[str, Any]) -> Any:
    """Remove the cache from ``kwargs``, whatever it is called there, and return it; ``None`` where there is none.

    Raises:
        ValueError: It was given under several names.
    """
    given = {name: kwargs.pop(name) for name in CACHE_NAMES if name in kwargs}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"the cache was given as {' and as '.join(given)}: give it once")
    return next(iter(given.values()), None)


def cache_name(lm: nn.Module) -> str:
    """The keyword under which a language model's ``forward`` takes its cache."""
    return _cache_name(type(lm).forward)


@lru_cache(maxsize=256)
def _cache_name(forward: Any) -> str:
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), "past_key_values")


def processor_defaults(defaults: Mapping[str, Mapping[str, Any]]) -> Any:
    """Class decorator: give a processor these keywords by modality, below what its calls say.

    From 5.23 they are read from the class itself, before from ``_defaults`` of its keywords' class.
    """

    def decorate(processor: type[ProcessorMixin]) -> type[ProcessorMixin]:
        processor.valid_processor_kwargs._defaults = {name: dict(value) for name, value in defaults.items()}
        for name, value in defaults.items():
            setattr(processor, name, dict(value))
        return processor

    return decorate


def without_marked_text(text: list[str]) -> list[str]:
    """Drop what ``apply_chat_template(sanitize_control_tokens=True)`` (from 5.23) marked as the user's own words."""
    marked: re.Pattern[str] | None = getattr(processing_utils, "_MARKED_RE", None)
    return text if marked is None else [marked.sub("", sample) for sample in text]
