"""The AnyRes family: the image is fitted into the best of a list of canvases, centred, and cut into tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from uhd.slicing.plan import Box, Canvas, Packing, SlicePlan
from uhd.slicing.strategies.base import (
    BLACK,
    GRAY,
    Size,
    StrategyConfig,
    by_name,
    ceil_div,
    centred,
    fit,
    rule_of,
    single,
)
from uhd.slicing.strategies.fixed import SquarePadConfig
from uhd.slicing.strategies.selectors import Grids, best_resolution, grids_up_to

_NEXT = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
_SIX_BY_SIX = tuple((rows, cols) for rows in range(1, 7) for cols in range(1, 7))
_DEEPSEEK = grids_up_to(9)
_UP_TO_TEN = tuple((rows, cols) for rows in range(1, 11) for cols in range(1, 11) if rows * cols <= 10)
_NEXT_SWAPPED = tuple((cols, rows) for rows, cols in _NEXT)
_SIX_SWAPPED = tuple((cols, rows) for rows, cols in _SIX_BY_SIX)


@dataclass(frozen=True)
class AnyResConfig(StrategyConfig):
    """LLaVA-NeXT's AnyRes and its descendants.

    Attributes:
        grids: Of canvases. LLaVA's own code reads the released lists as (width, height), transformers as
            (height, width).
        max_tiles: k of ``anyres_max_k``: from 1.21 * k tiles of features on, the map is resized to k tiles'. ``None``:
            no bound.
        rate: (numerator, denominator): features per side of a tile after the model's downsampling.
        unpad_rounding: ``"transformers"`` rounds to 7 digits before truncating, ``"original"`` only truncates.
        square_fill: RGB around one of several images, for LLaVA-OneVision: int(255 * mean).
    """

    tile: int = 336
    grids: Grids = _NEXT
    max_tiles: int | None = None
    rate: Size = (1, 1)
    unpad_rounding: str = "transformers"
    square_fill: tuple[int, int, int] = GRAY

    choices: ClassVar = {"unpad_rounding": ("transformers", "original")}
    learned = ("newline",)

    # LLaVA-OneVision alone bounds its maps; source of both modes: transformers, models/llava_onevision/
    def for_images(self, num_images: int) -> StrategyConfig:
        if self.max_tiles is None or num_images < 2:
            return self
        name = f"{self.name}-multi-image"
        return SquarePadConfig(
            name, self.patch_size, self.tile, self.square_fill, newline=True, resample=self.resample
        )

    def for_video(self) -> VideoFrameConfig | None:
        if self.max_tiles is None:
            return None
        return VideoFrameConfig(f"{self.name}-video", self.patch_size, self.tile, resample=self.resample)


@rule_of(AnyResConfig)
def anyres(image_hw: Size, config: AnyResConfig) -> SlicePlan:
    """Fit the image into the canvas that keeps most pixels, centre it on black, cut tiles; the stretched image first.

    The tiles' features form one map; rows or columns of padding are dropped, a newline follows every feature row, and
    above ``max_tiles`` the map is resized as a whole: tokens = base + rows * (columns + 1).
    Source: LLaVA-VL/LLaVA-NeXT, llava/mm_utils.py and llava_arch.py; transformers, models/llava_next/ and
    models/llava_onevision/ (``select_best_resolution``, ``pack_image_features``), models/granite4_vision/.
    Models: LLaVA-NeXT (1.6), LLaVA-OneVision, LLaVA-Video's images, Granite Vision.
    Traps: the two axis orders break ties differently (a sixth of sizes get another grid); up to one feature row of
    padding survives; ``max_tiles`` has 1.21 of slack, so tokens may exceed (k + 1) * base.
    """
    rows, cols = best_resolution(image_hw, config.grids, config.tile)
    side = config.token_side * config.rate[0] // config.rate[1]
    map_hw = (rows * side, cols * side)
    kept = unpadded(image_hw, map_hw, config.unpad_rounding)
    resized_hw = _bounded(kept.size_hw, side, config.max_tiles)
    base = side * side
    packing = Packing(view_hw=(side, side), map_hw=map_hw, kept=kept, resized_hw=resized_hw, newline=True)
    slices = _fitted(image_hw, (rows, cols), config.tile, config, base)
    return config.finish(image_hw, (config.whole(base), slices), packing=packing)


def _fitted(image_hw: Size, grid: Size, cell: int, config: StrategyConfig, tokens: int) -> Canvas:
    """The image fitted into a grid of cells, centred on black, and cut into tiles."""
    canvas_hw = (grid[0] * cell, grid[1] * cell)
    content_hw = fit(image_hw, canvas_hw, math.ceil)
    tiles = (ceil_div(canvas_hw[0], config.tile), ceil_div(canvas_hw[1], config.tile))
    offset = centred(content_hw, canvas_hw)
    return config.tiles(tiles, tokens, content_hw=content_hw, offset=offset, fill=BLACK)


def unpadded(image_hw: Size, map_hw: Size, rounding: str) -> Box:
    """The part of a feature map that shows the image rather than padding; an odd row or column stays.

    Source: transformers, models/llava_next/modeling_llava_next.py ``unpad_image``; LLaVA-NeXT's own code truncates
    without rounding first.
    """

    def whole(value: float) -> int:
        return int(round(value, 7)) if rounding == "transformers" else int(value)

    (height, width), (rows, cols) = image_hw, map_hw
    if width / height > cols / rows:
        gap = (rows - whole(height * (cols / width))) // 2
        return Box(gap, 0, rows - gap, cols)
    gap = (cols - whole(width * (rows / height))) // 2
    return Box(0, gap, rows, cols - gap)


def _bounded(map_hw: Size, side: int, max_tiles: int | None) -> Size | None:
    """The size that ``anyres_max_k`` resizes a map to; ``None`` where it leaves it."""
    if max_tiles is None:
        return None
    excess = math.sqrt(map_hw[0] * map_hw[1] / (max_tiles * side**2))
    return (int(map_hw[0] // excess), int(map_hw[1] // excess)) if excess > 1.1 else None


@dataclass(frozen=True)
class ThresholdConfig(StrategyConfig):
    """The token threshold as the LLaVA-OneVision paper writes it.

    Attributes:
        threshold: Most visual tokens of an image.
    """

    tile: int = 384
    grids: Grids = _SIX_BY_SIX
    threshold: int = 7290


def threshold_tokens(num_slices: int, tokens: int, threshold: int) -> int:
    """Tokens of each of ``num_slices + 1`` crops: ``tokens``, or ``threshold // (num_slices + 1)`` where that is less.

    Source: LLaVA-OneVision (arXiv 2408.03326), Higher AnyRes: L = (a * b + 1) * T against the threshold.

    >>> threshold_tokens(9, 729, 7290), threshold_tokens(16, 729, 7290)
    (729, 428)
    """
    crops = num_slices + 1
    return tokens if crops * tokens <= threshold else threshold // crops


@rule_of(ThresholdConfig)
def anyres_threshold(image_hw: Size, config: ThresholdConfig) -> SlicePlan:
    """AnyRes tiles, and every view's features resized so that all views together keep a hard cap on tokens.

    A view's map becomes the largest square of at most threshold / (tiles + 1) features. No un-padding, no newlines.
    Source: LLaVA-OneVision (arXiv 2408.03326), the rule of the paper; the released code is :func:`anyres` with
    ``max_tiles``.
    Models: none released; for comparison with ``anyres_max_k``.
    Traps: a square map cannot have exactly threshold / (tiles + 1) features, so a plan stays a little below.
    """
    rows, cols = best_resolution(image_hw, config.grids, config.tile)
    side = config.token_side
    tokens = threshold_tokens(rows * cols, side * side, config.threshold)
    pooled = math.isqrt(tokens)
    if pooled < 1:
        raise ValueError(f"threshold {config.threshold} leaves no token for each of {rows * cols + 1} views: raise it")
    overview = config.whole(pooled**2)
    slices = _fitted(image_hw, (rows, cols), config.tile, config, pooled**2)
    packing = Packing(view_hw=(side, side), pooled_hw=(pooled, pooled)) if pooled < side else None
    return config.finish(image_hw, (overview, slices), packing=packing)


@dataclass(frozen=True)
class VideoFrameConfig(StrategyConfig):
    """A frame of a video in LLaVA-OneVision. ``pool``: features joined per side."""

    tile: int = 384
    pool: int = 2

    learned = ("newline",)

    def for_video(self) -> VideoFrameConfig:
        return self


@rule_of(VideoFrameConfig)
def video_frame(image_hw: Size, config: VideoFrameConfig) -> SlicePlan:
    """Stretch the frame to one view and resize its feature map (bilinear) to half its sides, rounded up.

    A plan is one frame; :func:`video_tokens` counts a video, which ends with one newline.
    Source: transformers, models/llava_onevision/modeling_llava_onevision.py ``apply_pooling``.
    Models: LLaVA-OneVision, LLaVA-Video.
    Traps: bilinear pooling rounds 27 / 2 up (196 tokens), average and max pooling down (169).
    """
    side = config.token_side
    pooled = ceil_div(side, config.pool)
    packing = Packing(view_hw=(side, side), pooled_hw=(pooled, pooled))
    return config.finish(image_hw, (config.whole(pooled**2),), packing=packing)


def video_tokens(num_frames: int, config: VideoFrameConfig | None = None) -> int:
    """Tokens of a video of ``num_frames`` frames, its one newline included; 0 for no frames.

    Raises:
        ValueError: A negative number of frames.

    >>> video_tokens(8)
    1569
    """
    if num_frames < 0:
        raise ValueError(f"a video has at least 0 frames, got {num_frames}")
    frame = video_frame((1, 1), config or VideoFrameConfig())
    return num_frames * frame.num_visual_tokens + 1 if num_frames else 0


@dataclass(frozen=True)
class DeepSeekVL2Config(StrategyConfig):
    """DeepSeek-VL2's tiles; ``merge`` pads a rest, ``cropping`` is ``False`` for more than two images."""

    tile: int = 384
    grids: Grids = _DEEPSEEK
    merge: int = 2
    cropping: bool = True

    learned = ("newline", "separator")

    def for_images(self, num_images: int) -> DeepSeekVL2Config:
        """Without crops from three images on, as ``tokenize_with_images`` of the release does."""
        return self if num_images < 3 else self.replace(cropping=False)


