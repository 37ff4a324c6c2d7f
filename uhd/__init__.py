"""uhd: native-resolution eyes for any causal language model.

An image is planned (``uhd.plan``: slices at its own aspect ratio, in integers), cut, encoded by a packed ViT,
compressed by one shared resampler and laid out with "," and "\\n". Sizes are (height, width) and grids
(rows, columns), everywhere.

Names load on first use, so that ``import uhd`` and planning load no tensor library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uhd import compare, datasets, hf, pretrained, resampler, schema, slicing, vision
    from uhd.batch import SliceBatch
    from uhd.encoded import EncodedImage, EncodedVideo
    from uhd.encoder import VisualEncoder
    from uhd.hf import (
        UHDConfig,
        UHDForConditionalGeneration,
        UHDImageProcessor,
        UHDImageProcessorPil,
        UHDModel,
        UHDProcessor,
        UHDVideoProcessor,
        UHDVisionConfig,
    )
    from uhd.loading import Preparation, TokenBudgetSampler, image_costs, image_sizes_hw
    from uhd.merge import assemble, merge_samples, merge_visual, separator_embeddings
    from uhd.nano import load_nano
    from uhd.parts import register_compressor, register_vision
    from uhd.pixels import PixelSettings
    from uhd.planning import plan
    from uhd.schema import SpatialSchema, TokenLayout, layout, resolve_schema
    from uhd.slicing import (
        SlicePlan,
        SlicingConfig,
        candidates,
        grid_score,
        plan_images,
        plan_many,
        plan_video,
        register_strategy,
        strategies,
        strategy,
    )
    from uhd.token_files import load_tokens, save_tokens

__version__ = "0.1.0"

_NAMES = {
    "uhd.slicing": "SlicePlan SlicingConfig candidates grid_score plan_images plan_many plan_video "
    "register_strategy strategies strategy",
    "uhd.schema": "SpatialSchema TokenLayout layout resolve_schema",
    "uhd.planning": "plan",
    "uhd.pixels": "PixelSettings",
    "uhd.batch": "SliceBatch",
    "uhd.encoded": "EncodedImage EncodedVideo",
    "uhd.encoder": "VisualEncoder",
    "uhd.parts": "register_compressor register_vision",
    "uhd.loading": "Preparation TokenBudgetSampler image_costs image_sizes_hw",
    "uhd.nano": "load_nano",
    "uhd.token_files": "load_tokens save_tokens",
    "uhd.hf": "UHDConfig UHDForConditionalGeneration UHDImageProcessor UHDImageProcessorPil UHDModel UHDProcessor "
    "UHDVideoProcessor UHDVisionConfig",
    "uhd.merge": "assemble merge_samples merge_visual separator_embeddings",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
_MODULES = ("compare", "datasets", "hf", "nano", "pretrained", "resampler", "schema", "slicing", "vision")

__all__ = ["__version__", *_HOMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"uhd.{name}")
    else:
        raise AttributeError(f"module 'uhd' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
