"""Where an image is cut: the plan that every rule returns, and what it is made of.

Integers only: no image is opened and no tensor library is imported. Sizes are (height, width) in px, grids are
(rows, columns). A *slice* is one cell of the grid, the *overview* is the whole image made small, a *view* is either.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from uhd.moved import moved
from uhd.settings import Settings, read_arguments

MAX_SIDE = 1_000_000
"""Longest image side that is planned, px. No photograph has it; larger numbers are mistaken units."""

FILTERS = ("bicubic", "bilinear", "lanczos")
"""Names of filters that a plan may carry."""

_MOST_PIXELS = 4_000_000_000  # px of a canvas


class Box(NamedTuple):
    """A rectangle in px, ``bottom`` and ``right`` exclusive."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def size_hw(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left


@dataclass(frozen=True, slots=True)
class Canvas(Settings):
    """One resize of the image, and the tiles cut from it.

    Attributes:
        kind: ``"slice"`` or ``"overview"``: what its tiles are.
        content_hw: The source is resized to this, px.
        size_hw: The canvas, px; equal to ``content_hw`` where nothing is padded.
        grid: (rows, columns) of its tiles.
        tiles: Row-major boxes on the canvas, px. They may overlap or leave a margin.
        view_hw: What the encoder sees of every tile, px; a tile of another size is resized once more.
        tokens_per_view: Visual tokens of every tile.
        source: The part of the image that is resized, px; ``None`` is all of it.
        offset: (top, left) of the content on the canvas, px; negative where the content is cropped.
        fill: RGB of the canvas where no content lies; ``None`` where content covers it.
        cell: (row, column) of its first tile in the plan's grid, where every slice has a canvas of its own.
        first_hw: The source is resized to this before it is resized to ``content_hw``, px, where a rule resizes twice.
        view_filter: (filter, antialias) of a tile's own resize to ``view_hw``; ``None``: the plan's, as the canvas.
        latents_hw: (rows, columns) that a tile's tokens are laid out in, where a resampler is to fit its latents to
            the view; ``None``: as the compressor has them.
    """

    kind: str
    content_hw: tuple[int, int]
    size_hw: tuple[int, int]
    grid: tuple[int, int]
    tiles: tuple[Box, ...]
    view_hw: tuple[int, int]
    tokens_per_view: int
    source: Box | None = None
    offset: tuple[int, int] = (0, 0)
    fill: tuple[int, int, int] | None = None
    cell: tuple[int, int] = (0, 0)
    first_hw: tuple[int, int] | None = None
    view_filter: tuple[str, bool] | None = None
    latents_hw: tuple[int, int] | None = None

    later = ("cell", "first_hw", "view_filter", "latents_hw")

    @property
    def is_covered(self) -> bool:
        """Whether content lies on all of the canvas."""
        sides = zip(self.offset, self.content_hw, self.size_hw, strict=True)
        return all(start <= 0 and start + content >= side for start, content, side in sides)


