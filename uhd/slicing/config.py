"""What the adaptive planner needs to know: the size of a view, the cap on slices, the rounding, the token count."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uhd.slicing.bounds import WorstCase


@dataclass(frozen=True)
class SeparatorCount:
    """How many separator and marker positions a layout adds, as a rule on the grid.

    ``uhd.schema`` decides which symbols go where; this is only their number, so that a plan can count tokens alone.
    An uncut image has ``per_image`` of them, a cut one ``per_image + per_cut + per_slice * slices + per_row * rows``.
    """

    per_image: int = 0
    per_cut: int = 0
    per_slice: int = 0
    per_row: int = 0

    def count(self, grid: tuple[int, int] | None) -> int:
        """Positions for a ``(rows, columns)`` grid, or for an uncut image (``None``)."""
        if grid is None:
            return self.per_image
        rows, cols = grid
        return self.per_image + self.per_cut + self.per_slice * rows * cols + self.per_row * rows


MAX_VIEWS = 65_536
"""Most views of one image: a plan lists every one, so rules are stopped here."""


@dataclass(frozen=True)
class SlicingConfig:
    """Settings of the adaptive (LLaVA-UHD) planner. Frozen and hashable; change one with :meth:`replace`.

    Attributes:
        name: The preset this came from; carried into every plan.
        image_size: Side S of the square the vision encoder was trained on, px. S*S is a view's pixel budget.
        patch_size: Side of a ViT patch, px.
        merge: Patches joined per side before the language model sees them; view sides are multiples of
            ``patch_size * merge``. 1 where a resampler gives every view the same number of tokens.
        max_slices: Cap on the number of slices, the overview not counted. Any number; 1 never cuts under the released
            rule.
        rounding: ``"floor"`` (LLaVA-UHD) or ``"round"`` (MiniCPM-V; half to even): how a side becomes a multiple.
        rule: ``"released"``: N - 1, N or N + 1 slices, never 1, never above the cap, no cut where N <= 1.
            ``"march2024"``: the first release; the cap limits N alone, so N + 1 = cap + 1 slices can be chosen, and an
            image of one view's area may be cut in two.
        clamp: Bound every view by ``image_size**2 // (patch_size * merge)**2`` patches (or merged patches) by
            shortening its longer side. With ``rounding="floor"`` that changes only views whose shorter side is below
            one patch; with ``"round"`` also those that rounding made too large.
        overview_first: The overview is fed and laid out before the slices.
        tokens_per_view: Tokens of every view, or ``None``: a view gives ``patches / merge**2`` tokens.
        separators: How many separator positions the layout adds.
        max_tokens: Upper bound on ``plan.num_tokens``; the planner lowers the number of slices to meet it.

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
        if self.rounding not in ("floor", "round"):
            raise ValueError(f"rounding must be 'floor' or 'round', got {self.rounding!r}")
        if self.rule not in ("released", "march2024"):
            raise ValueError(f"rule must be 'released' or 'march2024', got {self.rule!r}")
        if self.rule == "march2024" and (self.merge != 1 or self.rounding != "floor"):
            raise ValueError(
                "rule 'march2024' sizes views by its own floor rule: it needs merge=1 and rounding='floor'"
            )
        if self.image_size < self.unit:
            raise ValueError(f"image_size {self.image_size} px is smaller than patch_size * merge = {self.unit} px")

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
        """No plan within ``max_tokens`` has more slices: the cap, or fewer, as every view has at least one token."""
        if self.max_tokens is None:
            return self.max_slices
        return min(self.max_slices, self.max_tokens // (self.tokens_per_view or 1))

    @property
    def most_slices(self) -> int:
        """The largest number of slices the rule can choose: the cap, or one more for ``march2024``."""
        return self.max_slices + (self.rule == "march2024")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SlicingConfig:
        """A named preset, e.g. ``"llava-uhd"``; dashes and underscores are the same. ``changes`` override its fields.

        Raises:
            ValueError: No such preset; the message lists the nearest names and all of them.
        """
        found = PRESETS.get(name.lower().replace("_", "-")) if isinstance(name, str) else None
        if found is None:
            near = difflib.get_close_matches(str(name).lower().replace("_", "-"), PRESETS, n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise ValueError(f"no slicing preset named {name!r}: {hint}There are: {', '.join(PRESETS)}")
        return replace(found, **changes) if changes else found

    def replace(self, **changes: Any) -> SlicingConfig:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def for_vision(self, *, image_size: int, patch_size: int) -> SlicingConfig:
        """The same rule for another backbone, e.g. SigLIP's ``image_size=384, patch_size=14``."""
        return replace(self, image_size=image_size, patch_size=patch_size)

    def worst_case(self, *, max_aspect: float = 200.0) -> WorstCase:
        """Upper bounds over images of an aspect up to ``max_aspect``; see :func:`uhd.slicing.bounds.worst_case`."""
        from uhd.slicing.bounds import worst_case

        return worst_case(self, max_aspect=max_aspect)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SlicingConfig:
        """The inverse of :meth:`to_dict`; an unknown key raises ``ValueError``."""
        unknown = sorted(set(data) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown slicing settings {unknown}; known are {[f.name for f in fields(cls)]}")
        known = dict(data)
        if isinstance(known.get("separators"), Mapping):
            known["separators"] = SeparatorCount(**known["separators"])
        return cls(**known)


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


_MARKERS = SeparatorCount(per_image=5, per_cut=-1, per_slice=2, per_row=1)  # MiniCPM-V 2.6: id, <image>, <slice>, "\n"
_MINICPM = SlicingConfig(
    name="minicpm-v",
    image_size=448,
    max_slices=9,
    rounding="round",
    overview_first=True,
    separators=_MARKERS,
)

PRESETS: dict[str, SlicingConfig] = {
    config.name: config
    for config in (
        SlicingConfig(name="llava-uhd"),
        SlicingConfig(name="llava-uhd-safe", clamp=True),
        SlicingConfig(
            name="llava-uhd-paper",
            max_slices=6,
            rule="march2024",
            separators=SeparatorCount(per_slice=1, per_cut=-1),
        ),
        _MINICPM,
        replace(_MINICPM, name="minicpm-v-4.6", merge=4, tokens_per_view=None),
        replace(_MINICPM, name="minicpm-v-4.6-4x", merge=2, tokens_per_view=None),
    )
}
DEFAULT = PRESETS["llava-uhd-safe"]