@rule_of(DeepSeekVL2Config)
def deepseek_vl2(image_hw: Size, config: DeepSeekVL2Config) -> SlicePlan:
    """Fit the image into the best of 23 canvases, centred on gray, and cut; the letterboxed whole image first.

    Newlines follow every feature row of the overview and of the slices' map, a separator stands between the two.
    Source: deepseek-ai/DeepSeek-VL2, deepseek_vl2/models/processing_deepseek_vl_v2.py ``tokenize_with_images``.
    Models: DeepSeek-VL2 (tiny, small, base).
    Traps: a 1x1 grid still costs two views; padding is not removed; more than two images turn cropping off.
    """
    grid = best_resolution(image_hw, config.grids, config.tile) if config.cropping else (1, 1)
    side = ceil_div(config.tile // config.patch_size, config.merge)
    map_hw, canvas_hw = (grid[0] * side, grid[1] * side), (grid[0] * config.tile, grid[1] * config.tile)
    overview = config.whole(side**2, **_letterbox(image_hw, config.tile_hw))
    slices = config.tiles(grid, side**2, **_letterbox(image_hw, canvas_hw))
    packing = Packing(view_hw=(side, side), map_hw=map_hw, newline=True, overview_newline=True, separator="between")
    return config.finish(image_hw, (overview, slices), packing=packing)


def _contained(image_hw: Size, box_hw: Size) -> Size:
    """Pillow's ``ImageOps.contain``: the free side is rounded half to even. At least 1 px, where Pillow gives none."""
    (height, width), (box_height, box_width) = image_hw, box_hw
    if width / height > box_width / box_height:
        return max(round(height / width * box_width), 1), box_width
    if width / height < box_width / box_height:
        return box_height, max(round(width / height * box_height), 1)
    return box_hw


def _letterbox(image_hw: Size, box_hw: Size) -> dict[str, Any]:
    """Content, offset and fill as Pillow's ``ImageOps.pad`` has them: half the gap, rounded half to even."""
    content_hw = _contained(image_hw, box_hw)
    offset = (round((box_hw[0] - content_hw[0]) * 0.5), round((box_hw[1] - content_hw[1]) * 0.5))
    return {"content_hw": content_hw, "offset": offset, "fill": GRAY}


ARIA_GRIDS = (
    *((1, cols) for cols in range(2, 9)),
    *((2, 4), (2, 3), (2, 2), (2, 1), (3, 1), (3, 2), (4, 1), (4, 2)),
    *((rows, 1) for rows in range(5, 9)),
)
"""Aria's 19 split ratios in their order; (rows, columns) in transformers, (columns, rows) in the original."""


@dataclass(frozen=True)
class AriaPortConfig(StrategyConfig):
    """Aria as transformers has it.

    Attributes:
        tile: Side of a view, px: 490 or 980.
        cell: Canvases are the grids times this, px.
        min_side: A view's content is at least this long on its shorter side, px.
        split: Whether to split at all; the class default does not.
        grids: (rows, columns) of ``cell`` px, in order.
    """

    tile: int = 980
    cell: int = 490
    min_side: int = 336
    split: bool = False
    grids: Grids = ARIA_GRIDS
    tokens: int = 256
    grows = ("cell", "min_side")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tile not in (self.cell, 2 * self.cell):
            raise ValueError(f"tile must be {self.cell} or {2 * self.cell} px (once or twice cell), got {self.tile}")


@rule_of(AriaPortConfig)
def aria_port(image_hw: Size, config: AriaPortConfig) -> SlicePlan:
    """AnyRes over 19 canvases of 490 px cells, cut into ``tile`` px, each crop fitted and padded; no overview.

    Without splitting the whole image is one view, its shorter side at least 336 px, padded at the right and bottom.
    Source: transformers, models/aria/image_processing_aria.py ``get_image_patches``.
    Models: Aria through transformers; it was trained with the rule of :func:`uhd.slicing.strategies.closest.aria`.
    Traps: no 1x1 among the canvases and no overview, unlike the original; with 980 px tiles a canvas of 490 px cells
    leaves part of a tile empty; the processor's ``num_crops`` is one number for a whole batch.
    """
    if not config.split:
        return config.finish(image_hw, (kept_ratio(image_hw, config.tile, config.min_side, config.tokens),))
    grid = best_resolution(image_hw, config.grids, config.cell)
    slices = _fitted(image_hw, grid, config.cell, config, config.tokens)
    used_hw = (grid[0] * config.cell, grid[1] * config.cell)
    return config.finish(image_hw, (_enlarged_corner(slices, used_hw, config.cell),))


def _enlarged_corner(canvas: Canvas, used_hw: Size, cell: int) -> Canvas:
    """A crop that is a single cell is enlarged to a whole view; one that is half a view keeps its size."""
    tiles = tuple(
        Box(top, left, top + cell, left + cell)
        if (min(bottom, used_hw[0]) - top, min(right, used_hw[1]) - left) == (cell, cell)
        else Box(top, left, bottom, right)
        for top, left, bottom, right in canvas.tiles
    )
    return replace(canvas, tiles=tiles)


def kept_ratio(image_hw: Size, side: int, min_side: int, tokens: int) -> Canvas:
    """The whole image, longer side to ``side``, shorter one at least ``min_side``, at the top left of black."""
    scale = side / max(image_hw)
    shorter = max(int(min(image_hw) * scale), min_side)
    content_hw = (shorter, side) if image_hw[1] >= image_hw[0] else (side, shorter)
    return single("overview", (side, side), tokens, content_hw=content_hw, fill=BLACK)


STRATEGIES = by_name(
    (AnyResConfig("llava-next-anyres-336"), "best of 5 canvases of 336 px tiles, un-padded; LLaVA-NeXT"),
    (
        AnyResConfig("llava-next-anyres-336-repo-order", grids=_NEXT_SWAPPED, unpad_rounding="original"),
        "the same with the axis order and rounding of LLaVA-NeXT's own code",
    ),
    (
        AnyResConfig("llava-onevision-anyres-max-9", 14, 384, _SIX_BY_SIX, 9),
        "best of 36 canvases of 384 px tiles, features bounded to 9 tiles; LLaVA-OneVision",
    ),
    (AnyResConfig("llava-onevision-anyres-max-4", 14, 384, _SIX_BY_SIX, 4), "the same, features bounded to 4 tiles"),
    (
        AnyResConfig("llava-onevision-anyres-max-9-repo-order", 14, 384, _SIX_SWAPPED, 9, unpad_rounding="original"),
        "bounded to 9 tiles, with the axis order and rounding of LLaVA-NeXT's own code",
    ),
    (
        AnyResConfig("granite4-vision-anyres-384", 16, 384, _UP_TO_TEN, rate=(4, 8)),
        "best of 27 canvases of 384 px tiles, features halved per side; Granite 4 Vision",
    ),
    (
        AnyResConfig("granite-vision-3-anyres-384", 14, 384, _UP_TO_TEN),
        "best of 27 canvases of 384 px tiles; Granite Vision 3",
    ),
    (ThresholdConfig("llava-onevision-threshold"), "the paper's per-crop token threshold of 7290"),
    (VideoFrameConfig("llava-onevision-video"), "a video's frame: 384 px, 196 tokens; LLaVA-OneVision"),
    (DeepSeekVL2Config("deepseek-vl2-384"), "best of 23 canvases of 384 px tiles on gray; DeepSeek-VL2"),
    (
        DeepSeekVL2Config("deepseek-vl2-384-uncropped", cropping=False),
        "one tile and the overview: DeepSeek-VL2 with more than two images",
    ),
    (AriaPortConfig("aria-980"), "one padded 980 px view; Aria in transformers, not split"),
    (AriaPortConfig("aria-980-split", split=True), "19 canvases of 490 px cells in 980 px views; the port"),
    (
        AriaPortConfig("aria-490-split", tile=490, split=True, tokens=128),
        "19 canvases of 490 px tiles, no overview; Aria in transformers",
    ),
)
ALIASES = {
    "llava-next": "llava-next-anyres-336",
    "llava-1.6": "llava-next-anyres-336",
    "llava-onevision": "llava-onevision-anyres-max-9",
    "granite": "granite4-vision-anyres-384",
    "granite-vision": "granite4-vision-anyres-384",
    "granite4-vision": "granite4-vision-anyres-384",
    "deepseek-vl2": "deepseek-vl2-384",
}
