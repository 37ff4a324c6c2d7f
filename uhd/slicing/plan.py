"""Where an image is cut: the plan that every rule returns, and what it is made of.

Integers only: no image is opened and no tensor library is imported. Sizes are (height, width) in px, grids are
(rows, columns). A *slice* is one cell of the grid, the *overview* is the whole image made small, a *view* is either.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from uhd.moved import moved
from uhd.settings import Settings

MAX_SIDE = 1_000_000
"""Longest image side that is planned, px. No photograph has it; larger numbers are mistaken units."""


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

    readers = {"tiles": lambda boxes: tuple(map(Box._make, boxes)), "source": Box._make}  # noqa: RUF012


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

    readers = {"kept": Box._make}  # noqa: RUF012

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
    of it, px; ``num_tokens`` are visual tokens after the compressor.
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

    readers = {"canvases": lambda rows: tuple(map(Canvas.from_dict, rows)), "packing": Packing.from_dict}  # noqa: RUF012

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
                views.append(View(len(views), kind, number, row, col, box, view_hw, patches_hw, tokens))
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
            cut = "{}x{} slices of {}x{} px, ".format(*self.grid, *self.slice_hw)
        overview = "overview {}x{} px, ".format(*self.overview_hw) if self.overview_hw else ""
        return (
            f"{self.strategy}: {self.image_hw[0]}x{self.image_hw[1]} px (height x width) -> {cut}{overview}"
            f"{self.num_views} views, {self.num_patches} patches, {self.num_tokens} tokens"
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


_PUBLIC = dict.fromkeys(("candidates", "grid_score", "plan"), "uhd.slicing")
__getattr__ = moved(__name__, {**_PUBLIC, "planner_of": "uhd.slicing.adaptive"})
