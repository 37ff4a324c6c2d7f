"""What every rule has in common: one kind of object says how images are cut, and how separators are counted."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from uhd.moved import moved
from uhd.settings import Settings
from uhd.slicing.grids import Candidate
from uhd.slicing.plan import SlicePlan, check_size

Rule = Callable[[tuple[int, int]], SlicePlan]
"""A function of your own: (height, width) in px -> plan."""

OWN = "custom"
"""What the dictionary of such a function has in place of a rule's name."""

REGISTERED = "registered"
"""The same where it is registered, so that its name stands for it."""

MAX_VIEWS = 65_536
"""Most views of one image: a plan lists every one, so rules are stopped here."""


def positive_int(key: str, value: Any) -> int | None:
    """A count of at least 1, or ``None`` where that is no bound; else a ``ValueError`` that names the setting."""
    optional = key in ("tokens_per_view", "max_tokens", "budget")
    if value is None and optional:
        return None
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if isinstance(value, bool) or number < 1:
        hint = "; 1 never cuts" if key == "max_slices" else ""
        raise ValueError(f"{key} must be a positive int{' or None' if optional else ''}, got {value!r}{hint}")
    return number


def aspect_or_none(key: str, value: Any) -> float | None:
    """A ratio of sides, longer to shorter, or ``None``; else a ``ValueError`` that names the setting."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 1 <= value < math.inf:
        raise ValueError(f"{key} is longer side / shorter side, a number from 1, or None; got {value!r}")
    return float(value)


@dataclass(frozen=True)
class SeparatorCount(Settings):
    """How many separators and marks a layout adds, so that a plan counts tokens without ``uhd.schema``.

    An uncut image has ``per_image`` of them, a cut one ``per_image + per_cut + per_slice * slices + per_row * rows``.
    """

    per_image: int = 0
    per_cut: int = 0
    per_slice: int = 0
    per_row: int = 0

    def count(self, grid: tuple[int, int] | None) -> int:
        """Positions for a ``(rows, columns)`` grid, or for an uncut image (``None``).

        >>> SeparatorCount(per_slice=1).count((3, 2)), SeparatorCount(per_slice=1).count(None)
        (6, 0)
        """
        return self.per_image + (0 if grid is None else self.of_cut(*grid))

    def of_cut(self, rows: Any, cols: Any) -> Any:
        """What a cut adds to ``per_image``: for numbers, or for arrays of them."""
        return self.per_cut + self.per_slice * rows * cols + self.per_row * rows


class Slicing(Settings):
    """How images are cut: what the settings of every rule have in common, and a function of your own.

    Frozen and hashable. Call one with (height, width) in px, or pass it wherever a strategy goes.
    """

    name: str  # what its plans say that made them
    patch_size: int | None = None  # side of a ViT patch, px; None where only its plans tell
    view_side: int | None = None  # side of the square that its views are made for, px; None where it sets none
    least_view: tuple[int, int] | None = None  # (rows, columns) of its smallest view, in patches; None: unknown
    uses_schema: bool = False  # whether it counts a schema's separators itself; for others uhd.schema.counted does
    learned: tuple[str, ...] = ()  # embeddings that its plans' packings may need: "newline", "separator"
    fits_latents: bool = False  # whether its plans ask for latents in grids of their own, see uhd.slicing.latents
    border_moves: int = 0  # patches that its borders may move by once there are pixels, see uhd.slicing.borders
    nested: bool = False  # whether a view that it counts fewer tokens for takes a resampler's first latents only

    def plan(self, image_hw: tuple[int, int]) -> SlicePlan:
        """Plan an image of this (height, width), px; a ``ValueError`` where it is no size, or the rule refuses it."""
        raise NotImplementedError

    def __call__(self, image_hw: tuple[int, int]) -> SlicePlan:
        return self.plan(image_hw)

    def candidates(self, image_hw: tuple[int, int]) -> tuple[Candidate, ...]:
        """The grids that it compares for this image, best first; ``()`` where it cuts nothing or scores no grids."""
        return ()

    def within(self, max_tokens: int) -> Slicing:
        """The same rule with a bound on ``plan.num_tokens``, which only the adaptive planner has."""
        raise ValueError(
            f"max_tokens bounds the adaptive planner only, not {self.name!r}: change the strategy's own settings, "
            "e.g. its number of tiles"
        )

    def capped(self, max_slices: int) -> Slicing | None:
        """The same rule with at most ``max_slices`` slices; ``None`` where its settings do not say how."""
        return None

    def uncut(self) -> Slicing:
        """The same rule, each image as its :meth:`single_view`."""
        return OwnRule(self.single_view)

    def for_vision(self, *, image_size: int | None, patch_size: int) -> Slicing:
        """The same rule for another vision encoder; ``None`` keeps the size of the views. Your own function stays."""
        return self

    def for_images(self, num_images: int) -> Slicing:
        """What it plans each of several images of one sample by: itself where it has no such mode."""
        return self

    def for_video(self) -> Slicing | None:
        """What it plans the frames of a video by; ``None`` where it has no such mode."""
        return None

    def single_view(self, image_hw: tuple[int, int]) -> SlicePlan:
        """The plan of its only view, else of its overview alone; a ``ValueError`` where it has neither."""
        found = self.plan(image_hw)
        alone = found if found.num_views == 1 else self.overview_of(found)
        if alone is None:
            raise ValueError(
                f"{found.strategy!r} cuts a {image_hw[0]}x{image_hw[1]} px image (height x width) and has no "
                'overview, so there is no single view: use frames="rule"'
            )
        return alone

    def overview_of(self, plan: SlicePlan) -> SlicePlan | None:
        """One of its plans without the slices; ``None`` where there is no overview."""
        return plan.overview_alone()

    def slices_of(self, plan: SlicePlan) -> int:
        """How many slices one of its plans has, or its one view stands in the place of."""
        return sum(len(canvas.tiles) for canvas in plan.canvases if canvas.kind == "slice")


@dataclass(frozen=True)
class OwnRule(Slicing):
    """A function of your own from (height, width) to a plan; it is not written to JSON, only its name is.

    Attributes:
        function: It.
        registered: The name that :func:`uhd.register_strategy` gave it, by which it is found again.
    """

    function: Rule
    registered: str | None = None

    @property
    def name(self) -> str:
        if self.registered is not None:
            return self.registered
        function = getattr(self.function, "func", self.function)  # of a partial
        return getattr(self.function, "name", None) or getattr(function, "__name__", type(self.function).__name__)

    def plan(self, image_hw: tuple[int, int]) -> SlicePlan:
        image_hw = check_size(image_hw)
        found = self.function(image_hw)
        if not isinstance(found, SlicePlan):
            raise TypeError(f"{self.name!r} must return a SlicePlan for (height, width), got {type(found).__name__}")
        if found.image_hw != image_hw:
            raise ValueError(f"asked to plan a {image_hw} image, {found.strategy!r} planned one of {found.image_hw}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """That it is a function, and its name."""
        return {"rule": OWN if self.registered is None else REGISTERED, "name": self.name}


class Recounted(Slicing):
    """The cuts of another ``rule``, with tokens and separators as :meth:`fit` counts them."""

    rule: Slicing

    def fit(self, plan: SlicePlan) -> SlicePlan:
        """A plan of the rule, counted anew."""
        raise NotImplementedError

    name = property(attrgetter("rule.name"))
    patch_size = property(attrgetter("rule.patch_size"))
    view_side = property(attrgetter("rule.view_side"))
    learned = property(attrgetter("rule.learned"))
    fits_latents = property(attrgetter("rule.fits_latents"))
    nested = property(attrgetter("rule.nested"))

    def plan(self, image_hw: tuple[int, int]) -> SlicePlan:
        return self.fit(self.rule.plan(image_hw))

    def single_view(self, image_hw: tuple[int, int]) -> SlicePlan:
        return self.fit(self.rule.single_view(image_hw))

    def overview_of(self, plan: SlicePlan) -> SlicePlan | None:
        alone = self.rule.overview_of(plan)
        return None if alone is None else self.fit(alone)

    def slices_of(self, plan: SlicePlan) -> int:
        return self.rule.slices_of(plan)

    def capped(self, max_slices: int) -> Slicing | None:
        return self._around(self.rule.capped(max_slices))

    def uncut(self) -> Slicing:
        return self._around(self.rule.uncut())

    def for_vision(self, *, image_size: int | None, patch_size: int) -> Slicing:
        return self._around(self.rule.for_vision(image_size=image_size, patch_size=patch_size))

    def for_images(self, num_images: int) -> Slicing:
        return self._around(self.rule.for_images(num_images))

    def for_video(self) -> Slicing | None:
        return self._around(self.rule.for_video())

    def _around(self, rule: Slicing | None) -> Slicing | None:
        return None if rule is None else self.replace(rule=rule)


__getattr__ = moved(
    __name__, {**dict.fromkeys(("PRESETS", "SlicingConfig"), "uhd.slicing"), "DEFAULT": "uhd.slicing.adaptive"}
)
