"""Rules that resize first and then cut by a cell of fixed or chosen size."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from uhd.slicing.plan import Box, Canvas, SlicePlan
from uhd.slicing.strategies.base import (
    BLACK,
    Size,
    StrategyConfig,
    by_name,
    ceil_div,
    check_views,
    padded_square,
    rule_of,
    single,
    tiled,
)
from uhd.slicing.strategies.selectors import Grids, best_anchor, grids_up_to, pairs_by_ratio

_LARGEST_IDEFICS3 = 4096  # px; its processor shrinks to this after the first resize


@dataclass(frozen=True)
class Idefics3Config(StrategyConfig):
    """Idefics3 and SmolVLM. ``longest``: the longer side becomes this first, px, also where that enlarges."""

    tile: int = 364
    longest: int = 1456
    tokens: int = 169
    resample: str = field(default="lanczos", kw_only=True)
    grows = ("longest",)


@rule_of(Idefics3Config)
def idefics3(image_hw: Size, config: Idefics3Config) -> SlicePlan:
    """Bring the longer side to a fixed length, stretch both sides up to multiples of a tile, cut; overview last.

    Source: transformers, models/idefics3/image_processing_idefics3.py ``resize_for_vision_encoder``.
    Models: Idefics3, SmolVLM, SmolDocling, Granite-Docling, nanoVLM.
    Traps: the number of tiles depends on the aspect alone, so a 336 px thumbnail costs 17 views; every pixel is
    resized twice, to the fixed length and then to the multiple, so what the first resize loses does not come back;
    row and column tags exist up to 6 x 6 only.
    """
    height, width = image_hw
    longest, aspect = min(config.longest, _LARGEST_IDEFICS3), width / height
    height, width = (_even(longest / aspect), longest) if width >= height else (longest, _even(longest * aspect))
    first_hw, aspect = (height, width), width / height
    if width >= height:
        width = ceil_div(width, config.tile) * config.tile
        height = ceil_div(int(width / aspect), config.tile) * config.tile
    else:
        height = ceil_div(height, config.tile) * config.tile
        width = ceil_div(int(height * aspect), config.tile) * config.tile
    grid = (height // config.tile, width // config.tile)
    overview = config.whole(config.tokens, size_hw=(height, width), first_hw=first_hw)
    if grid == (1, 1):
        return config.finish(image_hw, (overview,), grid=grid)
    slices = config.tiles(grid, config.tokens, first_hw=first_hw)
    return config.finish(image_hw, (slices, overview))


def _even(length: float) -> int:
    """Truncated and made even, at least 1."""
    return max(int(length) + int(length) % 2, 1)


@dataclass(frozen=True)
class Idefics2Config(StrategyConfig):
    """Idefics2.

    Attributes:
        shortest, longest: Bounds on every view's sides, px.
        tokens: Latents of a view.
        split: Four quarters of the image before the whole.
    """

    shortest: int = 378
    longest: int = 980
    tokens: int = 64
    split: bool = False
    resample: str = field(default="bilinear", kw_only=True)


@rule_of(Idefics2Config)
def idefics2(image_hw: Size, config: Idefics2Config) -> SlicePlan:
    """One view: shrunk to the longest side allowed, then each side raised to the shortest; or with four quarters.

    Source: transformers, models/idefics2/image_processing_idefics2.py ``get_resize_output_image_size``.
    Models: Idefics2.
    Traps: raising one side alone distorts, a 224x1568 strip by 2.7; quarters of an image with a side of 1 px would be
    empty and are refused; sides are no multiples of the patch, so up to 13 px at the edge are not seen.
    """
    overview = single("overview", _idefics2_size(image_hw, config), config.tokens)
    if not config.split:
        return config.finish(image_hw, (overview,))
    if min(image_hw) < 2:
        raise config.refuse(image_hw, "a quarter of it would be empty")
    middle = (image_hw[0] // 2, image_hw[1] // 2)
    tops, lefts = ((0, half, length) for half, length in zip(middle, image_hw, strict=True))
    quarters = []
    for row, col in ((0, 0), (0, 1), (1, 0), (1, 1)):
        box = Box(tops[row], lefts[col], tops[row + 1], lefts[col + 1])
        size_hw = _idefics2_size(box.size_hw, config)
        quarters.append(single("slice", size_hw, config.tokens, source=box, cell=(row, col)))
    return config.finish(image_hw, (*quarters, overview), grid=(2, 2))


def _idefics2_size(size_hw: Size, config: Idefics2Config) -> Size:
    height, width = size_hw
    aspect = width / height
    if width >= height and width > config.longest:
        height, width = int(config.longest / aspect), config.longest
    elif height > width and height > config.longest:
        height, width = config.longest, int(config.longest * aspect)
    return max(height, config.shortest), max(width, config.shortest)


@dataclass(frozen=True)
class AnchorConfig(StrategyConfig):
    """UReader and mPLUG-DocOwl. ``tokens`` include a learned end-of-view embedding."""

    tile: int = 224
    grids: Grids = ()
    tokens: int = 65


@rule_of(AnchorConfig)
def shape_adaptive(image_hw: Size, config: AnchorConfig) -> SlicePlan:
    """Stretch the image to the anchor whose box overlaps it best, in shape first and then in size; overview first.

    Source: X-PLUG/mPLUG-DocOwl, DocOwl1.5/mplug_docowl/processor.py ``anchor_rank``; UReader,
    pipeline/data_utils/processors/doc_processor.py.
    Models: UReader, mPLUG-DocOwl1.5 (TextMonkey and DocOwl2 vary it).
    Traps: the overview is there also for 1 x 1, which then costs two views; the overlap is computed in float32 with a
    truncated height, and some sizes depend on it.
    """
    grid = best_anchor(image_hw, config.grids, config.tile)
    return config.finish(image_hw, config.stretched(grid, config.tokens, overview="first", always=True))


@dataclass(frozen=True)
class PanAndScanConfig(StrategyConfig):
    """Gemma 3's pan and scan.

    Attributes:
        min_crop: Shortest side of a crop of the image, px.
        max_crops: Cap on crops.
        min_aspect: Longer side / shorter side from which on an image is cut.
    """

    tile: int = 896
    merge: int = 4
    min_crop: int = 256
    max_crops: int = 4
    min_aspect: float = 1.2
    resample: str = field(default="bilinear", kw_only=True)
    grows = ("min_crop",)


@rule_of(PanAndScanConfig)
def pan_and_scan(image_hw: Size, config: PanAndScanConfig) -> SlicePlan:
    """Cut an elongated image along its longer side only, stretch every crop and the whole image to a square view.

    The whole image comes first. Crops come from the original pixels, the last one may be narrower.
    Source: transformers, models/gemma3/image_processing_gemma3.py ``pan_and_scan_batched``.
    Models: Gemma 3 and ShieldGemma 2 with ``do_pan_and_scan=True`` (off by default).
    Traps: a 4:3 photo becomes two 2:3 crops, squeezed more than the photo was; a sentence of English stands around
    the crops in the text.
    """
    tokens, crops = config.token_side**2, _crops(image_hw, config)
    slices = tuple(single("slice", config.tile_hw, tokens, source=box, cell=cell) for cell, box in crops)
    grid = (slices[-1].cell[0] + 1, slices[-1].cell[1] + 1) if slices else None
    return config.finish(image_hw, (config.whole(), *slices), grid=grid)


def _crops(image_hw: Size, config: PanAndScanConfig) -> list[tuple[Size, Box]]:
    """((row, column), box) of every crop; none where the image stays whole."""
    longer, shorter = max(image_hw), min(image_hw)
    if longer / shorter < config.min_aspect:
        return []
    count = min(math.floor(longer / config.min_crop), math.floor(longer / shorter + 0.5))
    count = min(max(count, 2), config.max_crops)
    step = math.ceil(longer / count)
    if min(step, shorter) < config.min_crop:
        return []
    ends = [(i * step, min((i + 1) * step, longer)) for i in range(count)]
    if image_hw[1] >= image_hw[0]:
        return [((0, i), Box(0, start, shorter, end)) for i, (start, end) in enumerate(ends)]
    return [((i, 0), Box(start, 0, end, shorter)) for i, (start, end) in enumerate(ends)]


@dataclass(frozen=True)
class Step3p7Config(StrategyConfig):
    """Step-3.7.

    Attributes:
        overview_side: Side of the overview, px.
        longest: Larger images are shrunk to this first, px.
        stride: Patches joined per side by the two downsampling convolutions; a rest is dropped.
    """

    tile: int = 504
    overview_side: int = 728
    longest: int = 3024
    stride: int = 4
    resample: str = field(default="bilinear", kw_only=True)
    grows = ("longest",)
    view_sides = ("overview_side",)


@rule_of(Step3p7Config)
def step3p7(image_hw: Size, config: Step3p7Config) -> SlicePlan:
    """Windows of a size that depends on the aspect, sides snapped to whole windows; stretched overview last.

    An image within the overview's size is cut only above an aspect of 1.5, into squares of its shorter side. Thin
    images (below 32 px, aspect above 4) are first padded to a square, at the top left on black.
    Source: transformers, models/step3p7/image_processing_step3p7.py ``_plan_patches``.
    Models: Step-3.7-Flash.
    Traps: no cap on windows, a 16 px strip of 3024 px has 189; the shorter side is truncated, and an image whose
    shorter side becomes 0 px is refused.
    """
    padded = min(image_hw) < 32 and max(image_hw) / min(image_hw) > 4
    whole_hw = (max(image_hw), max(image_hw)) if padded else image_hw
    if max(whole_hw) > config.longest:
        scale = config.longest / max(whole_hw)
        whole_hw = (int(whole_hw[0] * scale), int(whole_hw[1] * scale))
    if min(whole_hw) < 1:
        raise config.refuse(image_hw, f"shrunk it would be {whole_hw[0]}x{whole_hw[1]} px")
    side = config.overview_side
    if padded:
        overview = padded_square(image_hw, side, _step_tokens(side, config), BLACK, centre=False, square=whole_hw[0])
    else:
        overview = single("overview", (side, side), _step_tokens(side, config), size_hw=whole_hw)
    window = _step_window(whole_hw, config)
    if window is None:
        return config.finish(image_hw, (overview,))
    return config.finish(image_hw, (_step_windows(image_hw, whole_hw, window, padded, config), overview))


def _step_tokens(side: int, config: Step3p7Config) -> int:
    return (side // config.patch_size // config.stride) ** 2


def _step_window(whole_hw: Size, config: Step3p7Config) -> int | None:
    longer, shorter = max(whole_hw), min(whole_hw)
    if longer <= config.overview_side:
        return shorter if longer / shorter > 1.5 else None
    return min(shorter, config.tile) if longer / shorter > 4 else config.tile


def _step_windows(image_hw: Size, whole_hw: Size, window: int, padded: bool, config: Step3p7Config) -> Canvas:
    """Windows over the snapped canvas; a side shorter than a window stays as it is, and its tiles are stretched."""
    canvas_hw = tuple(
        window * (length // window + (length % window > 0.2 * window)) if length >= window else length
        for length in whole_hw
    )
    grid = tuple(max(1, length // window) for length in canvas_hw)
    tile_hw = (min(window, canvas_hw[0]), min(window, canvas_hw[1]))
    padding = {}
    if padded:
        longest, sides = max(image_hw), zip(image_hw, canvas_hw, strict=True)
        content_hw = tuple(max(round(length * side / longest), 1) for length, side in sides)
        padding = {"content_hw": content_hw, "fill": BLACK}
    return tiled(grid, tile_hw, _step_tokens(config.tile, config), view_hw=config.tile_hw, **padding)


@dataclass(frozen=True)
class PerceptionLMConfig(StrategyConfig):
    """Perception-LM."""

    tile: int = 448
    merge: int = 2
    max_tiles: int = 36


@rule_of(PerceptionLMConfig)
def perception_lm(image_hw: Size, config: PerceptionLMConfig) -> SlicePlan:
    """Stretch the image over the largest canvas that holds it, else over the nearest aspect with most tiles.

    The stretched whole image comes first. "Largest" is by the fitted image's shorter side, the last of equals.
    Source: transformers, models/perception_lm/image_processing_perception_lm.py ``_fit_image_to_canvas``.
    Models: Perception-LM 1B to 8B.
    Traps: small images cost most, a 336 px thumbnail has 37 views and 9472 tokens.
    """
    check_views(config.max_tiles + 1)
    cols, rows = _largest_holding(image_hw, config) or _nearest_aspect(image_hw, config)
    return config.finish(image_hw, config.stretched((rows, cols), overview="first", always=True))


def _largest_holding(image_hw: Size, config: PerceptionLMConfig) -> Size | None:
    """(columns, rows) of the canvas in which the fitted image has the greatest shorter side."""
    height, width = image_hw
    aspect = width / height
    best, greatest = None, -1.0
    for group in pairs_by_ratio(config.max_tiles).values():
        for cols, rows in group:
            if cols * config.tile < width or rows * config.tile < height:
                continue
            scale = min(cols * config.tile / width, rows * config.tile / height)
            # the release floors the shorter side, which decides ties
            if aspect > 1:
                shorter = math.floor(scale * width / aspect)
            elif aspect < 1:
                shorter = math.floor(scale * height * aspect)
            else:
                shorter = scale * height
            if shorter >= greatest:
                best, greatest = (cols, rows), shorter
    return best


def _nearest_aspect(image_hw: Size, config: PerceptionLMConfig) -> Size:
    """(columns, rows) of most tiles in the nearest aspect below (landscape) or above (portrait) the image's."""
    aspect = image_hw[1] / image_hw[0]
    groups = pairs_by_ratio(config.max_tiles)
    if aspect >= 1:
        nearest = min((ratio for ratio in groups if ratio <= aspect), key=lambda ratio: abs(ratio - aspect))
        return max(groups[nearest], key=lambda pair: pair[0])
    nearest = min((ratio for ratio in groups if ratio > aspect), key=lambda ratio: abs(1 / ratio - 1 / aspect))
    return max(groups[nearest], key=lambda pair: pair[1])


