"""What every strategy's config shares, and the canvases that all of them are made of."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

from uhd.settings import as_tuples, check_choice
from uhd.slicing.config import MAX_VIEWS, Slicing
from uhd.slicing.plan import Box, Canvas, Packing, SlicePlan, check_size

LARGEST_PAD = 13_312
"""Longest side, px, of a square that is padded at the image's own size before it is shrunk: 177 million pixels."""

BLACK, GRAY, WHITE = (0, 0, 0), (127, 127, 127), (255, 255, 255)
CLIP_MEAN = (122, 116, 104)  # int(255 * mean)

FILTERS = ("bicubic", "bilinear", "lanczos")
"""Names of filters that a plan may carry."""

Size = tuple[int, int]
Function = Callable[[Size, Any], SlicePlan]


@dataclass(frozen=True)
class StrategyConfig(Slicing):
    """Settings of one rule of another system. Frozen, hashable, JSON-able.

    Attributes:
        name: Carried into every plan.
        patch_size: Side of a ViT patch, px.
        resample: The filter of the release: ``"bicubic"``, ``"bilinear"`` or ``"lanczos"``. Carried into every plan;
            :class:`uhd.PixelSettings` may name another one, which wins.
        antialias: ``False`` where the release resizes without.

    Raises:
        ValueError: A number is not positive, a setting is of another type than its default, a cap on tiles is above
            65,536, a tile is smaller than a patch, or there is no such filter; the message names it.
    """

    name: str = "custom"
    patch_size: int = 14
    resample: str = field(default="bicubic", kw_only=True)
    antialias: bool = field(default=True, kw_only=True)

    function: ClassVar[Function]
    """(height, width) and these settings -> plan; :func:`rule_of` sets it."""
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}
    """The values of a setting that has only some."""
    grows: ClassVar[tuple[str, ...]] = ()
    """Lengths, px, that keep their ratio to ``tile``."""
    view_sides: ClassVar[tuple[str, ...]] = ()
    """The same for sides of other views, which become whole patches."""

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
            if min(_leaves(getattr(self, name, ())), default=1) < 1:
                raise ValueError(f"{name} of {type(self).__name__} must be positive, got {getattr(self, name)!r:.60}")
        if not getattr(self, "grids", True):
            raise ValueError("grids must hold at least one (rows, columns)")
        if getattr(self, "tile", self.patch_size) < self.patch_size:
            raise ValueError(f"tile {self.tile} px is smaller than a patch of {self.patch_size} px")

    @property
    def view_side(self) -> int | None:
        return getattr(self, "tile", None)

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
        """The same rule for another vision encoder, e.g. SigLIP's ``image_size=384, patch_size=14``.

        ``tile`` becomes ``image_size``, and every length that the rule states beside it keeps its ratio to ``tile``
        (:attr:`grows`, :attr:`view_sides`): an image twice as large is cut alike with tiles twice as large. A rule
        without ``tile`` has no view size of its own and keeps its bounds, in px or patches; only the patch changes.
        Numbers of tokens that a config states rather than derives are kept.

        >>> from uhd.slicing import strategy
        >>> strategy("internvl").for_vision(image_size=384, patch_size=16).plan((600, 1000)).slice_hw
        (384, 384)
        """
        tile = self.view_side
        if tile is None:
            return self.replace(patch_size=patch_size)
        image_size = image_size or tile
        lengths = {name: max(round(getattr(self, name) * image_size / tile), 1) for name in self.grows}
        sides = {
            name: max(round(getattr(self, name) * image_size / tile / patch_size), 1) * patch_size
            for name in self.view_sides
        }
        return self.replace(tile=image_size, patch_size=patch_size, **lengths, **sides)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types with the config's class under ``"rule"``; the inverse is
        :func:`uhd.slicing.rules.slicing_from_dict`."""
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
    """A setting as plain, hashable types; a ``ValueError`` where it is of another type than its default, or too small.

    Settings that default to ``None`` are optional whole numbers, or pairs of them.
    """
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


def _leaves(value: Any) -> Iterator[int]:
    for part in value:
        yield from _leaves(part) if isinstance(part, tuple) else (part,)


def finish(
    image_hw: Size,
    config: StrategyConfig,
    canvases: tuple[Canvas, ...],
    *,
    visual: int | None = None,
    separators: int = 0,
    packing: Packing | None = None,
    grid: Size | None = None,
) -> SlicePlan:
    """The plan of these canvases. ``grid`` is the slices', by default that of the only slice canvas."""
    if grid is None:
        grid = next((canvas.grid for canvas in canvases if canvas.kind == "slice"), None)
    if visual is None:
        visual = sum(len(canvas.tiles) * canvas.tokens_per_view for canvas in canvases)
    if visual < 1:
        raise ValueError(f"{config.name!r} has views too small for a token: raise tile, or lower patch_size or merge")
    return SlicePlan(
        image_hw=image_hw,
        patch_size=config.patch_size,
        canvases=canvases,
        grid=grid,
        num_visual_tokens=visual,
        num_separators=separators,
        strategy=config.name,
        packing=packing,
        resample=config.resample,
        antialias=config.antialias,
    )


