"""What the settings of every rule share: how they count separators, and the bounds of their numbers."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from uhd.moved import moved


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


__getattr__ = moved(__name__, dict.fromkeys(("DEFAULT", "PRESETS", "SlicingConfig"), "uhd.slicing.adaptive"))
