"""Many sizes at once: the same numbers as :func:`uhd.slicing.plan`; by the adaptive planner over whole arrays.

The choice of a grid and the size of a view stand here once more, for arrays, beside those of
:mod:`uhd.slicing.adaptive` for numbers: for one image the arrays take 39 and 15 microseconds, the numbers 0.7 each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from uhd.slicing.adaptive import SlicingConfig, planner_of
from uhd.slicing.config import Slicing
from uhd.slicing.grids import aspects_near
from uhd.slicing.latents import latent_grid, shared_latents
from uhd.slicing.plan import MAX_SIDE, SlicePlan
from uhd.slicing.rules import SlicingLike, find

# np.log and math.log may differ in the last bit; grids closer than this are decided by the scalar rule
_TIE = 1e-9

_APART = 32.0
"""More than twice any ln(width / height)."""

_BLOCK = 4096
"""Rows planned together: their columns stay in the cache, and are small enough for memory to be used again."""


def plan_many(
    sizes_hw: np.ndarray | Sequence[Sequence[int]], config: SlicingLike | None = None, *, max_tokens: int | None = None
) -> dict[str, np.ndarray]:
    """Plan M images exactly as :func:`uhd.slicing.plan` does: by the adaptive planner thousands at a time.

    Args:
        sizes_hw: (M, 2) ints, (height, width) in px.
        config, max_tokens: As in :func:`uhd.slicing.plan`.

    Returns:
        int64 columns: ``grid`` (M, 2), (0, 0) where an image is not cut; ``slice_hw`` (M, 2), (0, 0) likewise;
        ``overview_hw`` (M, 2), (0, 0) where there is none; ``num_views``, ``num_patches``, ``num_tokens`` (M,).

    Raises:
        ValueError: Not an (M, 2) integer array, a side outside 1..1,000,000, a size that the rule refuses, or an
            overview that costs more than ``max_tokens``.

    >>> columns = plan_many([(1008, 672), (300, 400)])
    >>> columns["grid"].tolist(), columns["num_tokens"].tolist()
    ([[3, 2], [1, 2]], [454, 194])
    """
    config = find(config)
    if max_tokens is not None:
        config = config.within(max_tokens)
    sizes = _check_sizes(sizes_hw)
    if not isinstance(config, SlicingConfig):
        return _one_by_one(sizes, config)
    blocks = [_plan_block(sizes[start : start + _BLOCK], config) for start in range(0, len(sizes) or 1, _BLOCK)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _one_by_one(sizes: np.ndarray, slicing: Slicing) -> dict[str, np.ndarray]:
    plans: dict[tuple[int, int], SlicePlan] = {}
    for row, size_hw in enumerate(map(tuple, sizes.tolist())):
        try:
            plans[size_hw] = plans.get(size_hw) or slicing.plan(size_hw)
        except ValueError as problem:
            raise ValueError(f"row {row}: {problem}") from problem
    found = [plans[size_hw] for size_hw in map(tuple, sizes.tolist())]
    pairs, counts = ("grid", "slice_hw", "overview_hw"), ("num_views", "num_patches", "num_tokens")
    return {
        **{n: np.array([getattr(plan, n) or (0, 0) for plan in found], np.int64).reshape(-1, 2) for n in pairs},
        **{n: np.array([getattr(plan, n) for plan in found], np.int64) for n in counts},
    }


def _plan_block(sizes: np.ndarray, config: SlicingConfig) -> dict[str, np.ndarray]:
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
        planner_of(config).plan(*sizes[row].tolist())  # raises, naming the size and its cost
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
    if sizes.min() < 1 or sizes.max() > MAX_SIDE:
        bad = np.flatnonzero(((sizes < 1) | (sizes > MAX_SIDE)).any(axis=1))
        height, width = sizes[bad[0]].tolist()
        raise ValueError(
            f"row {bad[0]}: got height {height} and width {width}; each must lie in 1..{MAX_SIDE} px "
            f"({len(bad)} of {len(sizes)} rows are outside)"
        )
    return sizes.astype(np.int64)


def _choose_grids(sizes: np.ndarray, config: SlicingConfig, cap: int) -> np.ndarray:
    height, width = _split(sizes)
    ideal = np.ceil(width * height / config.image_size**2).astype(np.int64)
    if config.cut_by == "shape":
        ideal = np.maximum(ideal, -(-np.maximum(height, width) // config.image_size))
    ideal = np.minimum(ideal, cap)
    present = np.bincount(ideal) > 0
    keys, logs, rows, cols = _tables(tuple(np.flatnonzero(present).tolist()), config.rule, cap)
    aspect = np.log(width / height)
    # a misfit rises on either side of the aspect: one of the two grids around it is the best
    at = np.searchsorted(keys, aspect + (_APART * np.cumsum(present) - _APART)[ideal])
    below, above = aspect - logs[at - 1], logs[at] - aspect
    best = at - (below < above)
    chosen = np.stack([rows[best], cols[best]], axis=1)
    for row in np.flatnonzero(np.abs(below - above) <= _TIE).tolist():
        chosen[row] = planner_of(config).grid(*sizes[row].tolist(), cap) or (0, 0)
    return chosen


@lru_cache(maxsize=256)
def _tables(counts: tuple[int, ...], rule: str, cap: int) -> tuple[np.ndarray, ...]:
    """Rising keys, aspects, rows and columns of the grids near each of these counts, each between two infinities.

    The keys are the aspects moved by ``_APART`` from one count to the next.
    """
    keys, logs, grids = [], [], []
    for place, count in enumerate(counts):
        aspects, shapes, _ = aspects_near(count, rule, cap)
        aspects, shapes = aspects or [0.0], shapes or [(1, 1)]
        keys += [_APART * place + key for key in (-_APART / 2, *aspects, _APART / 2)]
        logs += [-np.inf, *aspects, np.inf]
        grids += [(0, 0), *((0, 0) if shape == (1, 1) else shape for shape in shapes), (0, 0)]
    rows, cols = np.array(grids, np.int64).reshape(-1, 2).T
    return np.array(keys), np.array(logs), np.ascontiguousarray(rows), np.ascontiguousarray(cols)


def _split(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The columns of (M, 2), each contiguous, which is several times faster."""
    return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])


