"""uhd: native-resolution eyes for any causal language model.

An image is planned (``uhd.plan``: slices at its own aspect ratio, in integers), cut, encoded by a packed ViT,
compressed by one shared resampler and laid out with "," and "\\n". Sizes are (height, width) and grids
(rows, columns), everywhere.

Names load on first use, so that ``import uhd`` and planning load no tensor library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from uhd.lazily import lazily

if TYPE_CHECKING:
    from uhd import compare as compare
    from uhd import datasets as datasets
    from uhd import export as export
    from uhd import hf as hf
    from uhd import pretrained as pretrained
    from uhd import resampler as resampler
    from uhd import schema as schema
    from uhd import slicing as slicing
    from uhd import vision as vision
    from uhd.batch import SliceBatch as SliceBatch
    from uhd.encoded import EncodedImage as EncodedImage
    from uhd.encoded import EncodedVideo as EncodedVideo
    from uhd.encoder import VisualEncoder as VisualEncoder
    from uhd.hf import PackingCollator as PackingCollator
    from uhd.hf import UHDConfig as UHDConfig
    from uhd.hf import UHDForConditionalGeneration as UHDForConditionalGeneration
    from uhd.hf import UHDImageProcessor as UHDImageProcessor
    from uhd.hf import UHDImageProcessorPil as UHDImageProcessorPil
    from uhd.hf import UHDModel as UHDModel
    from uhd.hf import UHDProcessor as UHDProcessor
    from uhd.hf import UHDVideoProcessor as UHDVideoProcessor
    from uhd.hf import UHDVisionConfig as UHDVisionConfig
    from uhd.loading import Preparation as Preparation
    from uhd.loading import TokenBudgetSampler as TokenBudgetSampler
    from uhd.loading import image_costs as image_costs
    from uhd.loading import image_sizes_hw as image_sizes_hw
    from uhd.merge import assemble as assemble
    from uhd.merge import merge_samples as merge_samples
    from uhd.merge import merge_visual as merge_visual
    from uhd.merge import separator_embeddings as separator_embeddings
    from uhd.nano import load_nano as load_nano
    from uhd.parts import register_compressor as register_compressor
    from uhd.parts import register_vision as register_vision
    from uhd.pixels import PixelSettings as PixelSettings
    from uhd.planning import plan as plan
    from uhd.schema import SpatialSchema as SpatialSchema
    from uhd.schema import TokenLayout as TokenLayout
    from uhd.schema import layout as layout
    from uhd.schema import resolve_schema as resolve_schema
    from uhd.slicing import SlicePlan as SlicePlan
    from uhd.slicing import SlicingConfig as SlicingConfig
    from uhd.slicing import candidates as candidates
    from uhd.slicing import grid_score as grid_score
    from uhd.slicing import plan_images as plan_images
    from uhd.slicing import plan_many as plan_many
    from uhd.slicing import plan_video as plan_video
    from uhd.slicing import register_strategy as register_strategy
    from uhd.slicing import strategies as strategies
    from uhd.slicing import strategy as strategy
    from uhd.token_files import load_tokens as load_tokens
    from uhd.token_files import save_tokens as save_tokens

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
    "uhd.hf": "PackingCollator UHDConfig UHDForConditionalGeneration UHDImageProcessor UHDImageProcessorPil UHDModel "
    "UHDProcessor UHDVideoProcessor UHDVisionConfig",
    "uhd.merge": "assemble merge_samples merge_visual separator_embeddings",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
_MODULES = ("compare", "datasets", "export", "hf", "nano", "pretrained", "resampler", "schema", "slicing", "vision")

__all__ = ["__version__", *_HOMES, *_MODULES]


__getattr__ = lazily(__name__, _HOMES, _MODULES)


def __dir__() -> list[str]:
    return sorted(__all__)