_UP_TO_9 = (
    *((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (1, 4), (4, 1), (1, 5), (5, 1), (1, 6), (6, 1)),
    *((2, 3), (3, 2), (1, 7), (7, 1), (4, 2), (2, 4), (1, 8), (8, 1), (3, 3), (1, 9), (9, 1)),
)
_UP_TO_20 = tuple(
    sorted((grid for grid in grids_up_to(20) if max(grid) <= 11), key=lambda grid: (math.prod(grid), grid[0]))
)

STRATEGIES = by_name(
    (Idefics3Config("idefics3-364"), "longer side to 1456 px, 364 px tiles, overview last; Idefics3"),
    (
        Idefics3Config("smolvlm-384", 14, 384, 1536, 81),
        "longer side to 1536 px, 384 px tiles, overview last; SmolVLM 2B",
    ),
    (
        Idefics3Config("smolvlm-512", 16, 512, 2048, 64),
        "longer side to 2048 px, 512 px tiles, overview last; SmolVLM 256M and 500M",
    ),
    (Idefics2Config("idefics2-nosplit"), "one view of 378 to 980 px sides, 64 latents; Idefics2"),
    (Idefics2Config("idefics2-split", split=True), "the same with four quarters before it"),
    (AnchorConfig("ureader-grid9-224", 14, 224, _UP_TO_9, 65), "best of 23 anchors of 224 px cells; UReader"),
    (
        AnchorConfig("docowl15-grid9-448", 14, 448, _UP_TO_9, 257),
        "best of 23 anchors of 448 px cells; mPLUG-DocOwl1.5",
    ),
    (
        AnchorConfig("docowl15-grid20-448", 14, 448, _UP_TO_20, 257),
        "best of 48 anchors of 448 px cells; mPLUG-DocOwl1.5",
    ),
    (PanAndScanConfig("gemma3-896-pas"), "up to 4 crops along the longer side, stretched to 896 px; Gemma 3"),
    (Step3p7Config("step3p7-728-504"), "windows that follow the aspect, 728 px overview last; Step-3.7"),
    (PerceptionLMConfig("perception-lm-448-max36"), "up to 36 stretched 448 px tiles, overview first"),
)
ALIASES = {
    "idefics3": "idefics3-364",
    "idefics2": "idefics2-nosplit",
    "smolvlm": "smolvlm-512",
    "ureader": "ureader-grid9-224",
    "docowl": "docowl15-grid9-448",
    "docowl1.5": "docowl15-grid9-448",
    "gemma3-pan-and-scan": "gemma3-896-pas",
    "step3": "step3p7-728-504",
    "step3p7": "step3p7-728-504",
    "perception-lm": "perception-lm-448-max36",
}