def _columns(sizes: np.ndarray, grid: np.ndarray, config: SlicingConfig) -> dict[str, np.ndarray]:
    columns = _cut_columns(sizes, grid, config)
    if config.latents == "fitted":
        columns["num_tokens"] += _fitted_tokens(columns, config) - columns["num_views"] * config.tokens_per_view
    if config.one_view_below is not None:
        shorter, longer = np.sort(sizes, axis=1).T
        joined = np.flatnonzero((grid[:, 0] > 0) & (longer <= config.one_view_below * shorter))
        for name, values in _joined_columns(sizes[joined], columns, joined, config).items():
            columns[name][joined] = values
    return columns


def _fitted_tokens(columns: dict[str, np.ndarray], config: SlicingConfig) -> np.ndarray:
    """Visual tokens of all views by :func:`uhd.slicing.latents.shared_latents`, once for equal views."""
    views = [columns[name] // config.patch_size for name in ("slice_hw", "overview_hw")]
    rows, place = np.unique(np.column_stack([columns["num_views"], *views]), axis=0, return_inverse=True)
    found = []
    for count, *sides in rows.tolist():
        slice_hw, overview_hw = (tuple(sides[:2]), tuple(sides[2:]))
        grids = shared_latents(count * config.tokens_per_view, count - 1, slice_hw, overview_hw)
        found.append((count - 1) * math.prod(grids[0]) + math.prod(grids[1]))
    return np.array(found, np.int64)[place.reshape(-1)] if found else np.zeros(0, np.int64)


def _joined_columns(
    sizes: np.ndarray, columns: dict[str, np.ndarray], joined: np.ndarray, config: SlicingConfig
) -> dict[str, np.ndarray]:
    """What changes of these rows where they are one view: :meth:`uhd.slicing.adaptive.Planner.joined`."""
    budget = columns["num_patches"][joined] // config.merge**2
    units = np.stack(_fit_views(*_split(sizes), config, budget), axis=1)
    patches = units.prod(axis=1) * config.merge**2
    if config.tokens_per_view is None:
        tokens = units.prod(axis=1)
    else:
        asked = np.column_stack([columns["num_views"][joined] * config.tokens_per_view, units * config.merge])
        rows, place = np.unique(asked, axis=0, return_inverse=True)
        grids = [math.prod(latent_grid(most, tuple(view))) for most, *view in rows.tolist()]
        tokens = np.array(grids, np.int64)[place.reshape(-1)]
    return {
        "grid": 0,
        "slice_hw": 0,
        "overview_hw": units * config.unit,
        "num_views": 1,
        "num_patches": patches,
        "num_tokens": tokens + config.separators.per_image,
    }


def _cut_columns(sizes: np.ndarray, grid: np.ndarray, config: SlicingConfig) -> dict[str, np.ndarray]:
    (height, width), (rows, cols) = _split(sizes), _split(grid)
    cut = rows > 0
    overview = _fit_views(height, width, config)
    over = np.maximum(rows, 1), np.maximum(cols, 1)
    if config.rule == "march2024" or config.rounding == "floor":
        cells = (np.maximum(side // count, 1) for side, count in zip((height, width), over, strict=True))
    else:
        cells = (np.maximum(np.rint(side / count), 1) for side, count in zip((height, width), over, strict=True))
    slices = [np.where(cut, units, 0) for units in _fit_views(*cells, config)]
    count = rows * cols
    rule, unit = config.separators, config.unit
    overview_units, slice_units = overview[0] * overview[1], slices[0] * slices[1]
    units = overview_units + count * slice_units
    tokens = units if config.tokens_per_view is None else (count + 1) * config.tokens_per_view
    separators = rule.per_image + cut * rule.of_cut(rows, cols)
    return {
        "grid": grid,
        "slice_hw": np.stack(slices, axis=1) * unit,
        "overview_hw": np.stack(overview, axis=1) * unit,
        "num_views": count + 1,
        "num_patches": units * config.merge**2,
        "num_tokens": tokens + separators,
    }


def _fit_views(
    height: np.ndarray, width: np.ndarray, config: SlicingConfig, budget: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of views, in ``config.unit``, by the scalar planner's order of float64 operations.

    ``budget``: units of each that are not exceeded; ``None``: of the config's views.
    """
    unit, side, clamp = config.unit, config.image_size, config.clamp or budget is not None
    if budget is not None:
        side = np.sqrt(budget) * unit
    else:
        budget = config.view_budget
    if config.rule == "march2024":
        scale = np.sqrt(budget * (unit / height) * (unit / width))
        rows, cols = (np.floor(scale * length / unit).clip(1, budget).astype(np.int64) for length in (height, width))
    else:
        aspect = width / height
        fit = np.trunc(side / np.sqrt(aspect))
        steps = np.floor if config.rounding == "floor" else np.rint
        rows, cols = (np.maximum(steps(length / unit), 1).astype(np.int64) for length in (fit, np.trunc(fit * aspect)))
    if clamp:
        long, tall = rows * cols > budget, rows >= cols
        rows, cols = np.where(long & tall, budget // cols, rows), np.where(long & ~tall, budget // rows, cols)
    return rows, cols
