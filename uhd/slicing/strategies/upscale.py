"""Tilers that look for the canvas which enlarges the image least: Llama-4, Mllama, Cohere2, Molmo2, OpenAI."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from uhd.slicing.plan import Box, Canvas, Packing, SlicePlan
from uhd.slicing.strategies.base import BLACK, Size, StrategyConfig, by_name, ceil_div, fit, rule_of
from uhd.slicing.strategies.selectors import Grids, grids_up_to, least_upscaling, pairs_by_ratio


@dataclass(frozen=True)
class Llama4Config(StrategyConfig):
    """Llama-4."""

    tile: int = 336
    merge: int = 2
    max_tiles: int = 16
    resample: str = field(default="bilinear", kw_only=True)


@rule_of(Llama4Config)
def llama4(image_hw: Size, config: Llama4Config) -> SlicePlan:
    """Fit the image, never enlarged beyond one tile, top left on black; a cut image has a stretched overview, last.

    Source: transformers, models/llama4/image_processing_llama4.py ``get_best_fit``.
    Models: Llama-4 Scout and Maverick.
    Traps: the scales are compared in float32; a tile separator and a row separator follow in the text.
    """
    grids = tuple(grid for group in pairs_by_ratio(config.max_tiles).values() for grid in group)
    grid = least_upscaling(image_hw, grids, config.tile, dtype=np.float32)
    canvases = (config.tiles(grid, content_hw=_capped(image_hw, grid, config.tile), fill=BLACK),)
    if math.prod(grid) > 1:
        canvases += (config.whole(),)
    return config.finish(image_hw, canvases)


def _capped(image_hw: Size, grid: Size, tile: int) -> Size:
    """The image fitted into its canvas, enlarged to one tile at most; sides are floored and at least 1."""
    box_hw = tuple(min(max(length, tile), count * tile) for length, count in zip(image_hw, grid, strict=True))
    return fit(image_hw, box_hw, lambda side: max(math.floor(side), 1))


@dataclass(frozen=True)
class MllamaConfig(StrategyConfig):
    """Llama-3.2-Vision."""

    tile: int = 560
    max_tiles: int = 4
    resample: str = field(default="bilinear", kw_only=True)


@rule_of(MllamaConfig)
def mllama(image_hw: Size, config: MllamaConfig) -> SlicePlan:
    """Fit the image, never enlarged beyond one tile, top left on black, into 1 to 4 tiles; no overview.

    Tokens are those that cross-attention reads, (tile / patch)^2 + 1 a tile; the text holds one token.
    Source: transformers, models/mllama/image_processing_mllama.py ``get_optimal_tiled_canvas``.
    Models: Llama-3.2-Vision 11B and 90B.
    Traps: the port's aspect ratios are called (width, height) but used as (height, width).
    """
    grids = tuple(sorted(grids_up_to(config.max_tiles)))
    grid = least_upscaling(image_hw, grids, config.tile)
    content_hw = _capped(image_hw, grid, config.tile)
    slices = config.tiles(grid, config.token_side**2 + 1, content_hw=content_hw, fill=BLACK)
    return config.finish(image_hw, (slices,))


@dataclass(frozen=True)
class Cohere2Config(StrategyConfig):
    """Command A Vision."""

    patch_size: int = 16
    tile: int = 512
    merge: int = 2
    max_tiles: int = 12


@rule_of(Cohere2Config)
def cohere2(image_hw: Size, config: Cohere2Config) -> SlicePlan:
    """Stretch the image over the grid that enlarges it least; a cut image has a stretched overview, last.

    Source: transformers, models/cohere2_vision/image_processing_cohere2_vision.py ``get_optimal_tiled_canvas``.
    Models: Command A Vision.
    Traps: the grid is chosen as if the aspect were kept, but the image is stretched: a 2:3 page becomes a square.
    """
    grid = least_upscaling(image_hw, grids_up_to(config.max_tiles), config.tile)
    return config.finish(image_hw, config.stretched(grid))


@dataclass(frozen=True)
class Molmo2Config(StrategyConfig):
    """Molmo2's overlapping crops.

    Attributes:
        margins: Patches on the (leading, trailing) edge of a crop that the next crop sees too.
        merge: Features pooled per side after the crops are joined; a rest counts as one.
    """

    tile: int = 378
    margins: Size = (4, 4)
    max_tiles: int = 8
    merge: int = 2
    resample: str = field(default="bilinear", kw_only=True)
    antialias: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(self.margins) >= self.tile // self.patch_size:
            raise ValueError(f"margins {self.margins} leave nothing of {self.tile // self.patch_size} patches")

    def for_vision(self, *, image_size: int | None, patch_size: int) -> Molmo2Config:
        # margins keep their share of a crop's patches: 4 of 27, and also 4 of 24
        image_size = image_size or self.tile
        share = (image_size // patch_size) / (self.tile // self.patch_size)
        margins = tuple(round(margin * share) for margin in self.margins)
        return self.replace(tile=image_size, patch_size=patch_size, margins=margins)


@rule_of(Molmo2Config)
def molmo2(image_hw: Size, config: Molmo2Config) -> SlicePlan:
    """Stretch the image over crops that overlap by 8 patches, keep each patch once, pool 2 x 2; overview first.

    Source: transformers, models/molmo2/image_processing_molmo2.py ``compute_crop_geometry``.
    Models: Molmo2; Molmo has the rule with other numbers.
    Traps: pixels are encoded up to 1.5 times; scales are compared in float32 and may be negative for small images;
    the release resizes without antialiasing, so fine print in large images aliases.
    """
    side, margin = config.tile // config.patch_size, sum(config.margins)
    window = side - margin
    stride = window * config.patch_size
    grids: Grids = tuple(sorted(grids_up_to(config.max_tiles)))
    inner_hw = tuple(length - margin * config.patch_size for length in image_hw)
    grid = least_upscaling(inner_hw, grids, stride, dtype=np.float32)
    overview = config.whole(side * side)
    slices = config.tiles(grid, side * side, stride_hw=(stride, stride))
    map_hw = (grid[0] * window + margin, grid[1] * window + margin)
    packing = Packing(view_hw=(side, side), map_hw=map_hw, overlap=config.margins, merge=config.merge)
    return config.finish(image_hw, (overview, slices), packing=packing)


@dataclass(frozen=True)
class OpenAIConfig(StrategyConfig):
    """The tiles that OpenAI documents for GPT-4V and GPT-4o.

    Attributes:
        longest, shortest: The image is shrunk until its sides are at most these, px.
        base_tokens, tile_tokens: Of the overview, and of a tile.
        remainder: What fills a partial tile: ``"pad"``, or ``"overlap"``: tiles are spread evenly and overlap.
        detail: ``"high"``, or ``"low"``: the overview alone.
    """

    patch_size: int = 32
    tile: int = 512
    longest: int = 2048
    shortest: int = 768
    base_tokens: int = 85
    tile_tokens: int = 170
    remainder: str = "pad"
    detail: str = "high"

    grows = ("longest", "shortest")
    choices: ClassVar = {"remainder": ("pad", "overlap"), "detail": ("high", "low")}
    nested = True


@rule_of(OpenAIConfig)
def openai_tiles(image_hw: Size, config: OpenAIConfig) -> SlicePlan:
    """Shrink into 2048 x 2048, then to a shorter side of 768, and count 512 px tiles: 85 + 170 a tile.

    Small images are not enlarged. ``remainder="overlap"`` is what the LLaVA-UHD authors infer from counting errors:
    tiles at round(i * (length - 512) / (tiles - 1)), so that content near the seams is seen twice.
    Source: OpenAI's vision guide (documented examples: 1024x1024 costs 765, 2048x4096 costs 1105); the overlap is the
    pilot study of LLaVA-UHD (arXiv 2403.11703).
    Models: GPT-4V, GPT-4o, GPT-4.1; smaller models cost other tokens.
    Traps: nobody outside has run it: the rounding of scaled sides (here to the nearest px), the filling of partial
    tiles, the overview's geometry, the patch size, the filter and what makes 85 or 170 tokens of a view are
    assumptions. Here a resampler of 170 latents does, of which the overview takes the first 85, as in the Matryoshka
    query transformer (arXiv 2405.19315); one of fewer latents gives no view more than it has.
    """
    small_hw = _shrunk(image_hw, config.tile / max(image_hw))
    overview = config.whole(config.base_tokens, content_hw=small_hw, fill=BLACK)
    if config.detail == "low":
        return config.finish(image_hw, (overview,))
    content_hw = _shrunk(image_hw, config.longest / max(image_hw))
    content_hw = _shrunk(content_hw, config.shortest / min(content_hw))
    grid = tuple(ceil_div(length, config.tile) for length in content_hw)
    slices = config.tiles(grid, config.tile_tokens, content_hw=content_hw, fill=BLACK)
    if config.remainder == "overlap":
        slices = _overlapping(slices, content_hw, config.tile)
    return config.finish(image_hw, (overview, slices))


def _shrunk(image_hw: Size, scale: float) -> Size:
    return image_hw if scale >= 1 else tuple(max(round(length * scale), 1) for length in image_hw)


def _overlapping(canvas: Canvas, content_hw: Size, tile: int) -> Canvas:
    """Tiles spread over the content alone; a side shorter than one tile stays padded."""
    size_hw = tuple(max(length, tile) for length in content_hw)
    tops, lefts = (
        [0] if count == 1 else [round(i * (length - tile) / (count - 1)) for i in range(count)]
        for count, length in zip(canvas.grid, size_hw, strict=True)
    )
    tiles = tuple(Box(top, left, top + tile, left + tile) for top in tops for left in lefts)
    return replace(canvas, size_hw=size_hw, tiles=tiles)


STRATEGIES = by_name(
    (Llama4Config("llama4-336-max16"), "up to 16 336 px tiles, top left on black, overview last; Llama-4"),
    (MllamaConfig("mllama-560-max4"), "up to 4 560 px tiles on black, cross-attention tokens; Llama-3.2-Vision"),
    (Cohere2Config("cohere2-vision-512-max12"), "up to 12 stretched 512 px tiles, overview last; Command A Vision"),
    (Molmo2Config("molmo2-378-max8"), "up to 8 overlapping 378 px crops, pooled 2 x 2, overview first; Molmo2"),
    (OpenAIConfig("openai-high-detail"), "512 px tiles of an image shrunk to 768 px, 85 + 170 a tile; GPT-4V"),
    (OpenAIConfig("openai-high-detail-overlap", remainder="overlap"), "the same with overlapping tiles"),
    (OpenAIConfig("openai-low-detail", detail="low"), "one 512 px view, 85 tokens; GPT-4V in low detail"),
)
ALIASES = {
    "llama4": "llama4-336-max16",
    "llama-4": "llama4-336-max16",
    "llama-3.2-vision": "mllama-560-max4",
    "mllama": "mllama-560-max4",
    "cohere2": "cohere2-vision-512-max12",
    "cohere2-vision": "cohere2-vision-512-max12",
    "command-a-vision": "cohere2-vision-512-max12",
    "molmo2": "molmo2-378-max8",
    "gpt-4v": "openai-high-detail",
    "gpt-4o": "openai-high-detail",
    "openai": "openai-high-detail",
}
