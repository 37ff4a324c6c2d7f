"""Tilers that take the grid of the closest aspect ratio, or of the best coverage, and stretch or fit to it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

from uhd.slicing.plan import Box, Canvas, Packing, SlicePlan
from uhd.slicing.strategies.anyres import ARIA_GRIDS, kept_ratio
from uhd.slicing.strategies.base import (
    GRAY,
    WHITE,
    Size,
    StrategyConfig,
    by_name,
    ceil_div,
    centred,
    fit,
    rule_of,
    single,
    tiled,
)
from uhd.slicing.strategies.selectors import Grids, closest_aspect, grids_up_to, smart_resize


@dataclass(frozen=True)
class InternVLConfig(StrategyConfig):
    """InternVL's dynamic preprocessing.

    ``overview``: ``"last"``, ``"first"``, or ``"none"``; only a cut image has one.
    """

    tile: int = 448
    merge: int = 2
    max_tiles: int = 12
    min_tiles: int = 1
    overview: str = "last"

    choices: ClassVar = {"overview": ("first", "last", "none")}


@rule_of(InternVLConfig)
def internvl(image_hw: Size, config: InternVLConfig) -> SlicePlan:
    """Stretch the image to the grid of the closest aspect ratio and cut it; a cut image also has a stretched overview.

    The image's area matters only where two ratios tie exactly.
    Source: OpenGVLab/InternVL, internvl_chat/internvl/train/dataset.py ``dynamic_preprocess``; transformers,
    models/got_ocr2/image_processing_got_ocr2.py; Ovis2's second mode (overview first) and Aya Vision share the rule.
    Models: InternVL 1.5 to 3.5, Aya Vision, GOT-OCR2, H2OVL, NVLM-like ones.
    Traps: one px can turn 1 view into 31 (``max_tiles=40``); w x h and h x w differ for some sizes; transformers needs
    ``crop_to_patches=True``; several images in a training sample share ``max_tiles``.
    """
    grid = closest_aspect(image_hw, grids_up_to(config.max_tiles, config.min_tiles), config.tile)
    return config.finish(image_hw, config.stretched(grid, overview=config.overview))


@dataclass(frozen=True)
class OcrConfig(StrategyConfig):
    """DeepSeek-OCR-2 and Unlimited-OCR.

    Attributes:
        tile: Side of a slice, px; an image no longer than this is not cut.
        overview_side: Side of the overview, px.
        merge: Patches joined per side; a rest counts as one.
        newline: A newline after every feature row of the overview and of the slices' map.
        uncut_grid: What the plan reports for an image without slices; Unlimited-OCR's processor says 1 x 1.
    """

    patch_size: int = 16
    tile: int = 768
    overview_side: int = 1024
    merge: int = 4
    min_tiles: int = 2
    max_tiles: int = 6
    newline: bool = False
    uncut_grid: Size | None = None
    view_sides = ("overview_side",)

    @property
    def learned(self) -> tuple[str, ...]:
        return ("newline", "separator") if self.newline else ("separator",)


@rule_of(OcrConfig)
def ocr(image_hw: Size, config: OcrConfig) -> SlicePlan:
    """An image longer than a tile is stretched to the grid of the closest aspect ratio; a letterboxed overview, last.

    One separator ends the image; Unlimited-OCR joins the slices' features to one map with newlines.
    Source: transformers, models/deepseek_ocr2/ and models/unlimited_ocr/ (``crop_image_to_patches``).
    Models: DeepSeek-OCR-2, Unlimited-OCR.
    Traps: at least 2 tiles, so an 800 px square is cut 2 x 2; an image whose overview would have a side of 0 px is
    refused; transformers' processor raises there too.
    """
    side = config.overview_side
    scale = side / max(image_hw)
    content_hw = (round(image_hw[0] * scale), round(image_hw[1] * scale))
    if min(content_hw) < 1:
        raise config.refuse(image_hw, f"its overview would be {content_hw[0]}x{content_hw[1]} px")
    overview_side = ceil_div(side // config.patch_size, config.merge)
    slice_side = ceil_div(config.tile // config.patch_size, config.merge)
    offset = centred(content_hw, (side, side))
    overview = single("overview", (side, side), overview_side**2, content_hw=content_hw, offset=offset, fill=GRAY)
    canvases, grid = (overview,), None
    if max(image_hw) > config.tile:
        grid = closest_aspect(image_hw, grids_up_to(config.max_tiles, config.min_tiles), config.tile)
        canvases = (config.tiles(grid, slice_side**2), overview)
    map_hw = (grid[0] * slice_side, grid[1] * slice_side) if grid and config.newline else None
    packing = Packing(
        view_hw=(slice_side, slice_side),
        overview_view_hw=(overview_side, overview_side),
        map_hw=map_hw,
        newline=map_hw is not None,
        overview_newline=config.newline,
        separator="end",
    )
    return config.finish(image_hw, canvases, packing=packing, grid=grid or config.uncut_grid)


@dataclass(frozen=True)
class Lfm2Config(StrategyConfig):
    """LFM2-VL.

    Attributes:
        min_tokens, max_tokens: Range of an image that is not cut, and of the overview.
        tolerance: An image above ``tolerance * max_tokens`` is cut.
    """

    patch_size: int = 16
    tile: int = 512
    merge: int = 2
    min_tokens: int = 64
    max_tokens: int = 256
    tolerance: float = 2.0
    min_tiles: int = 2
    max_tiles: int = 10
    resample: str = field(default="bilinear", kw_only=True)

    def for_vision(self, *, image_size: int | None, patch_size: int) -> Lfm2Config:
        """As for other rules; ``min_tokens`` and ``max_tokens`` stand for areas, which grow with that of a tile."""
        image_size = image_size or self.tile
        units = (image_size / (patch_size * self.merge)) ** 2 / (self.tile / (self.patch_size * self.merge)) ** 2
        tokens = {name: max(round(getattr(self, name) * units), 1) for name in ("min_tokens", "max_tokens")}
        return self.replace(tile=image_size, patch_size=patch_size, **tokens)


@rule_of(Lfm2Config)
def lfm2(image_hw: Size, config: Lfm2Config) -> SlicePlan:
    """A small image is one view at its own aspect; a large one is stretched to a grid, with such a view last.

    Source: transformers, models/lfm2_vl/image_processing_lfm2_vl.py ``resize_and_split``.
    Models: LFM2-VL.
    Traps: "large" is judged on sides rounded to 32 px; the overview has its own aspect and 64 to 256 tokens.
    """
    unit = config.patch_size * config.merge
    area = math.prod(max(config.patch_size, round(length / unit) * unit) for length in image_hw)
    low, high = config.min_tokens * unit**2, config.max_tokens * unit**2
    view_hw = smart_resize(image_hw, unit, low, high, max_aspect=None, at_least_one=True)
    tokens = math.prod(view_hw) // unit**2
    if area <= high * config.tolerance:
        return config.finish(image_hw, (tiled((1, 1), view_hw, tokens),))
    grid = closest_aspect(image_hw, grids_up_to(config.max_tiles, config.min_tiles), config.tile)
    per_tile = ceil_div(config.tile // config.patch_size, config.merge) ** 2
    slices = config.tiles(grid, per_tile)
    return config.finish(image_hw, (slices, single("overview", view_hw, tokens)))


@dataclass(frozen=True)
class Phi4Config(StrategyConfig):
    """Phi-4-multimodal's dynamic HD."""

    tile: int = 448
    merge: int = 2
    max_tiles: int = 36
    resample: str = field(default="bilinear", kw_only=True)

    learned = ("newline", "separator")