@dataclass(frozen=True, slots=True)
class Packing(Settings):
    """How the views' feature maps become tokens, where that is more than one view after the other.

    The steps, in this order, each only where its field is set. Sizes are (rows, columns) in features.

    Attributes:
        view_hw: Every view's feature map, after any pooling that the encoder does inside a view.
        overview_view_hw: The same for the overview, where it differs.
        pooled_hw: Each view's map is resized (bilinear, corners not aligned, no antialias) to this.
        map_hw: The slices' maps are put together in their grid to one map of this size. ``None``: views stay apart.
        overlap: Features dropped from the (leading, trailing) edge of a map that faces another one, before that.
        kept: The part of the map that is kept, so that padding costs no tokens; it may be empty.
        resized_hw: The kept part is resized (bilinear, corners not aligned, no antialias) to this.
        merge: The result, and the overview's map, are pooled by ``merge`` x ``merge``, a rest counting as one.
        newline: A learned embedding follows every row of the slices' map.
        overview_newline: The same for the overview.
        separator: One more learned embedding: ``"between"`` overview and slices, or at the ``"end"``; or ``None``.
    """

    view_hw: tuple[int, int]
    overview_view_hw: tuple[int, int] | None = None
    pooled_hw: tuple[int, int] | None = None
    map_hw: tuple[int, int] | None = None
    overlap: tuple[int, int] = (0, 0)
    kept: Box | None = None
    resized_hw: tuple[int, int] | None = None
    merge: int = 1
    newline: bool = False
    overview_newline: bool = False
    separator: str | None = None

    @property
    def final_hw(self) -> tuple[int, int] | None:
        """The slices' map as the language model reads it; ``None`` where views stay apart."""
        if self.map_hw is None:
            return None
        rows, cols = self.resized_hw or (self.kept.size_hw if self.kept is not None else self.map_hw)
        return -(-rows // self.merge), -(-cols // self.merge)

    @property
    def overview_hw(self) -> tuple[int, int]:
        """The overview's map as the language model reads it."""
        rows, cols = self.pooled_hw or self.overview_view_hw or self.view_hw
        return -(-rows // self.merge), -(-cols // self.merge)

    def counts(self, overviews: int, slices: int) -> tuple[int, int]:
        """(visual tokens, learned newlines and separators) of so many views."""
        (rows, cols), final_hw = self.overview_hw, self.final_hw
        visual = overviews * rows * cols
        learned = overviews * rows * self.overview_newline + (self.separator is not None)
        if final_hw is None:
            return visual + slices * math.prod(self.pooled_hw or self.view_hw), learned
        return visual + final_hw[0] * final_hw[1], learned + final_hw[0] * self.newline


@dataclass(frozen=True, slots=True)
class View:
    """One picture that the encoder sees.

    ``index`` is its place in ``plan.views``, ``canvas`` that in ``plan.canvases``, ``row`` and ``col`` that in the
    plan's grid, (0, 0) for an overview; ``box`` is its rectangle on the canvas and ``size_hw`` what the encoder sees
    of it, px; ``num_tokens`` are visual tokens after the compressor, in a grid of ``latents_hw`` where that is set.
    """

    index: int
    kind: str
    canvas: int
    row: int
    col: int
    box: Box
    size_hw: tuple[int, int]
    patches_hw: tuple[int, int]
    num_tokens: int
    latents_hw: tuple[int, int] | None = None

    @property
    def num_patches(self) -> int:
        return self.patches_hw[0] * self.patches_hw[1]


@dataclass(frozen=True)
class SlicePlan(Settings):
    """How one image is resized, cut and counted; the same type for every strategy. Frozen, hashable, JSON-able.

    Attributes:
        image_hw: The image, px.
        patch_size: px.
        canvases: In the order in which their views are fed.
        grid: (rows, columns) of the slices, or ``None``: the image is not cut.
        num_visual_tokens: Tokens of all views.
        num_separators: Positions of no view: those of the schema's symbols, or with a packing its learned newlines and
            separator, which then are rows of the tokens.
        strategy: The name of the rule that made it.
        packing: How feature maps become tokens; ``None``: every view gives its own tokens, one view after the other.
        resample: The filter that the rule was released with: ``"bicubic"``, ``"bilinear"`` or ``"lanczos"``.
        antialias: Whether the filter widens where it shrinks; without, px between its samples are skipped.
    """

    image_hw: tuple[int, int]
    patch_size: int
    canvases: tuple[Canvas, ...]
    grid: tuple[int, int] | None
    num_visual_tokens: int
    num_separators: int
    strategy: str
    packing: Packing | None = None
    resample: str = "bicubic"
    antialias: bool = True

    later = ("packing", "resample", "antialias")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SlicePlan:
        """The inverse of ``to_dict``, also after JSON text; a ``ValueError`` where it is no plan, or contradictory."""
        found = super().from_dict(data)
        if wrong := next(contradictions(found), None):
            raise ValueError(f"the plan's parts contradict each other: {wrong}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """As every settings' dictionary; where no latents are fitted it says nothing of that, as earlier versions."""
        found = super().to_dict()
        for canvas in found["canvases"]:
            if canvas["latents_hw"] is None:
                del canvas["latents_hw"]
        return found

    @property
    def num_tokens(self) -> int:
        """Positions in the language model's sequence, separators included."""
        return self.num_visual_tokens + self.num_separators

    @property
    def num_views(self) -> int:
        return sum(len(canvas.tiles) for canvas in self.canvases)

    @property
    def tokens_by_view(self) -> bool:
        """Whether every visual token is one view's, views following each other; not so for maps put together."""
        by_view = sum(len(canvas.tiles) * canvas.tokens_per_view for canvas in self.canvases)
        return by_view == self.num_visual_tokens and (self.packing is None or self.packing.map_hw is None)

    @property
    def num_patches(self) -> int:
        """ViT patches of all views."""
        p = self.patch_size
        return sum(len(c.tiles) * (c.view_hw[0] // p) * (c.view_hw[1] // p) for c in self.canvases)

    @property
    def slice_hw(self) -> tuple[int, int] | None:
        """Size of the (first) slice the encoder sees, px; ``None`` where the image is not cut."""
        return next((c.view_hw for c in self.canvases if c.kind == "slice"), None)

    @property
    def overview_hw(self) -> tuple[int, int] | None:
        """Size of the overview the encoder sees, px; ``None`` where a strategy has none."""
        return next((c.view_hw for c in self.canvases if c.kind == "overview"), None)

    @cached_property
    def views(self) -> tuple[View, ...]:
        """Every view in feeding order; slices are row-major."""
        views: list[View] = []
        for number, canvas in enumerate(self.canvases):
            kind, view_hw, tokens = canvas.kind, canvas.view_hw, canvas.tokens_per_view
            patches_hw = (view_hw[0] // self.patch_size, view_hw[1] // self.patch_size)
            for place, box in enumerate(canvas.tiles):
                row, col = divmod(place, canvas.grid[1])
                row, col = row + canvas.cell[0], col + canvas.cell[1]
                place_hw, sizes = (row, col), (view_hw, patches_hw)
                views.append(View(len(views), kind, number, *place_hw, box, *sizes, tokens, canvas.latents_hw))
        return tuple(views)

    def overview_alone(self) -> SlicePlan | None:
        """The plan without its slices; ``None`` where it has no overview."""
        canvases = tuple(canvas for canvas in self.canvases if canvas.kind == "overview")
        if not canvases:
            return None
        packing, visual, separators = self.packing, sum(canvas.tokens_per_view for canvas in canvases), 0
        if packing is not None:
            packing = Packing(
                view_hw=packing.overview_view_hw or packing.view_hw,
                pooled_hw=packing.pooled_hw,
                merge=packing.merge,
                overview_newline=packing.overview_newline,
                separator="end" if packing.separator == "end" else None,
            )
            visual, separators = packing.counts(1, 0)
            if packing == Packing(view_hw=packing.view_hw):
                packing = None
        return self.replace(
            canvases=canvases, grid=None, num_visual_tokens=visual, num_separators=separators, packing=packing
        )

    def __str__(self) -> str:
        cut = ""
        if self.grid and self.slice_hw:
            others = " and others" * (len({c.view_hw for c in self.canvases if c.kind == "slice"}) > 1)
            cut = "{}x{} slices of {}x{} px{}, ".format(*self.grid, *self.slice_hw, others)
        overview = "overview {}x{} px, ".format(*self.overview_hw) if self.overview_hw else ""
        return (
            f"{self.strategy}: {self.image_hw[0]}x{self.image_hw[1]} px (height x width) -> {cut}{overview}"
            f"{self.num_views} view{'s' * (self.num_views > 1)}, {self.num_patches} patches, {self.num_tokens} tokens"
        )


def check_size(image_hw: Sequence[int]) -> tuple[int, int]:
    """(height, width) as two plain ints, or a ``ValueError`` that says what to do."""
    try:
        height, width = image_hw
        if type(height) is not int or type(width) is not int:
            if isinstance(height, bool) or isinstance(width, bool):
                raise TypeError
            height, width = operator.index(height), operator.index(width)
    except (TypeError, ValueError):
        raise ValueError(f"an image size is two whole numbers of pixels (height, width), got {image_hw!r}") from None
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise ValueError(
            f"got height {height} and width {width}; each must lie in 1..{MAX_SIDE} px: check the unit and the order"
        )
    return height, width


def contradictions(found: SlicePlan) -> Iterator[str]:
    """Everything in a plan that cannot be, or does not agree with another part of it."""
    yield from bad_canvases(found)
    if found.resample not in FILTERS:
        yield f"resample is {found.resample!r}: take one of {', '.join(FILTERS)}"
    overviews, slices = (sum(len(c.tiles) for c in found.canvases if c.kind == kind) for kind in ("overview", "slice"))
    grid = found.grid
    if grid is None and slices:
        yield f"{slices} slices and no grid: say how many rows and columns they are"
    elif grid is not None and (min(grid) < 1 or math.prod(grid) != max(slices, 1)):
        yield f"grid {tuple(grid)} (rows, columns) but {slices} slices"
    counted = found.num_visual_tokens, found.num_separators
    if found.packing is not None:
        if what := _bad_packing(found.packing):
            yield f"packing: {what}"
        elif counted != (own := found.packing.counts(overviews, slices)):
            yield f"its packing makes {own} visual tokens and newlines, it counts {counted}"
        return
    by_view = sum(len(canvas.tiles) * canvas.tokens_per_view for canvas in found.canvases)
    if by_view != found.num_visual_tokens:
        yield f"views hold {by_view} tokens, num_visual_tokens is {found.num_visual_tokens}, no packing explains it"
    if found.num_separators < 0:
        yield f"num_separators is {found.num_separators}"


def _bad_packing(packing: Packing) -> str | None:
    for name in ("view_hw", "overview_view_hw", "pooled_hw", "map_hw", "resized_hw"):
        if min(getattr(packing, name) or (1,)) < 1:
            return f"{name} {getattr(packing, name)} is below 1"
    if packing.merge < 1 or min(packing.overlap) < 0:
        return f"merge is {packing.merge} and overlap {packing.overlap}"
    if packing.separator not in (None, "between", "end"):
        return f"separator is {packing.separator!r}, not 'between' or 'end'"
    kept = packing.kept
    if kept is not None and (
        packing.map_hw is None or not 0 <= kept.top <= kept.bottom or not 0 <= kept.left <= kept.right
    ):
        return f"kept {tuple(kept)} is no part of a map of {packing.map_hw}"
    return None


def bad_canvases(found: SlicePlan) -> Iterator[str]:
    """What is wrong with sizes, patches and canvases alone."""
    try:
        check_size(found.image_hw)
    except ValueError as problem:
        yield str(problem)
        return
    if type(found.patch_size) is not int or found.patch_size < 1:
        yield f"patch_size is {found.patch_size!r}: give the side of a ViT patch, px"
    if not found.num_views:
        yield "no view"
    for number, canvas in enumerate(found.canvases):
        try:
            read_arguments(Canvas, {name: getattr(canvas, name) for name in Canvas.__slots__})
        except ValueError as problem:
            yield f"canvas {number}: {problem}"
        else:
            yield from (f"canvas {number}: {what}" for what in _bad_canvas(canvas, found.image_hw))


def _bad_canvas(canvas: Canvas, image_hw: tuple[int, int]) -> Iterator[str]:
    for name in ("content_hw", "size_hw", "view_hw", "grid", "first_hw", "latents_hw"):
        if min(getattr(canvas, name) or (1,)) < 1:
            yield f"{name} {getattr(canvas, name)} is below 1"
            return
    height, width = canvas.size_hw
    if canvas.kind not in ("slice", "overview"):
        yield f"kind is {canvas.kind!r}, not 'slice' or 'overview'"
    if math.prod(canvas.grid) != len(canvas.tiles):
        yield f"its grid is {tuple(canvas.grid)} (rows, columns), its tiles are {len(canvas.tiles)}"
    if canvas.tokens_per_view < 0:
        yield f"tokens_per_view is {canvas.tokens_per_view}"
    if canvas.latents_hw is not None and math.prod(canvas.latents_hw) != canvas.tokens_per_view:
        yield f"latents_hw is {tuple(canvas.latents_hw)} (rows, columns) but tokens_per_view {canvas.tokens_per_view}"
    outside = [box for box in canvas.tiles if not within(box, canvas.size_hw)]
    if outside:
        yield f"tile {tuple(outside[0])} is not on the {canvas.size_hw} canvas: clip it, or enlarge the canvas"
    if canvas.source is not None and not within(canvas.source, image_hw):
        yield f"source {tuple(canvas.source)} is not in the image"
    if canvas.fill is None and not canvas.is_covered:
        yield "content leaves part of the canvas empty and fill is None: give an RGB fill"
    if canvas.fill is not None and not all(0 <= level <= 255 for level in canvas.fill):
        yield f"fill {tuple(canvas.fill)} is no RGB colour of 0..255"
    if canvas.view_filter is not None and canvas.view_filter[0] not in FILTERS:
        yield f"view_filter is {canvas.view_filter!r}: take one of {', '.join(FILTERS)}, and True or False"
    if max(map(math.prod, (canvas.size_hw, canvas.view_hw, canvas.first_hw or ()))) > _MOST_PIXELS:
        yield f"a canvas of {height} x {width} px would not fit in memory: bound it"


def within(box: Sequence[int], size_hw: tuple[int, int]) -> bool:
    """Whether a rectangle of a px and more lies on a canvas, or an image, of this size."""
    top, left, bottom, right = box
    return 0 <= top < bottom <= size_hw[0] and 0 <= left < right <= size_hw[1]


_PUBLIC = dict.fromkeys(("candidates", "grid_score", "plan"), "uhd.slicing")
__getattr__ = moved(__name__, {**_PUBLIC, "planner_of": "uhd.slicing.adaptive"})
