"""The adaptive planner over arrays of sizes: the same numbers as :func:`uhd.slicing.plan`, thousands at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from uhd.slicing.config import SlicingConfig
from uhd.slicing.plan import MAX_SIDE, considered_grids, grid_score, plan, resolve

# np.log and math.log may differ in the last bit; grids closer than this are decided by the scalar rule
_TIE = 1e-9


def plan_many(
    sizes_hw: np.ndarray | Sequence[Sequence[int]],
    config: SlicingConfig | str | None = None,
    *,
    max_tokens: int | None = None,
) -> dict[str, np.ndarray]:
    """Plan M images at once, exactly as :func:`uhd.slicing.plan` does one by one.

    Args:
        sizes_hw: (M, 2) ints, (height, width) in px.
        config, max_tokens: As in :func:`uhd.slicing.plan`.

    Returns:
        int64 columns: ``grid`` (M, 2), (0, 0) where an image is not cut; ``slice_hw`` (M, 2), (0, 0) likewise;
        ``overview_hw`` (M, 2); ``num_views``, ``num_patches``, ``num_tokens`` (M,).

    Raises:
        ValueError: Not an (M, 2) integer array, a side outside 1..1,000,000, or an overview that costs more than
            ``max_tokens``.
    """
    config = resolve(config, max_tokens)
    sizes = _check_sizes(sizes_hw)
    columns = _columns(sizes, _choose_grids(sizes, config, config.max_slices), config)
    if config.max_tokens is None:
        return columns
    for cap in range(config.budget_cap, -1, -1):
        over = np.flatnonzero(columns["num_tokens"] > config.max_tokens)
        if not len(over):
            return columns
        grid = _choose_grids(sizes[over], config, cap) if cap else np.zeros((len(over), 2), np.int64)
        for name, values in _columns(sizes[over], grid, config).items():
            columns[name][over] = values
    for row in np.flatnonzero(columns["num_tokens"] > config.max_tokens):
        plan(tuple(sizes[row].tolist()), config)  # raises, naming the size and its cost
    return columns


def _check_sizes(sizes_hw: np.ndarray | Sequence[Sequence[int]]) -> np.ndarray:
    try:
        sizes = np.asarray(sizes_hw)
    except ValueError:
        raise ValueError(
            "sizes_hw must be an (M, 2) array of ints (height, width), got rows of other lengths"
        ) from None
    if sizes.size == 0 and sizes.shape in ((0,), (0, 2)):
        return np.zeros((0, 2), np.int64)
    if sizes.ndim != 2 or sizes.shape[1] != 2 or sizes.dtype.kind not in "iu":
        raise ValueError(
            f"sizes_hw must be an (M, 2) array of ints (height, width), got shape {sizes.shape}, dtype {sizes.dtype}"
        )
    bad = np.flatnonzero(((sizes < 1) | (sizes > MAX_SIDE)).any(axis=1))
    if len(bad):
        height, width = sizes[bad[0]].tolist()
        raise ValueError(
            f"row {bad[0]}: got height {height} and width {width}; each must lie in 1..{MAX_SIDE} px "
            f"({len(bad)} of {len(sizes)} rows are outside)"
        )
    return sizes.astype(np.int64)


def _choose_grids(sizes: np.ndarray, config: SlicingConfig, cap: int) -> np.ndarray:
    height, width = sizes.T
    chosen = np.zeros((len(sizes), 2), np.int64)
    ideal = np.minimum(np.ceil(width * height / config.image_size**2).astype(np.int64), cap)
    aspect = np.log(width / height)
    for count in np.unique(ideal).tolist():
        rows = np.flatnonzero(ideal == count)
        grids = considered_grids(tuple(sizes[rows[0]].tolist()), config, cap)
        if not grids:
            continue
        misfit = np.abs(aspect[rows, None] - np.array([math.log(cols / rows_) for rows_, cols in grids]))
        best = misfit.argmin(axis=1)
        lowest = misfit[np.arange(len(rows)), best]
        for row in np.flatnonzero((misfit <= lowest[:, None] + _TIE).sum(axis=1) > 1):
            image_hw = tuple(sizes[rows[row]].tolist())
            best[row] = max(range(len(grids)), key=lambda i: grid_score(image_hw, grids[i]))
        chosen[rows] = np.array(grids)[best]
    chosen[(chosen == 1).all(axis=1)] = 0
    return chosen


def _columns(sizes: np.ndarray, grid: np.ndarray, config: SlicingConfig) -> dict[str, np.ndarray]:
    cut = grid[:, 0] > 0
    overview = _fit_views(sizes, config, upscale=~cut)
    slices = np.zeros_like(sizes)
    if config.rule == "march2024":
        cells = np.maximum(sizes[cut] // grid[cut], 1)
    else:
        cells = _to_multiples(sizes[cut], grid[cut], config.rounding) // grid[cut]
    slices[cut] = _fit_views(cells, config, upscale=np.ones(len(cells), bool))
    count = grid.prod(axis=1)
    rule, unit = config.separators, config.unit
    overview_units, slice_units = (overview // unit).prod(axis=1), (slices // unit).prod(axis=1)
    if config.tokens_per_view is None:
        tokens = overview_units + count * slice_units
    else:
        tokens = (count + 1) * config.tokens_per_view
    separators = rule.per_image + cut * (rule.per_cut + rule.per_slice * count + rule.per_row * grid[:, 0])
    return {
        "grid": grid,
        "slice_hw": slices,
        "overview_hw": overview,
        "num_views": count + 1,
        "num_patches": (overview_units + count * slice_units) * config.merge**2,
        "num_tokens": tokens + separators,
    }


def _fit_views(sizes: np.ndarray, config: SlicingConfig, *, upscale: np.ndarray) -> np.ndarray:
    """:func:`uhd.slicing.plan.fit_view` on (M, 2) sizes, in the same order of float64 operations."""
    unit, side, budget = config.unit, config.image_size, config.view_budget
    height, width = sizes.T
    if config.rule == "march2024":
        scale = np.sqrt(budget * (unit / height) * (unit / width))
        steps = np.floor(scale[:, None] * sizes / unit).astype(np.int64)
        fitted = np.clip(steps, 1, budget) * unit
    else:
        aspect = width / height
        fit_height = (side / np.sqrt(aspect)).astype(np.int64)
        fit = np.stack([fit_height, (fit_height * aspect).astype(np.int64)], axis=1)
        resize = upscale | (width * height > side * side)
        fitted = _to_multiples(np.where(resize[:, None], fit, sizes), unit, config.rounding)
    if config.clamp:
        over = np.flatnonzero((fitted // unit).prod(axis=1) > budget)
        longer = fitted[over].argmax(axis=1)  # the first of equals: height, as in the scalar rule
        fitted[over, longer] = budget // (fitted[over, 1 - longer] // unit) * unit
    return fitted


def _to_multiples(lengths: np.ndarray, units: np.ndarray | int, rounding: str) -> np.ndarray:
    steps = lengths // units if rounding == "floor" else np.rint(lengths / units).astype(np.int64)
    return np.maximum(steps, 1) * units