@rule_of(Phi4Config)
def phi4(image_hw: Size, config: Phi4Config) -> SlicePlan:
    """Enough tiles for every pixel (above the cap: the closest aspect), fitted top left on white; overview last.

    Features that lie wholly in padding are dropped, a newline follows every feature row of the map and of the
    overview, a separator stands between the two. The overview is the padded canvas squeezed to a square.
    Source: transformers, models/phi4_multimodal/image_processing_phi4_multimodal.py ``dynamic_preprocess``.
    Models: Phi-4-multimodal; Phi-3.5-vision and InternLM-XComposer2-4KHD have its ancestors.
    Traps: refuses images whose fitted side is below 10 px; slices are resized bilinearly, the overview then bicubic
    and without antialiasing, from normalised pixels that are not clipped to 0..255 as here.
    """
    tile = config.tile
    grid = tuple(math.ceil(length / tile) for length in image_hw)
    if math.prod(grid) > config.max_tiles:
        grid = closest_aspect(image_hw, grids_up_to(config.max_tiles), tile)
    canvas_hw = (grid[0] * tile, grid[1] * tile)
    content_hw = fit(image_hw, canvas_hw, int)
    if min(content_hw) < 10:
        shrunk = f"{content_hw[0]}x{content_hw[1]} px"
        raise config.refuse(image_hw, f"fitted it would be {shrunk}, at least 10 are needed")
    # of the patches that are not wholly padding, every merge-th counts
    kept_hw = tuple(
        ceil_div(count * (tile // config.patch_size) - (size - content) // config.patch_size, config.merge)
        for count, size, content in zip(grid, canvas_hw, content_hw, strict=True)
    )
    side = config.token_side
    slices = config.tiles(grid, content_hw=content_hw, fill=WHITE)
    overview = replace(
        slices, kind="overview", grid=(1, 1), tiles=(Box(0, 0, *canvas_hw),), view_filter=("bicubic", False)
    )
    packing = Packing(
        view_hw=(side, side),
        map_hw=(grid[0] * side, grid[1] * side),
        kept=Box(0, 0, *kept_hw),
        newline=True,
        overview_newline=True,
        separator="between",
    )
    return config.finish(image_hw, (slices, overview), packing=packing)


@dataclass(frozen=True)
class Ovis2Config(StrategyConfig):
    """Ovis2's covering grid.

    Attributes:
        coverage: Share of the image's area that a good grid keeps.
        transformers: Behave as the port does: rows and columns exchanged, and the whole image stretched.
        fill: RGB of the padding. The release pads with zeros after normalisation, which is the mean colour.
    """

    tile: int = 448
    max_tiles: int = 9
    coverage: float = 0.9
    merge: int = 2
    transformers: bool = False
    fill: tuple[int, int, int] = (123, 117, 104)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tiles > 256:  # the work grows with the square: every piece of every grid is measured
            raise ValueError(f"max_tiles of an Ovis2Config is at most 256, got {self.max_tiles}")


@rule_of(Ovis2Config)
def ovis2(image_hw: Size, config: Ovis2Config) -> SlicePlan:
    """Fewest slices of the original pixels that keep 90 % of the area when shrunk to ``tile``; overview first.

    Each slice, and the whole image where there are several, is scaled to the longer side and centred in a square.
    Source: AIDC-AI/Ovis (v2.0), ovis/model/visual_tokenizer/base_visual_tokenizer.py ``preprocess_image``; with
    ``transformers=True``: models/ovis2/image_processing_ovis2.py ``get_min_tile_covering_grid``.
    Models: Ovis 1.6, Ovis2.
    Traps: the port takes (rows, columns) for (columns, rows), so a portrait page is cut as a landscape one, and it
    stretches instead of padding. Ovis2.5 has no tiles any more.
    """
    grid = covering_grid(image_hw, config)
    if config.transformers:
        return config.finish(image_hw, config.stretched(grid[::-1], overview="first"))
    canvases = [_letterboxed("slice", box, config, cell) for cell, box in _pieces(image_hw, grid)]
    if len(canvases) > 1:
        canvases.insert(0, _letterboxed("overview", Box(0, 0, *image_hw), config, (0, 0)))
    return config.finish(image_hw, tuple(canvases), grid=grid)


def covering_grid(image_hw: Size, config: Ovis2Config) -> Size:
    """Fewest cells among grids that keep more than ``coverage`` (then most kept), else most kept (then fewest)."""
    area = image_hw[0] * image_hw[1]
    kept = {
        grid: sum(_covered(box, config.tile) for _, box in _pieces(image_hw, grid)) / area
        for grid in grids_up_to(config.max_tiles)
    }
    # the order of candidates that tie in both is that of the release: rows rising
    ordered = sorted(kept)
    good = [grid for grid in ordered if kept[grid] > config.coverage]
    if good:
        return min(good, key=lambda grid: (math.prod(grid), -kept[grid]))
    return min(ordered, key=lambda grid: (-kept[grid], math.prod(grid)))


def _pieces(image_hw: Size, grid: Size) -> Iterator[tuple[Size, Box]]:
    """((row, column), box) of a grid over the image; the last row and column take the remainder."""
    (height, width), (rows, cols) = image_hw, grid
    down, right = height // rows, width // cols
    for row in range(rows):
        for col in range(cols):
            bottom = height if row == rows - 1 else (row + 1) * down
            last = width if col == cols - 1 else (col + 1) * right
            yield (row, col), Box(row * down, col * right, bottom, last)


def _covered(box: Box, side: int) -> float:
    """Pixels that are left of a piece once its longer side is at most ``side``."""
    longer, shorter = max(box.size_hw), min(box.size_hw)
    return shorter / longer * side * side if longer > side else longer * shorter


def _letterboxed(kind: str, box: Box, config: Ovis2Config, cell: Size) -> Canvas:
    height, width = box.size_hw
    if width > height:
        content_hw = (max(int(height / width * config.tile), 1), config.tile)
    else:
        content_hw = (config.tile, max(int(width / height * config.tile), 1))
    return single(
        kind,
        config.tile_hw,
        config.token_side**2,
        content_hw=content_hw,
        offset=centred(content_hw, config.tile_hw),
        fill=config.fill,
        source=box,
        cell=cell,
    )


@dataclass(frozen=True)
class AriaConfig(StrategyConfig):
    """Aria's own splitting.

    ``min_side``: the overview's content is at least this long on its shorter side, px.
    """

    tile: int = 490
    grids: Grids = tuple((rows, cols) for cols, rows in ARIA_GRIDS)
    min_side: int = 336
    tokens: int = 128
    grows = ("min_side",)


@rule_of(AriaConfig)
def aria(image_hw: Size, config: AriaConfig) -> SlicePlan:
    """Stretch the image to the grid of the closest aspect among 19 (no 1x1) and cut; the padded whole image first.

    Source: rhymes-ai/Aria, aria/model/vision_processor.py ``_split_image``.
    Models: Aria.
    Traps: transformers' port has another rule (:func:`uhd.slicing.strategies.anyres.aria_port`) and another number of
    views for nearly every size; even a thumbnail is cut in two.
    """
    grid = closest_aspect(image_hw, config.grids, config.tile)
    slices = config.tiles(grid, config.tokens)
    overview = kept_ratio(image_hw, config.tile, config.min_side, config.tokens)
    return config.finish(image_hw, (overview, slices))


STRATEGIES = by_name(
    *(
        (
            InternVLConfig(f"internvl-dynamic-448-max{most}", max_tiles=most),
            f"closest aspect of up to {most} 448 px tiles, stretched, overview last; InternVL",
        )
        for most in (6, 12, 40)
    ),
    (
        InternVLConfig("aya-vision-364-max12", tile=364),
        "closest aspect of up to 12 364 px tiles, stretched, overview last; Aya Vision",
    ),
    (
        InternVLConfig("ovis2-448-max9-closest", max_tiles=9, overview="first"),
        "closest aspect of up to 9 448 px tiles, stretched, overview first; Ovis2's other mode",
    ),
    (OcrConfig("deepseek-ocr2"), "2 to 6 stretched 768 px tiles, 1024 px letterboxed overview; DeepSeek-OCR-2"),
    (
        OcrConfig("unlimited-ocr", tile=640, max_tiles=32, newline=True, uncut_grid=(1, 1)),
        "2 to 32 stretched 640 px tiles, 1024 px letterboxed overview, newlines; Unlimited-OCR",
    ),
    (Lfm2Config("lfm2-vl-512"), "native up to 512 tokens, else 2 to 10 stretched 512 px tiles; LFM2-VL"),
    (Phi4Config("phi4-multimodal-448-hd36"), "up to 36 448 px tiles on white, padding dropped; Phi-4-multimodal"),
    (
        Ovis2Config("ovis2-original-448-max9"),
        "fewest slices that keep 90 % of the pixels, each letterboxed; Ovis2 as trained",
    ),
    (
        Ovis2Config("ovis2-448-max9-covering", transformers=True),
        "the same grid transposed, the image stretched: Ovis2 in transformers",
    ),
    (AriaConfig("aria-original-490-split"), "19 grids of stretched 490 px tiles, overview first; Aria as trained"),
    (
        AriaConfig("aria-original-980-split", tile=980, tokens=256),
        "19 grids of stretched 980 px tiles, overview first; Aria as trained",
    ),
)
ALIASES = {
    "internvl": "internvl-dynamic-448-max12",
    "internvl2": "internvl-dynamic-448-max12",
    "internvl3": "internvl-dynamic-448-max12",
    "aya-vision": "aya-vision-364-max12",
    "deepseek-ocr-2": "deepseek-ocr2",
    "lfm2-vl": "lfm2-vl-512",
    "phi4": "phi4-multimodal-448-hd36",
    "phi-4-multimodal": "phi4-multimodal-448-hd36",
    "ovis2": "ovis2-original-448-max9",
    "aria": "aria-original-490-split",
}