def refuse(image_hw: Size, config: StrategyConfig, why: str) -> ValueError:
    """The error for an image that the rule cannot take."""
    return ValueError(
        f"{config.name!r} refuses a {image_hw[0]}x{image_hw[1]} px image (height x width): {why}. "
        "Crop or pad the image, or take another strategy"
    )


def single(
    kind: str,
    view_hw: Size,
    tokens: int,
    *,
    size_hw: Size | None = None,
    content_hw: Size | None = None,
    offset: Size = (0, 0),
    fill: tuple[int, int, int] | None = None,
    source: Box | None = None,
    cell: Size = (0, 0),
    first_hw: Size | None = None,
) -> Canvas:
    """A canvas that is one view. Without ``size_hw`` and ``content_hw`` the image is stretched to the view."""
    size_hw = size_hw or view_hw
    return Canvas(
        kind=kind,
        content_hw=content_hw or size_hw,
        size_hw=size_hw,
        grid=(1, 1),
        tiles=(Box(0, 0, *size_hw),),
        view_hw=view_hw,
        tokens_per_view=tokens,
        source=source,
        offset=offset,
        fill=fill,
        cell=cell,
        first_hw=first_hw,
    )


def tiled(
    grid: Size,
    tile_hw: Size,
    tokens: int,
    *,
    view_hw: Size | None = None,
    stride_hw: Size | None = None,
    content_hw: Size | None = None,
    offset: Size = (0, 0),
    fill: tuple[int, int, int] | None = None,
    first_hw: Size | None = None,
) -> Canvas:
    """A canvas cut into ``grid`` slices of ``tile_hw``; they overlap where ``stride_hw`` is smaller.

    Without ``content_hw`` the image is stretched over the canvas.
    """
    (rows, cols), (height, width) = grid, tile_hw
    check_views(rows * cols)
    down, right = stride_hw or tile_hw
    tiles = tuple(
        Box(r * down, c * right, r * down + height, c * right + width) for r in range(rows) for c in range(cols)
    )
    size_hw = ((rows - 1) * down + height, (cols - 1) * right + width)
    return Canvas(
        kind="slice",
        content_hw=content_hw or size_hw,
        size_hw=size_hw,
        grid=grid,
        tiles=tiles,
        view_hw=view_hw or tile_hw,
        tokens_per_view=tokens,
        offset=offset,
        fill=fill,
        first_hw=first_hw,
    )


def check_views(count: int) -> None:
    """Raise a ``ValueError`` above :data:`MAX_VIEWS`."""
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
    *,
    fill: tuple[int, int, int],
    kind: str = "overview",
    centre: bool = True,
    square: int | None = None,
) -> Canvas:
    """The image padded to a square and then resized to ``side`` px, in this order, as released.

    An image longer than ``square`` (default :data:`LARGEST_PAD`) is shrunk first, lest the padded square be huge.
    """
    longest = max(image_hw)
    pad = min(longest, square or LARGEST_PAD)
    content_hw = image_hw
    if pad < longest:
        content_hw = tuple(max(round(length * pad / longest), 1) for length in image_hw)
    offset = centred(content_hw, (pad, pad)) if centre else (0, 0)
    return single(kind, (side, side), tokens, size_hw=(pad, pad), content_hw=content_hw, offset=offset, fill=fill)


def at_least_one(rounding: Callable[[float], int]) -> Callable[[float], int]:
    """The same rounding, but never 0."""
    return lambda value: max(rounding(value), 1)


def ceil_div(count: int, step: int) -> int:
    """``count / step`` rounded up.

    >>> ceil_div(27, 2)
    14
    """
    return -(-count // step)
