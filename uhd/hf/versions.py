"""The one file that knows how releases of transformers differ: each difference is found by asking for the feature.

Private names of transformers are used here, or are methods that uhd overrides or calls: :data:`HOOKS` has them all.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

import transformers
from torch import nn
from transformers import (
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    processing_utils,
    video_processing_utils,
)
from transformers.image_processing_backends import PilBackend
from transformers.models.auto import modeling_auto

from uhd.ranks import unwrapped

_Processor = TypeVar("_Processor", bound=ProcessorMixin)

VideoProcessorBase: type = getattr(
    video_processing_utils, "VideoProcessorMixin", video_processing_utils.BaseVideoProcessor
)
"""Loads and saves a video processor; before 5.19 the class also brings tensor transforms, which are not used here."""

MARKS_WORDS = "sanitize_control_tokens" in inspect.signature(ProcessorMixin.apply_chat_template).parameters
"""Whether transformers itself (from 5.23) keeps the user's own words from being control tokens."""

CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")
"""What releases and model types call the key-value cache, or the state, in inputs and outputs."""


HOOKS = {
    "ProcessorMixin": ("_merge_kwargs", "_process_images", "_process_videos", "_check_special_mm_tokens"),
    "PilBackend": ("_preprocess_image_like_inputs", "_validate_preprocess_kwargs"),
    "PreTrainedModel": (
        "_init_weights",
        "_no_split_modules",
        "_skip_keys_device_placement",
        "_supports_attention_backend",
        "_supports_flash_attn",
        "_supports_flex_attn",
        "_supports_sdpa",
    ),
    "GenerationMixin": ("_get_candidate_generator", "_get_logits_processor"),
    "PreTrainedConfig": ("_attn_implementation", "_experts_implementation"),
}
"""Private methods and fields of transformers that uhd overrides or reads, by class.

Without one of them transformers would pass uhd's code by, so :func:`check_hooks` refuses the import instead.
"""


def check_hooks(*classes: type) -> None:
    """Raise an ``ImportError`` that says what to install where a class lacks one of its :data:`HOOKS`."""
    for kind in classes:
        missing = [name for name in HOOKS[kind.__name__] if not hasattr(kind, name)]
        if missing:
            raise ImportError(
                f"transformers {transformers.__version__} has no {kind.__name__}.{missing[0]}, which uhd needs: "
                "`uhd doctor` says which releases are supported"
            )


check_hooks(ProcessorMixin, PilBackend, PreTrainedModel, GenerationMixin, PreTrainedConfig)


def take_cache(kwargs: dict[str, Any], wanted: str | None = None) -> Any:
    """Remove the cache from ``kwargs``, whatever it is called there, and return it; ``None`` where there is none.

    Another name than the ``wanted`` one warns where that is ``cache``, as the language models' own ``forward`` do.

    Raises:
        ValueError: It was given under several names.
    """
    given = {name: kwargs.pop(name) for name in CACHE_NAMES if name in kwargs}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"the cache was given as {' and as '.join(given)}: give it once")
    if wanted == "cache" and given.keys() - {wanted}:
        warnings.warn(f"`{next(iter(given))}` is deprecated: use `cache` instead", FutureWarning, stacklevel=4)
    return next(iter(given.values()), None)


def cache_name(lm: nn.Module) -> str:
    """The keyword under which a language model's ``forward`` takes its cache."""
    return _cache_name(type(unwrapped(lm)).forward)


@lru_cache(maxsize=256)
def _cache_name(forward: Any) -> str:
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), "past_key_values")


def name_for_servers(model_type: str, model_class: str) -> None:
    """Name a model type where ``transformers serve`` looks for those that take images; registering it does not."""
    for table in ("MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"):
        names = getattr(modeling_auto, table, None)
        if names is not None:
            names[model_type] = model_class


def processor_defaults(defaults: Mapping[str, Mapping[str, Any]]) -> Callable[[type[_Processor]], type[_Processor]]:
    """Class decorator: give a processor these keywords by modality, below what its calls say.

    From 5.23 they are read from the class itself, before from ``_defaults`` of its keywords' class.
    """

    def decorate(processor: type[_Processor]) -> type[_Processor]:
        processor.valid_processor_kwargs._defaults = {name: dict(value) for name, value in defaults.items()}
        for name, value in defaults.items():
            setattr(processor, name, dict(value))
        return processor

    return decorate


def without_marked_text(text: list[str]) -> list[str]:
    """Drop what ``apply_chat_template(sanitize_control_tokens=True)`` (from 5.23) marked as the user's own words."""
    marked: re.Pattern[str] | None = getattr(processing_utils, "_MARKED_RE", None)
    return text if marked is None else [marked.sub("", sample) for sample in text]
