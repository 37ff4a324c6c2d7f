"""Where an image is cut: the plan every strategy returns, and the adaptive planner of LLaVA-UHD.

Integers only: no image is opened and no tensor library is imported. Sizes are (height, width) in px, grids are
(rows, columns). A *slice* is one cell of the grid, the *overview* is the whole image made small, a *view* is either.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from uhd.slicing.config import DEFAULT, SlicingConfig

if TYPE_CHECKING:
    from uhd.slicing.strategies import Rule, StrategyConfig

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
class Canvas:
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


@dataclass(frozen=True, slots=True)
class Packing:
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

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Packing:
        """From plain JSON types, as in ``SlicePlan.to_dict()["packing"]``."""
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
        return cls(**{**values, "kept": values.get("kept") and Box(*values["kept"])})


@dataclass(frozen=True, slots=True)
class View:
    """One picture that the encoder sees.

    Attributes:
        index: Place in ``plan.views``, the order in which views are encoded and laid out.
        kind: ``"slice"`` or ``"overview"``.
        canvas: Index into ``plan.canvases``.
        row, col: Place in the plan's grid; (0, 0) for an overview.
        box: Its rectangle on the canvas, px.
        size_hw: What the encoder sees, px.
        patches_hw: The same in patches.
        num_tokens: Visual tokens after the compressor.
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
class SlicePlan:
    """How one image is resized, cut and counted; the same type for every strategy. Frozen, hashable, JSON-able.

    Attributes:
        image_hw: The image, px.
        patch_size: px.
        canvases: In the order in which their views are fed.
        grid: (rows, columns) of the slices, or ``None``: the image is not cut.
        num_visual_tokens: Tokens of all views.
        num_separators: Positions that the layout adds between and around them.
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
        return tuple(self._views())

    def _views(self) -> Iterator[View]:
        index = 0
        for number, canvas in enumerate(self.canvases):
            patches_hw = (canvas.view_hw[0] // self.patch_size, canvas.view_hw[1] // self.patch_size)
            for place, box in enumerate(canvas.tiles):
                row, col = divmod(place, canvas.grid[1])
                row, col = row + canvas.cell[0], col + canvas.cell[1]
                yield View(
                    index, canvas.kind, number, row, col, box, canvas.view_hw, patches_hw, canvas.tokens_per_view
                )
                index += 1

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SlicePlan:
        """The inverse of :meth:`to_dict`, also after a round trip through JSON text.

        Raises:
            ValueError: The data are not such a plan.
        """
        try:
            data = {**data, "canvases": tuple(_canvas_from_dict(c) for c in data["canvases"])}
            data["image_hw"] = tuple(data["image_hw"])
            data["grid"] = data["grid"] and tuple(data["grid"])
            data["packing"] = Packing.from_dict(data["packing"]) if data.get("packing") else None
            return cls(**data)
        except (KeyError, TypeError) as problem:
            raise ValueError(f"not the dictionary of a SlicePlan: {problem!r}") from None

    def __str__(self) -> str:
        cut = ""
        if self.grid and self.slice_hw:
            cut = "{}x{} slices of {}x{} px, ".format(*self.grid, *self.slice_hw)
        overview = "overview {}x{} px, ".format(*self.overview_hw) if self.overview_hw else ""
        return (
            f"{self.strategy}: {self.image_hw[0]}x{self.image_hw[1]} px (height x width) -> {cut}{overview}"
            f"{self.num_views} views, {self.num_patches} patches, {self.num_tokens} tokens"
        )


class Candidate(NamedTuple):
    """A grid that was considered. ``tied``: its score is the best one to within 1e-12, and so is another's."""

    grid: tuple[int, int]
    score: float
    tied: bool


def grid_score(image_hw: tuple[int, int], grid: tuple[int, int], view_hw: tuple[int, int] = (1, 1)) -> float:
    """How well the cells of ``grid`` match the encoder's aspect: <= 0, and 0 is perfect.

    ``-|ln(W / H) - ln(cols / rows) - ln(W_v / H_v)|`` in float64: the cell's aspect against the view's. Released code
    has a square view. The terms are taken in this order because their rounding decides squares: for a square image
    ``ln(2/3)`` and ``ln(3/2)`` differ by one ulp, so 3 rows x 2 columns is not tied with 2 x 3.

    Args:
        image_hw: (H, W) of the image, in any unit.
        grid: (rows, columns).
        view_hw: (H_v, W_v) that the encoder was trained on, in any unit.

    Raises:
        ValueError: A number is not positive.

    Source: LLaVA-UHD (arXiv 2403.11703) section 3.1; thunlp/LLaVA-UHD, llava/slice_process.py.
    """
    if min(*image_hw, *grid, *view_hw) <= 0:
        raise ValueError(f"sizes and grids are positive, got image_hw={image_hw}, grid={grid}, view_hw={view_hw}")
    cell_aspect = math.log(image_hw[1] / image_hw[0]) - math.log(grid[1] / grid[0])
    return 0.0 - abs(cell_aspect - math.log(view_hw[1] / view_hw[0]))


