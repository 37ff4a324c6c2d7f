"""The adaptive planner of LLaVA-UHD: its settings, the grids and sizes that it chooses, and the most it can cost."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial
from typing import Any, NamedTuple

from uhd.settings import check_choice, plain_name, unknown_name, whole
from uhd.slicing.config import MAX_VIEWS, SeparatorCount, Slicing, aspect_or_none, positive_int
from uhd.slicing.grids import Candidate, aspects_near, grid_score, grids_near, to_multiple
from uhd.slicing.latents import fitted, latent_grid, with_latents
from uhd.slicing.plan import MAX_SIDE, Box, Canvas, SlicePlan, check_size

RULES = ("released", "march2024")
CUTS = ("area", "shape")
LATENTS = ("fixed", "fitted")


@dataclass(frozen=True)
class SlicingConfig(Slicing):
    """Settings of the adaptive (LLaVA-UHD) planner. Frozen and hashable; change one with :meth:`replace`.

    Attributes:
        name: The preset this came from; carried into every plan.
        image_size: Side S of the square the vision encoder was trained on, px. S*S is a view's pixel budget.
        patch_size: Side of a ViT patch, px.
        merge: Patches joined per side before the language model sees them; 1 where a resampler gives every view the
            same number of tokens.
        max_slices: Cap on the number of slices, the overview not counted; 1 never cuts under the released rule.
        rounding: How a side becomes a multiple of ``patch_size * merge``: ``"floor"`` (LLaVA-UHD) or ``"round"``
            (MiniCPM-V; half to even).
        rule: ``"released"``: N - 1, N or N + 1 slices, never 1, never above the cap, no cut where N <= 1.
            ``"march2024"``: the first release; the cap limits N alone, so N + 1 = cap + 1 slices can be chosen, and an
            image of one view's area may be cut in two.
        clamp: Shorten a view's longer side where it exceeds S*S px, which happens where the shorter side is below one
            patch, and with ``"round"`` also by rounding.
        overview_first: The overview is fed and laid out before the slices.
        tokens_per_view: Tokens of every view, or ``None``: a view gives ``patches / merge**2`` tokens.
        separators: How many separator positions the layout adds.
        max_tokens: Upper bound on ``plan.num_tokens``; the planner lowers the number of slices to meet it.
        cut_by: What the number of slices N follows from: ``"area"``, the image's over S*S, or ``"shape"``, that or the
            longer side over S, whichever is more, so that long images keep their resolution; ``"released"`` only.
        border_moves: Patches that a border between slices may move by, once there are pixels, to where least content
            is cut; see :mod:`uhd.slicing.borders`. A plan made from a size has none moved. Counts never change.
        one_view_below: An image that would be cut is one larger view where its longer side is at most this many times
            the shorter: of at most the patches and tokens of its slices and overview, see :meth:`Planner.joined`. The
            resampler must fit its latents to it.
        latents: ``"fixed"``: every view has ``tokens_per_view``. ``"fitted"``: at most that many on average, shared
            among an image's views by their patches, in grids that follow their shapes; see :mod:`uhd.slicing.latents`.
            It needs a resampler that fits its latents, as the perceiver does.

    Raises:
        ValueError: A setting is out of range; the message names it.
    """

    name: str = "custom"
    image_size: int = 336
    patch_size: int = 14
    merge: int = 1
    max_slices: int = 7
    rounding: str = "floor"
    rule: str = "released"
    clamp: bool = False
    overview_first: bool = False
    tokens_per_view: int | None = 64
    separators: SeparatorCount = field(default=SeparatorCount(per_slice=1))
    max_tokens: int | None = None
    cut_by: str = "area"
    border_moves: int = 0
    one_view_below: float | None = None
    latents: str = "fixed"

    later = ("cut_by", "border_moves", "one_view_below", "latents")

    def __post_init__(self) -> None:
        for key in ("image_size", "patch_size", "merge", "max_slices", "tokens_per_view", "max_tokens"):
            object.__setattr__(self, key, positive_int(key, getattr(self, key)))
        if self.max_slices > MAX_VIEWS:
            raise ValueError(f"max_slices is at most {MAX_VIEWS}, got {self.max_slices}: a plan lists every slice")
        if not isinstance(self.separators, SeparatorCount):
            raise ValueError(f"separators must be a SeparatorCount, got {self.separators!r}")
        for key in ("clamp", "overview_first"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key} must be True or False, got {getattr(self, key)!r}")
        check_choice("rounding", self.rounding, ("floor", "round"))
        check_choice("rule", self.rule, RULES)
        if self.rule == "march2024" and (self.merge != 1 or self.rounding != "floor"):
            raise ValueError(
                "rule 'march2024' sizes views by its own floor rule: it needs merge=1 and rounding='floor'"
            )
        self._check_options()
        if self.image_size < self.unit:
            raise ValueError(f"image_size {self.image_size} px is smaller than patch_size * merge = {self.unit} px")

    def _check_options(self) -> None:
        check_choice("cut_by", self.cut_by, CUTS)
        if self.cut_by == "shape" and self.rule != "released":
            raise ValueError(f"cut_by='shape' changes the rule 'released', not {self.rule!r}: leave it at 'area'")
        object.__setattr__(self, "border_moves", whole("border_moves", self.border_moves, least=0))
        if self.border_moves and self.tokens_per_view is None:
            raise ValueError(
                "border_moves makes slices unequal, so it needs tokens_per_view, and that is None (with a projector "
                "that gives a token for each patch it always is): give a number, or leave border_moves at 0"
            )
        object.__setattr__(self, "one_view_below", aspect_or_none("one_view_below", self.one_view_below))
        check_choice("latents", self.latents, LATENTS)
        if self.latents == "fitted" and self.tokens_per_view is None:
            raise ValueError("latents='fitted' shares tokens_per_view among an image's views: give a number")

    def to_dict(self) -> dict[str, Any]:
        """As every settings' dictionary; options that are off are left out, so that earlier versions read the rest."""
        off = {f.name for f in fields(self) if f.name in self.later and getattr(self, f.name) == f.default}
        return {key: value for key, value in super().to_dict().items() if key not in off}

    @property
    def unit(self) -> int:
        """Every view side is a multiple of this, px."""
        return self.patch_size * self.merge

    @property
    def view_budget(self) -> int:
        """Units (patches, or merged patches) that fit in ``image_size**2`` px: 576 for 336 px and patch 14."""
        return self.image_size**2 // self.unit**2

    @property
    def budget_cap(self) -> int:
        """Most slices of a plan within ``max_tokens``; one view in their place may have fewer tokens than they are."""
        if self.max_tokens is None or self.one_view_below is not None:
            return self.max_slices
        return min(self.max_slices, self.max_tokens // self.least_tokens)

    @property
    def least_tokens(self) -> int:
        """Fewest tokens that the views of a cut image have on average."""
        return 1 if self.tokens_per_view is None or self.latents == "fitted" else self.tokens_per_view

    @property
    def fits_latents(self) -> bool:
        return self.tokens_per_view is not None and (self.latents == "fitted" or self.one_view_below is not None)

    @property
    def most_slices(self) -> int:
        """The largest number of slices the rule can choose: the cap, or one more for ``march2024``."""
        return self.max_slices + (self.rule == "march2024")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SlicingConfig:
        """A named preset with other fields as in ``changes``; an unknown name is a ``ValueError``.

        >>> SlicingConfig.preset("minicpm-v", max_slices=4).rounding
        'round'
        """
        if plain_name(name) not in PRESETS:
            raise unknown_name("slicing preset", name, PRESETS)
        found = PRESETS[plain_name(name)]
        return found.replace(**changes) if changes else found

    uses_schema = True

    @property
    def view_side(self) -> int:
        return self.image_size

    @property
    def least_view(self) -> tuple[int, int]:
        return self.merge, self.merge

    def for_vision(self, *, image_size: int | None, patch_size: int) -> SlicingConfig:
        """As every rule does.

        >>> PRESETS["llava-uhd"].for_vision(image_size=384, patch_size=14).plan((1152, 768)).slice_hw
        (378, 378)
        """
        return self.replace(image_size=image_size or self.image_size, patch_size=patch_size)

    def plan(self, image_hw: tuple[int, int]) -> SlicePlan:
        return planner_of(self).plan(*check_size(image_hw))

    def candidates(self, image_hw: tuple[int, int]) -> tuple[Candidate, ...]:
        image_hw = check_size(image_hw)
        best, cap = planner_of(self).within_budget(*image_hw)
        if best.grid is None:
            return ()
        scored = [(grid, grid_score(image_hw, grid)) for grid in considered_grids(image_hw, self, cap)]
        scored.sort(key=lambda pair: -pair[1])
        ties = sum(score >= scored[0][1] - 1e-12 for _, score in scored)
        return tuple(Candidate(grid, score, ties > 1 and place < ties) for place, (grid, score) in enumerate(scored))

    def within(self, max_tokens: int) -> SlicingConfig:
        return self.replace(max_tokens=max_tokens)

    def capped(self, max_slices: int) -> SlicingConfig:
        return self.replace(max_slices=max_slices)

    def uncut(self) -> SlicingConfig:
        if self.rule != "released":
            raise ValueError(f"uncut images need the slicing rule 'released', this one is {self.rule!r}")
        return self.replace(max_slices=1, border_moves=0)

    def single_view(self, image_hw: tuple[int, int]) -> SlicePlan:
        return planner_of(self).build(*check_size(image_hw), None)  # also where the smallest grids would cut

    def overview_of(self, plan: SlicePlan) -> SlicePlan:
        return self.single_view(plan.image_hw)

    def slices_of(self, plan: SlicePlan) -> int:
        return math.prod((plan.grid if self.one_view_below is None else planner_of(self).grid(*plan.image_hw)) or (0,))

    def worst_case(self, *, max_aspect: float = 200.0) -> WorstCase:
        """See :func:`worst_case`."""
        return worst_case(self, max_aspect=max_aspect)


_MARKERS = SeparatorCount(per_image=5, per_cut=-1, per_slice=2, per_row=1)  # MiniCPM-V 2.6: id, <image>, <slice>, "\n"
_MINICPM = SlicingConfig(
    name="minicpm-v", image_size=448, max_slices=9, rounding="round", overview_first=True, separators=_MARKERS
)

PRESETS: dict[str, SlicingConfig] = {
    config.name: config
    for config in (
        SlicingConfig(name="llava-uhd"),
        SlicingConfig(name="llava-uhd-safe", clamp=True),
        SlicingConfig(
            name="llava-uhd-paper", max_slices=6, rule="march2024", separators=SeparatorCount(per_slice=1, per_cut=-1)
        ),
        _MINICPM,
        _MINICPM.replace(name="minicpm-v-4.6", merge=4, tokens_per_view=None),
        _MINICPM.replace(name="minicpm-v-4.6-4x", merge=2, tokens_per_view=None),
        SlicingConfig(name="uhd-plus", clamp=True, cut_by="shape", one_view_below=8.0, latents="fitted"),  # our own
    )
}
DEFAULT = PRESETS["llava-uhd-safe"]


def considered_grids(image_hw: tuple[int, int], config: SlicingConfig, cap: int) -> tuple[tuple[int, int], ...]:
    """The grids compared under a cap on slices, in the rule's order: counts, then columns, rising. Empty: no cut."""
    return grids_near(min(ideal_slices(*image_hw, config), cap), config.rule, cap)


def ideal_slices(height: int, width: int, config: SlicingConfig) -> int:
    """The number of slices that an image of this size asks for, before any cap.

    >>> [ideal_slices(100, 1000, PRESETS["llava-uhd"].replace(cut_by=what)) for what in CUTS]
    [1, 3]
    """
    found = math.ceil(width * height / config.image_size**2)
    return found if config.cut_by == "area" else max(found, -(-max(height, width) // config.image_size))


class Planner:
    """The adaptive rule of one config, which keeps what it would look up or make again for every image."""

    def __init__(self, config: SlicingConfig) -> None:
        self.config = config
        self.area = config.image_size**2
        self.by_shape = config.cut_by == "shape"
        self.fit = _view_fitter(config)
        self.plan = lru_cache(maxsize=4096)(self._plan)
        self.overview = lru_cache(maxsize=4096)(self._overview)
        self.slices = lru_cache(maxsize=4096)(self._slices)
        self.fitted = lru_cache(maxsize=4096)(partial(fitted, config.patch_size, config.tokens_per_view))
        self.fits, self.cuts_all = config.latents == "fitted", config.one_view_below is None
        self.near: dict[int, tuple[list[float], list[tuple[int, int]], list[int]]] = {}  # under the config's own cap

    def grid(self, height: int, width: int, cap: int | None = None) -> tuple[int, int] | None:
        """The grid of the best :func:`grid_score` under a cap, the config's by default; ``None``: uncut.

        A misfit rises on either side of the image's aspect, so only the two aspects around it can be best.
        """
        cap = cap or self.config.max_slices
        ideal = ideal_slices(height, width, self.config) if self.by_shape else math.ceil(width * height / self.area)
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
        # an image that is cut by area has more than one view's, so that fitting never enlarges its overview
        canvas, tokens = self.overview(self.fit(height, width))
        if grid is None:
            canvases, separators = (canvas,), self.config.separators.per_image
        else:
            slices, more, separators = self.slices(grid, self.slice_hw(height, width, grid))
            canvases = (canvas, slices) if self.config.overview_first else (slices, canvas)
            tokens += more
        if self.fits:
            canvases, tokens = self.fitted(canvases)
        return SlicePlan((height, width), self.config.patch_size, canvases, grid, tokens, separators, self.config.name)

    def chosen(self, height: int, width: int, cap: int | None = None) -> SlicePlan:
        """The plan of the best grid under a cap, or of one view in its place."""
        grid, below = self.grid(height, width, cap), self.config.one_view_below
        if grid is not None and below is not None and max(height, width) <= below * min(height, width):
            return self.joined(height, width, grid)
        return self.build(height, width, grid)

    def joined(self, height: int, width: int, grid: tuple[int, int]) -> SlicePlan:
        """The image as one view in place of those of a grid, with B units (patches, or merged ones) in all.

        It is sized as any other, for an ``image_size`` of sqrt(B) units, and its longer side is shortened to at most B
        units. Its tokens are the :func:`uhd.slicing.latents.latent_grid` of those of all the views.
        """
        config, cells = self.config, math.prod(grid)
        slice_hw, overview_hw = self.slice_hw(height, width, grid), self.fit(height, width)
        units = (cells * slice_hw[0] * slice_hw[1] + overview_hw[0] * overview_hw[1]) // config.unit**2
        view_hw = _view_fitter(config, units)(height, width)
        canvas = self.overview(view_hw)[0]
        if config.tokens_per_view is not None:
            patches_hw = (view_hw[0] // config.patch_size, view_hw[1] // config.patch_size)
            canvas = with_latents(canvas, latent_grid((cells + 1) * config.tokens_per_view, patches_hw))
        counts = canvas.tokens_per_view, config.separators.per_image
        return SlicePlan((height, width), config.patch_size, (canvas,), None, *counts, config.name)

    def within_budget(self, height: int, width: int) -> tuple[SlicePlan, int]:
        """The plan under the largest cap that keeps ``max_tokens``, and that cap (0: the overview alone)."""
        config = self.config
        if config.max_tokens is None:
            return self.plan(height, width), config.max_slices
        for cap in range(config.budget_cap, 0, -1):
            found = self.chosen(height, width, cap)
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
        return self.build(height, width, self.grid(height, width)) if self.cuts_all else self.chosen(height, width)

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


def _view_fitter(config: SlicingConfig, most: int | None = None) -> Callable[[int, int], tuple[int, int]]:
    """``fit(height, width)``: size of a view, px: the encoder's pixel budget at the content's aspect.

    ``most``: units that a view has at most, in place of the config's budget.

    The order of operations decides the last bits. Source: thunlp/LLaVA-UHD, llava/slice_process.py
    ``find_best_resize`` with upscaling (released); the first release's ``adapt_size`` (march2024).
    """
    unit, side, budget, clamp = config.unit, config.image_size, config.view_budget, config.clamp
    if most is not None:
        side, budget, clamp = math.sqrt(most) * unit, most, True
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


class WorstCase(NamedTuple):
    """Upper bounds: views an image, ViT patches a view and an image, tokens an image; and a costly image.

    ``image_hw`` is the costliest of the images shaped like a grid of the largest slice count. With one number of
    tokens for all views and no ``max_tokens`` it reaches ``num_views`` and ``num_tokens``, else it may stay far below.
    """

    num_views: int
    view_patches: int
    num_patches: int
    num_tokens: int
    image_hw: tuple[int, int]


def worst_case(config: SlicingConfig, *, max_aspect: float = 200.0) -> WorstCase:
    """Bounds that no image of an aspect up to ``max_aspect`` (either way) exceeds.

    With ``clamp`` or ``march2024`` they hold for every image; else a view of a side below one patch grows with the
    aspect.

    Raises:
        ValueError: ``max_aspect`` < 1, or ``max_tokens`` lies below the overview's cost.

    >>> tuple(worst_case(PRESETS["llava-uhd-safe"]))
    (8, 576, 4608, 519, (2352, 336))
    """
    if max_aspect < 1:
        raise ValueError(f"max_aspect is longer side / shorter side, so at least 1; got {max_aspect}")
    slices = config.most_slices if config.most_slices > 1 else 0
    between_moved = config.view_budget if config.border_moves and slices else 0
    units = max(_view_units(config, max_aspect), between_moved)
    view_tokens = config.tokens_per_view or units
    if config.max_tokens is not None and config.one_view_below is None:
        slices = min(slices, max(config.max_tokens // config.least_tokens - 1, 0))  # and the overview
    views = slices + 1
    grids = [None] if not slices else [(slices, 1), (1, slices)]
    tokens = views * view_tokens + max(config.separators.count(grid) for grid in grids)
    if config.max_tokens is not None:
        tokens = min(tokens, config.max_tokens)
    patches = views * units * config.merge**2
    view_patches = patches // views if config.one_view_below is None else patches
    if config.tokens_per_view is None and config.max_tokens is not None:
        patches = min(patches, config.max_tokens * config.merge**2)
        view_patches = min(view_patches, patches)
    return WorstCase(views, view_patches, patches, tokens, _costliest(config).image_hw)


def _view_units(config: SlicingConfig, max_aspect: float) -> int:
    """Most units (merged patches) of one view: over every height a view can be given before rounding."""
    if config.clamp or config.rule == "march2024":
        return config.view_budget
    side, unit = config.image_size, config.unit
    # flooring a cell to whole px can double its aspect
    tallest = int(side * math.sqrt(2 * max_aspect)) + 1
    heights = range(max(int(side / math.sqrt(2 * max_aspect)), 1), tallest + 1)
    return max(
        to_multiple(h, unit, config.rounding) * to_multiple(side * side // h, unit, config.rounding) // unit**2
        for h in heights
    )


def _costliest(config: SlicingConfig) -> SlicePlan:
    side, most = config.image_size, config.most_slices
    shapes = considered_grids((side * most, side), config, config.max_slices) or ((1, 1),)
    sizes = [(rows * side, cols * side) for rows, cols in shapes]
    plans = [planner_of(config).plan(*size) for size in sizes if max(size) <= MAX_SIDE]
    return max(plans, key=lambda found: (found.num_tokens, found.num_patches))
