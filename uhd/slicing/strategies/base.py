"""What every strategy's config shares, and the canvases that all of them are made of."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np

from uhd.settings import as_tuples, check_choice
from uhd.slicing.config import MAX_VIEWS, Slicing
from uhd.slicing.plan import FILTERS, Box, Canvas, Packing, SlicePlan, check_size

LARGEST_PAD = 13_312
"""Longest side, px, of a square that is padded at the image's own size before it is shrunk: 177 million pixels."""

BLACK, GRAY, WHITE = (0, 0, 0), (127, 127, 127), (255, 255, 255)
CLIP_MEAN = (122, 116, 104)  # int(255 * mean)

Size = tuple[int, int]
Function = Callable[[Size, Any], SlicePlan]


@dataclass(frozen=True)
class StrategyConfig(Slicing):
    """Settings of one rule of another system. Frozen, hashable, JSON-able.

    In all of them ``tile`` is the side of a view, px, ``merge`` the patches joined per side, ``tokens`` the tokens of
    a view, ``grids`` the (rows, columns) that are compared, in the order that decides ties, and ``min_tiles`` and
    ``max_tiles`` bound the number of slices, the overview not counted.

    Attributes:
        name: Carried into every plan.
        patch_size: Side of a ViT patch, px.
        resample: The filter of the release, of :data:`FILTERS`, carried into every plan; :class:`uhd.PixelSettings`
            may name another one, which wins.
        antialias: ``False`` where the release resizes without.

    Raises:
        ValueError: A setting is out of range, of another type than its default, or none of its choices.
    """

    name: str = "custom"
    patch_size: int = 14
    resample: str = field(default="bicubic", kw_only=True)
    antialias: bool = field(default=True, kw_only=True)

    later = ("resample", "antialias", "square_fill", "uncut_grid")

    function: ClassVar[Function]  # (height, width) and these settings -> plan; rule_of sets it
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}  # the values of a setting that has only some
    grows: ClassVar[tuple[str, ...]] = ()  # lengths, px, that keep their ratio to tile
    view_sides: ClassVar[tuple[str, ...]] = ()  # the same for sides of other views, which become whole patches

    def __post_init__(self) -> None:
        for f in fields(self):
            where, value = f"{f.name} of {type(self).__name__}", getattr(self, f.name)
            object.__setattr__(self, f.name, _checked(where, value, f.default))
        for name, choices in {"resample": FILTERS, **self.choices}.items():
            check_choice(name, getattr(self, name), choices)
        for least, most in (("min_tiles", "max_tiles"), ("min_pixels", "max_pixels")):
            if getattr(self, least, 0) > (getattr(self, most, None) or math.inf):
                raise ValueError(f"{least} {getattr(self, least)} is above {most} {getattr(self, most)}")
        most = getattr(self, "max_tiles", None)
        if most is not None and most > MAX_VIEWS:
            raise ValueError(f"max_tiles is at most {MAX_VIEWS}, got {most}: a plan lists every tile")
        for name in ("grids", "rate"):
            if min(np.ravel(getattr(self, name, ())), default=1) < 1:
                raise ValueError(f"{name} of {type(self).__name__} must be positive, got {getattr(self, name)!r:.60}")
        if not getattr(self, "grids", True):
            raise ValueError("grids must hold at least one (rows, columns)")
        if getattr(self, "tile", self.patch_size) < self.patch_size:
            raise ValueError(f"tile {self.tile} px is smaller than a patch of {self.patch_size} px")

    @property
    def view_side(self) -> int | None:
        return getattr(self, "tile", None)

    @property
    def tile_hw(self) -> Size:
        return self.tile, self.tile

    @property
    def token_side(self) -> int:
        """Rows and columns of a view's tokens; a rest of patches is dropped."""
        return self.tile // self.patch_size // getattr(self, "merge", 1)

    def plan(self, image_hw: Size) -> SlicePlan:
        return _planned(check_size(image_hw), self)

    def capped(self, max_slices: int) -> StrategyConfig | None:
        names = {f.name for f in fields(self)}
        if "grids" in names:
            grids = tuple(grid for grid in self.grids if math.prod(grid) <= max_slices)
            return self.replace(grids=grids) if grids else None
        if "max_tiles" not in names or max_slices >= self.max_tiles:
            return self if "max_tiles" in names else None
        least = {"min_tiles": min(self.min_tiles, max_slices)} if "min_tiles" in names else {}
        return self.replace(max_tiles=max_slices, **least)

    def for_vision(self, *, image_size: int | None, patch_size: int) -> StrategyConfig:
        """As every rule does.

        ``tile`` becomes ``image_size``, and every length that the rule states beside it keeps its ratio to ``tile``. A
        rule without ``tile`` keeps its bounds, in px or patches. Numbers of tokens that a config states are kept.

        >>> from uhd.slicing import strategy
        >>> strategy("internvl").for_vision(image_size=384, patch_size=16).plan((600, 1000)).slice_hw
        (384, 384)
        """
        tile = self.view_side
        if tile is None:
            return self.replace(patch_size=patch_size)
        image_size = image_size or tile

        def scaled(name: str, unit: int) -> int:
            return max(round(getattr(self, name) * image_size / tile / unit), 1) * unit

        lengths = {name: scaled(name, 1) for name in self.grows}
        sides = {name: scaled(name, patch_size) for name in self.view_sides}
        return self.replace(tile=image_size, patch_size=patch_size, **lengths, **sides)

    def finish(
        self, image_hw: Size, canvases: tuple[Canvas, ...], *, packing: Packing | None = None, grid: Size | None = None
    ) -> SlicePlan:
        """The plan of these canvases. ``grid`` is the slices', by default that of the only slice canvas."""
        if grid is None:
            grid = next((canvas.grid for canvas in canvases if canvas.kind == "slice"), None)
        visual, separators = sum([len(canvas.tiles) * canvas.tokens_per_view for canvas in canvases]), 0
        if packing is not None:
            overviews = sum([len(canvas.tiles) for canvas in canvases if canvas.kind == "overview"])
            slices = sum([len(canvas.tiles) for canvas in canvases if canvas.kind == "slice"])
            visual, separators = packing.counts(overviews, slices)
        if visual < 1:
            raise ValueError(
                f"{self.name!r} has views too small for a token: raise tile, or lower patch_size or merge"
            )
        filters = {"resample": self.resample, "antialias": self.antialias}
        return SlicePlan(image_hw, self.patch_size, canvases, grid, visual, separators, self.name, packing, **filters)

    def refuse(self, image_hw: Size, why: str) -> ValueError:
        """The error for an image that the rule cannot take."""
        return ValueError(
            f"{self.name!r} refuses a {image_hw[0]}x{image_hw[1]} px image (height x width): {why}. "
            "Crop or pad the image, or take another strategy"
        )

    def whole(self, tokens: int | None = None, **canvas: Any) -> Canvas:
        """The overview: the image stretched to ``tile_hw``, as :func:`single`; ``token_side**2`` tokens by default."""
        return single("overview", self.tile_hw, self.token_side**2 if tokens is None else tokens, **canvas)

    def tiles(self, grid: Size, tokens: int | None = None, **canvas: Any) -> Canvas:
        """The image stretched over a grid and cut, as :func:`tiled`; ``token_side**2`` tokens by default."""
        return tiled(grid, self.tile_hw, self.token_side**2 if tokens is None else tokens, **canvas)

    def stretched(
        self, grid: Size, tokens: int | None = None, *, overview: str = "last", always: bool = False
    ) -> tuple[Canvas, ...]:
        """:meth:`tiles`, and where the image is cut, or ``always``, its overview first, last or none."""
        slices, whole = self.tiles(grid, tokens), self.whole(tokens)
        if overview == "none" or (grid == (1, 1) and not always):
            return (slices,)
        return (whole, slices) if overview == "first" else (slices, whole)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the class under ``"rule"``: what :func:`uhd.slicing.rules.slicing_from_dict` reads."""
        return {"rule": type(self).__name__, **super().to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StrategyConfig:
        return super().from_dict({key: value for key, value in data.items() if key != "rule"})


@lru_cache(maxsize=16384)
def _planned(image_hw: Size, config: StrategyConfig) -> SlicePlan:
    return config.function(image_hw, config)


class Strategy(NamedTuple):
    """A named rule: its settings, and one line about it."""

    config: StrategyConfig
    summary: str

    @property
    def function(self) -> Function:
        """``function(image_hw, config)`` is the plan."""
        return self.config.function


def rule_of(config: type[StrategyConfig]) -> Callable[[Function], Function]:
    """Make a function the rule that the settings of one class are for."""

    def decorate(function: Function) -> Function:
        config.function = staticmethod(function)
        return function

    return decorate


def by_name(*entries: tuple[StrategyConfig, str]) -> dict[str, Strategy]:
    """Settings, each with one line about them, by their names."""
    return {config.name: Strategy(config, summary) for config, summary in entries}


def _checked(where: str, value: Any, default: Any) -> Any:
    """A setting as plain, hashable types; those that default to ``None`` are whole numbers or pairs of them."""
    value = as_tuples(value)  # configs are hashed
    if default is None:
        if value is None:
            return None
        default = (1, 1) if isinstance(value, tuple) else 1
    if isinstance(default, (bool, str)):
        fits, kind = isinstance(value, type(default)), type(default).__name__
    elif isinstance(default, tuple):
        fits, kind = _alike(value, default), "whole numbers, nested as these are"
    else:
        whole = isinstance(default, int)
        fits = isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)
        kind = "a whole number" if whole else "a number"
    if not fits:
        raise ValueError(f"{where} must be {kind}, e.g. {default!r:.60}, got {value!r:.60}")
    if isinstance(default, (bool, str, tuple)):
        return value
    if not value > 0:
        raise ValueError(f"{where} must be positive, got {value!r}")
    return type(default)(value)


def _alike(value: Any, default: tuple) -> bool:
    """Whether whole numbers from 0 on are nested as in the default, in any number of pairs where it holds pairs."""
    if not isinstance(value, tuple):
        return False
    if not default or isinstance(default[0], tuple):
        return all(_alike(part, (1, 1)) for part in value)
    return len(value) == len(default) and all(type(part) is int and part >= 0 for part in value)


def single(
    kind: str, view_hw: Size, tokens: int, *, size_hw: Size | None = None, content_hw: Size | None = None, **more: Any
) -> Canvas:
    """A canvas that is one view; ``more`` are its other fields. By default the image is stretched to the view."""
    size_hw = size_hw or view_hw
    tiles = (Box(0, 0, *size_hw),)
    return Canvas(kind, content_hw or size_hw, size_hw, (1, 1), tiles, view_hw, tokens, **more)


def tiled(
    grid: Size,
    tile_hw: Size,
    tokens: int,
    *,
    view_hw: Size | None = None,
    stride_hw: Size | None = None,
    content_hw: Size | None = None,
    **more: Any,
) -> Canvas:
    """A canvas cut into ``grid`` slices of ``tile_hw``, which overlap where ``stride_hw`` is smaller.

    ``more`` are its other fields. Without ``content_hw`` the image is stretched over the canvas.
    """
    (rows, cols), (height, width) = grid, tile_hw
    check_views(rows * cols)
    down, right = stride_hw or tile_hw
    tiles = _cut(rows, cols, height, width, down, right)
    size_hw = tiles[-1][2:]
    return Canvas("slice", content_hw or size_hw, size_hw, grid, tiles, view_hw or tile_hw, tokens, **more)


@lru_cache(maxsize=4096)
def _cut(rows: int, cols: int, height: int, width: int, down: int, right: int) -> tuple[Box, ...]:
    tops, lefts = range(0, rows * down, down), range(0, cols * right, right)
    return tuple([Box(top, left, top + height, left + width) for top in tops for left in lefts])


def check_views(count: int) -> None:
    if count > MAX_VIEWS:
        raise ValueError(f"{count} views of one image, at most {MAX_VIEWS} are planned: lower the cap on slices")


def fit(image_hw: Size, box_hw: Size, rounding: Callable[[float], int]) -> Size:
    """The image's largest size inside a box, aspect kept; the free side is rounded, and at most the box's.

    >>> fit((600, 1000), (448, 448), round)
    (269, 448)
    """
    height, width = image_hw
    scale_h, scale_w = box_hw[0] / height, box_hw[1] / width
    if scale_w < scale_h:
        return min(rounding(height * scale_w), box_hw[0]), box_hw[1]
    return box_hw[0], min(rounding(width * scale_h), box_hw[1])


def centred(content_hw: Size, size_hw: Size) -> Size:
    """Offset of content in the middle of a canvas; an odd pixel goes to the bottom or right.

    >>> centred((269, 448), (448, 448))
    (89, 0)
    """
    return (size_hw[0] - content_hw[0]) // 2, (size_hw[1] - content_hw[1]) // 2


def padded_square(
    image_hw: Size,
    side: int,
    tokens: int,
    fill: tuple[int, int, int],
    *,
    centre: bool = True,
    square: int = LARGEST_PAD,
) -> Canvas:
    """The image padded to a square and then resized to ``side`` px, in this order, as released.

    An image longer than ``square`` is shrunk first, lest the padded square be huge.
    """
    longest = max(image_hw)
    pad = min(longest, square)
    content_hw = image_hw
    if pad < longest:
        content_hw = tuple(max(round(length * pad / longest), 1) for length in image_hw)
    offset = centred(content_hw, (pad, pad)) if centre else (0, 0)
    square_hw, view_hw = (pad, pad), (side, side)
    return single("overview", view_hw, tokens, size_hw=square_hw, content_hw=content_hw, offset=offset, fill=fill)


def ceil_div(count: int, step: int) -> int:
    """``count / step`` rounded up.

    >>> ceil_div(27, 2)
    14
    """
    return -(-count // step)