def plan(
    image_hw: tuple[int, int],
    config: SlicingConfig | StrategyConfig | Rule | str | None = None,
    *,
    max_tokens: int | None = None,
) -> SlicePlan:
    """Plan one image by the adaptive rule or by any other.

    Args:
        image_hw: (height, width) of the image, px.
        config: Settings of the adaptive planner or of any strategy, the name of either (see
            :func:`uhd.strategies`), or your own function from (height, width) to a :class:`SlicePlan`;
            ``None`` is ``"llava-uhd-safe"``.
        max_tokens: Bound on ``plan.num_tokens``: the number of slices is lowered until it holds. For the adaptive
            planner only: other rules have no such freedom.

    Returns:
        The plan. Equal arguments give the same (cached) object, unless the rule is your own function.

    Raises:
        ValueError: The size is not two ints in 1..1,000,000, the rule refuses it, no strategy has that name, or not
            even the overview fits ``max_tokens``.
        TypeError: ``config`` is none of these, or your function did not return a plan.
    """
    if config is not None and not isinstance(config, SlicingConfig):
        from uhd.slicing.strategies import find, plan_by_rule  # it imports this module

        found = find(config)
        if not isinstance(found, SlicingConfig):
            return plan_by_rule(check_size(image_hw), found, max_tokens=max_tokens)
        config = found
    height, width = check_size(image_hw)
    return planner_of(resolve(config, max_tokens)).plan(height, width)


def candidates(
    image_hw: tuple[int, int], config: SlicingConfig | str | None = None, *, max_tokens: int | None = None
) -> tuple[Candidate, ...]:
    """Every grid that was considered for this image, best first; ``()`` where the image is not cut.

    Equal scores stay in the order in which the rule tries them, so the first entry is the plan's grid.
    Arguments and errors as in :func:`plan`.
    """
    config = resolve(config, max_tokens)
    image_hw = check_size(image_hw)
    best, cap = planner_of(config).within_budget(*image_hw)
    if best.grid is None:
        return ()
    scored = [(grid, grid_score(image_hw, grid)) for grid in considered_grids(image_hw, config, cap)]
    scored.sort(key=lambda pair: -pair[1])
    ties = sum(score >= scored[0][1] - 1e-12 for _, score in scored)
    return tuple(Candidate(grid, score, ties > 1 and place < ties) for place, (grid, score) in enumerate(scored))


def resolve(config: SlicingConfig | str | None, max_tokens: int | None = None) -> SlicingConfig:
    """A config as it is, a preset by its name, the default for ``None``; with a token budget if one is given.

    Raises:
        TypeError: Something else came.
    """
    if config is None:
        config = DEFAULT
    elif isinstance(config, str):
        config = SlicingConfig.preset(config)
    elif not isinstance(config, SlicingConfig):
        raise TypeError(f"expected a SlicingConfig, a preset's name or None, got {type(config).__name__}")
    return config if max_tokens is None else replace(config, max_tokens=max_tokens)


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


def considered_grids(image_hw: tuple[int, int], config: SlicingConfig, cap: int) -> tuple[tuple[int, int], ...]:
    """The grids compared under a cap on slices, in the rule's order: counts, then columns, rising. Empty: no cut."""
    return grids_near(min(math.ceil(image_hw[1] * image_hw[0] / config.image_size**2), cap), config.rule, cap)


