"""Which grids are compared for an image, and how well each fits: plain numbers, no settings."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple


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

    ``view_hw`` is the size that the encoder was trained on. Any unit will do; numbers that are not positive raise a
    ``ValueError``. Source: LLaVA-UHD (arXiv 2403.11703) section 3.1; thunlp/LLaVA-UHD, llava/slice_process.py.

    >>> grid_score((1008, 672), (3, 2))
    0.0
    >>> round(grid_score((1008, 672), (2, 3)), 3)
    -0.811
    """
    if min(*image_hw, *grid, *view_hw) <= 0:
        raise ValueError(f"sizes and grids are positive, got image_hw={image_hw}, grid={grid}, view_hw={view_hw}")
    cell_aspect = math.log(image_hw[1] / image_hw[0]) - math.log(grid[1] / grid[0])
    return 0.0 - abs(cell_aspect - math.log(view_hw[1] / view_hw[0]))


@lru_cache(maxsize=1024)
def grids_near(ideal: int, rule: str, cap: int) -> tuple[tuple[int, int], ...]:
    """The grids compared for an image whose area is that of ``ideal`` views, or of more than ``cap``.

    >>> grids_near(4, "released", 7)
    ((3, 1), (1, 3), (4, 1), (2, 2), (1, 4), (5, 1), (1, 5))
    """
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


def to_multiple(length: int, unit: int, rounding: str) -> int:
    """``length`` floored or rounded (half to even) to a multiple of ``unit``, and at least one ``unit``.

    >>> to_multiple(350, 14, "floor"), to_multiple(5, 14, "floor")
    (350, 14)
    """
    steps = length // unit if rounding == "floor" else round(length / unit)
    return max(steps, 1) * unit