@lru_cache(maxsize=1024)
def grids_near(ideal: int, rule: str, cap: int) -> tuple[tuple[int, int], ...]:
    """The grids compared for an image whose area is that of ``ideal`` views, or of more than ``cap``."""
    if rule == "march2024":
        counts = (ideal, ideal + 1) if ideal <= 2 else (ideal - 1, ideal, ideal + 1)
    elif ideal <= 1:
        return ()
    else:
        counts = tuple(n for n in (ideal - 1, ideal, ideal + 1) if 1 < n <= cap)
    return tuple((n // cols, cols) for n in counts for cols in range(1, n + 1) if n % cols == 0)


@lru_cache(maxsize=1024)
def aspects_near(ideal: int, rule: str, cap: int) -> tuple[list[float], list[tuple[int, int]], list[int]]:
    """Those grids sorted by ln(columns / rows): the logarithms, grids, and their places in the rule's order.

    Of grids of one aspect only the first is kept, which is the one that the rule takes.
    """
    firsts: dict[float, tuple[int, tuple[int, int]]] = {}
    for place, grid in enumerate(grids_near(ideal, rule, cap)):
        firsts.setdefault(math.log(grid[1] / grid[0]), (place, grid))
    logs = sorted(firsts)
    return logs, [firsts[log][1] for log in logs], [firsts[log][0] for log in logs]


class Planner:
    """The adaptive rule of one config, which keeps what it would look up or make again for every image."""

    def __init__(self, config: SlicingConfig) -> None:
        self.config = config
        self.area = config.image_size**2
        self.fit = _view_fitter(config)
        self.plan = lru_cache(maxsize=4096)(self._plan)
        self.overview = lru_cache(maxsize=4096)(self._overview)
        self.slices = lru_cache(maxsize=4096)(self._slices)
        self.near: dict[int, tuple[list[float], list[tuple[int, int]], list[int]]] = {}  # under the config's own cap

    def grid(self, height: int, width: int, cap: int | None = None) -> tuple[int, int] | None:
        """The grid of the best :func:`grid_score` under a cap, the config's by default; ``None``: uncut.

        A misfit rises on either side of the image's aspect, so only the two aspects around it can be best.
        """
        cap = cap or self.config.max_slices
        ideal = math.ceil(width * height / self.area)
        if ideal > cap:
            ideal = cap
        if cap != self.config.max_slices:
            logs, grids, places = aspects_near(ideal, self.config.rule, cap)
        elif ideal in self.near:
            logs, grids, places = self.near[ideal]
        else:
            logs, grids, places = self.near[ideal] = aspects_near(ideal, self.config.rule, cap)
        if not logs:
            return None
        aspect = math.log(width / height)
        at = bisect_left(logs, aspect)
        if at == len(logs):
            at -= 1
        elif at:
            below, above = aspect - logs[at - 1], logs[at] - aspect  # float subtraction is odd: these are the misfits
            if below < above or (below == above and places[at - 1] < places[at]):
                at -= 1
        return None if grids[at] == (1, 1) else grids[at]

    def slice_hw(self, height: int, width: int, grid: tuple[int, int]) -> tuple[int, int]:
        """Size of a slice, px: the whole image is first stretched to sides that the grid divides."""
        rows, cols = grid
        if self.config.rule == "march2024" or self.config.rounding == "floor":
            return self.fit(height // rows or 1, width // cols or 1)
        return self.fit(round(height / rows) or 1, round(width / cols) or 1)

    def build(self, height: int, width: int, grid: tuple[int, int] | None) -> SlicePlan:
        """The plan with a given grid."""
        # an image that is cut has more than one view's area, so that fitting never enlarges its overview
        canvas, tokens = self.overview(self.fit(height, width))
        if grid is None:
            canvases, separators = (canvas,), self.config.separators.per_image
        else:
            slices, more, separators = self.slices(grid, self.slice_hw(height, width, grid))
            canvases = (canvas, slices) if self.config.overview_first else (slices, canvas)
            tokens += more
        return SlicePlan((height, width), self.config.patch_size, canvases, grid, tokens, separators, self.config.name)

    def within_budget(self, height: int, width: int) -> tuple[SlicePlan, int]:
        """The plan under the largest cap that keeps ``max_tokens``, and that cap (0: the overview alone)."""
        config = self.config
        if config.max_tokens is None:
            return self.plan(height, width), config.max_slices
        for cap in range(config.budget_cap, 0, -1):
            found = self.build(height, width, self.grid(height, width, cap))
            if found.num_tokens <= config.max_tokens:
                return found, cap
        alone = self.build(height, width, None)
        if alone.num_tokens > config.max_tokens:
            raise ValueError(
                f"the overview of a {height}x{width} px image (height x width) alone takes {alone.num_tokens} "
                f"tokens under {config.name!r}, max_tokens is {config.max_tokens}: raise it to {alone.num_tokens}"
            )
        return alone, 0

    def _plan(self, height: int, width: int) -> SlicePlan:
        if self.config.max_tokens is not None:
            return self.within_budget(height, width)[0]
        return self.build(height, width, self.grid(height, width))

    def _overview(self, view_hw: tuple[int, int]) -> tuple[Canvas, int]:
        """The overview's canvas and its tokens."""
        tokens = self._view_tokens(view_hw)
        return Canvas("overview", view_hw, view_hw, (1, 1), (Box(0, 0, *view_hw),), view_hw, tokens), tokens

    def _slices(self, grid: tuple[int, int], slice_hw: tuple[int, int]) -> tuple[Canvas, int, int]:
        """The slices' canvas, their tokens, and the separators of a cut image."""
        (rows, cols), (h, w) = grid, slice_hw
        tiles = tuple(Box(r * h, c * w, (r + 1) * h, (c + 1) * w) for r in range(rows) for c in range(cols))
        size_hw, tokens = (rows * h, cols * w), self._view_tokens(slice_hw)
        canvas = Canvas("slice", size_hw, size_hw, grid, tiles, slice_hw, tokens)
        return canvas, rows * cols * tokens, self.config.separators.count(grid)

    def _view_tokens(self, view_hw: tuple[int, int]) -> int:
        config = self.config
        if config.tokens_per_view is not None:
            return config.tokens_per_view
        return (view_hw[0] // config.unit) * (view_hw[1] // config.unit)


_made = lru_cache(maxsize=64)(Planner)
_last: tuple[SlicingConfig | None, Planner | None] = (None, None)


def planner_of(config: SlicingConfig) -> Planner:
    """The planner of a config. Images mostly come with the same object again, and to hash it takes a while."""
    global _last
    known, planner = _last
    if config is not known:
        planner = _made(config)
        _last = config, planner
    return planner


def uncut(image_hw: tuple[int, int], config: SlicingConfig) -> SlicePlan:
    """The plan of an image that is left whole, whatever its size."""
    return planner_of(config).build(*image_hw, None)


def _view_fitter(config: SlicingConfig) -> Callable[[int, int], tuple[int, int]]:
    """``fit(height, width)``: size of a view for content of this size, px.

    The encoder's pixel budget at the content's aspect, sides multiples of ``config.unit``. The order of operations
    decides the last bits.

    Source: thunlp/LLaVA-UHD, llava/slice_process.py ``find_best_resize`` with upscaling (released); the first
    release's ``adapt_size`` (march2024).
    """
    unit, side, budget, clamp = config.unit, config.image_size, config.view_budget, config.clamp
    floor, sqrt = config.rounding == "floor", math.sqrt

    def released(height: int, width: int) -> tuple[int, int]:
        aspect = width / height
        height = int(side / sqrt(aspect))
        width = int(height * aspect)  # from the truncated height, as released
        rows, cols = (height // unit, width // unit) if floor else (round(height / unit), round(width / unit))
        return finished(rows or 1, cols or 1)

    def march2024(height: int, width: int) -> tuple[int, int]:
        scale = sqrt(budget * (unit / height) * (unit / width))
        rows, cols = math.floor(scale * height / unit), math.floor(scale * width / unit)
        return finished(min(rows or 1, budget), min(cols or 1, budget))

    def finished(rows: int, cols: int) -> tuple[int, int]:
        if clamp and rows * cols > budget:  # shorten the longer side
            if rows >= cols:
                rows = budget // cols
            else:
                cols = budget // rows
        return rows * unit, cols * unit

    return released if config.rule == "released" else march2024


def to_multiple(length: int, unit: int, rounding: str) -> int:
    """``length`` floored or rounded (half to even) to a multiple of ``unit``, and at least one ``unit``."""
    steps = length // unit if rounding == "floor" else round(length / unit)
    return max(steps, 1) * unit


def _canvas_from_dict(data: Mapping[str, Any]) -> Canvas:
    def pair(value):
        return tuple(value)

    return Canvas(
        kind=data["kind"],
        content_hw=pair(data["content_hw"]),
        size_hw=pair(data["size_hw"]),
        grid=pair(data["grid"]),
        tiles=tuple(Box(*box) for box in data["tiles"]),
        view_hw=pair(data["view_hw"]),
        tokens_per_view=data["tokens_per_view"],
        source=data["source"] and Box(*data["source"]),
        offset=pair(data["offset"]),
        fill=data["fill"] and pair(data["fill"]),
        cell=pair(data.get("cell", (0, 0))),
        first_hw=data.get("first_hw") and pair(data["first_hw"]),
        view_filter=data.get("view_filter") and pair(data["view_filter"]),
    )
