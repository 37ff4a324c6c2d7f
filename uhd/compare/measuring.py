"""Many sizes by many rules: every metric that is compared over a data set, as arrays over rules and sizes.

The adaptive planner's plans are measured as whole arrays, like :func:`uhd.slicing.plan_many` makes them; those of
other rules one by one. Both give the numbers of :func:`uhd.slicing.metrics.measure`.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from uhd.slicing import PRESETS, Slicing, SlicingConfig, SlicingLike, find, plan_many
from uhd.slicing.flops import LMS, VITS, compressor_flops, lm_flops, mlp_flops, named, vit_flops
from uhd.slicing.metrics import measure
from uhd.slicing.plan import MAX_SIDE, SlicePlan, check_size
from uhd.slicing.strategies import STRATEGIES

COLUMNS = (
    "tokens",
    "tflops",
    "resolution_kept",
    "padding",
    "seam",
    "distortion",
    "views",
    "patches",
    "rows",
    "columns",
)
"""Columns of :class:`Measured`: ``rows`` and ``columns`` of the cut, 0 without one; the others as in metrics."""


def all_rules() -> list[str]:
    """List every rule by its full name, aliases left out.

    >>> all_rules()[:3]
    ['llava-uhd', 'llava-uhd-safe', 'llava-uhd-paper']
    """
    return [*PRESETS, *STRATEGIES]


@dataclass(frozen=True, eq=False)  # arrays have no single answer
class Measured:
    """Every rule on every size.

    Attributes:
        rules: (name, rule), names all different.
        sizes_hw: (S, 2) different sizes, (height, width) in px.
        counts: (S,) how many images have each size.
        values: For each of :data:`COLUMNS` (R, S) float64, ``nan`` where a rule refuses a size.
        refusals: (rule's place, size's place) -> why.
    """

    rules: tuple[tuple[str, Slicing], ...]
    sizes_hw: np.ndarray
    counts: np.ndarray
    values: dict[str, np.ndarray]
    refusals: dict[tuple[int, int], str]

    @property
    def complete(self) -> np.ndarray:
        """(R,) whether a rule plans every size."""
        return ~np.isnan(self.values["tokens"]).any(axis=1)

    def mean(self, column: str) -> np.ndarray:
        """(R,) over images, those that a rule refuses left out; ``nan`` where it refuses all."""
        values = self.values[column]
        weights = np.where(np.isnan(values), 0, self.counts)
        with np.errstate(invalid="ignore"):
            return np.nansum(values * weights, axis=1) / weights.sum(axis=1)

    def quantile(self, column: str, share: float) -> np.ndarray:
        """(R,) the least value that ``share`` of the images do not exceed; ``nan`` where a rule refuses all."""
        return np.array([weighted_quantile(row, self.counts, share) for row in self.values[column]])


def weighted_quantile(values: np.ndarray, counts: np.ndarray, share: float) -> float:
    """The least of the values that ``share`` of all do not exceed; ``nan`` ones are left out.

    >>> weighted_quantile(np.array([3.0, 1.0, np.nan]), np.array([1, 9, 5]), 0.9)
    1.0
    """
    known = ~np.isnan(values)
    if not known.any():
        return math.nan
    order = np.argsort(values[known], kind="stable")
    total = np.cumsum(counts[known][order])
    return float(values[known][order][np.searchsorted(total, share * total[-1] - 1e-9)])


def measure_sizes(
    sizes_hw: Iterable[tuple[int, int]], rules: Iterable[SlicingLike] | None = None, **system: Any
) -> Measured:
    """Measure every rule on every image's size; equal sizes are measured once.

    Args:
        sizes_hw: (height, width) of each image, px.
        rules: Names, settings, or your own functions; ``None`` is every rule. Of equal names the second becomes
            ``"name (2)"``.
        system: ``vit``, ``resampler`` and ``lm`` of :func:`uhd.slicing.metrics.measure`.

    Raises:
        ValueError: No sizes, one that is none, no rules, or an unknown name.
        TypeError: ``rules`` is one name rather than a list.

    >>> found = measure_sizes([(1008, 672), (300, 400), (300, 400)], ["llava-uhd", "llava-1.5"])
    >>> found.counts.tolist(), found.values["tokens"].tolist()
    ([1, 2], [[454.0, 194.0], [576.0, 576.0]])
    """
    chosen = chosen_rules(rules)
    numbers: dict[tuple[int, int], int] = {}
    for size in map(check_size, sizes_hw):
        numbers[size] = numbers.get(size, 0) + 1
    if not numbers:
        raise ValueError("nothing to compare: give at least one image or size")
    sizes = np.array(list(numbers), np.int64)
    values = {name: np.full((len(chosen), len(sizes)), math.nan) for name in COLUMNS}
    refusals: dict[tuple[int, int], str] = {}
    for place, (_, rule) in enumerate(chosen):
        rows, refused = measured_rows(sizes, rule, **system)
        refusals |= {(place, size): why for size, why in refused.items()}
        for name in COLUMNS:
            values[name][place] = rows[name]
    return Measured(tuple(chosen), sizes, np.array(list(numbers.values())), values, refusals)


def chosen_rules(rules: Iterable[SlicingLike] | None) -> list[tuple[str, Slicing]]:
    """Name each of the rules, or of all rules for ``None``; errors as of :func:`measure_sizes`."""
    if isinstance(rules, str):
        raise TypeError(f"rules are a list of rules, got the string {rules!r}: write [{rules!r}]")
    chosen = all_rules() if rules is None else list(rules)
    if not chosen:
        raise ValueError("no rules to compare: name at least one, or leave them out for all")
    found = [find(rule) for rule in chosen]
    names = (rule if isinstance(rule, str) else config.name for rule, config in zip(chosen, found, strict=True))
    return list(zip(distinct(names), found, strict=True))


def distinct(names: Iterable[str]) -> Iterator[str]:
    """Put a number behind names that come again.

    >>> list(distinct(["page", "page", "photo"]))
    ['page', 'page (2)', 'photo']
    """
    times: dict[str, int] = {}
    for first in names:
        name = first
        while name in times:
            times[first] += 1
            name = f"{first} ({times[first]})"
        times[name] = 1
        yield name


def planned_by(rule: Slicing, image_hw: tuple[int, int]) -> SlicePlan:
    """Its plan; a ``ValueError`` is its refusal, any other error a fault of a rule of your own, which is named."""
    try:
        return rule.plan(image_hw)
    except ValueError:
        raise
    except Exception as problem:
        height, width = image_hw
        what = f"the rule {rule.name!r} fails on {height}x{width} px (height x width)"
        raise RuntimeError(f"{what}: {type(problem).__name__}: {problem}") from problem


def record(plan: SlicePlan, **system: Any) -> tuple[float, ...]:
    """One plan's :data:`COLUMNS`."""
    found, (rows, columns) = measure(plan, **system), plan.grid or (0, 0)
    return (
        *(found.tokens, found.flops.total / 1e12, found.resolution_kept, found.padding, found.seam),
        *(found.distortion, found.views, found.patches, rows, columns),
    )


def measured_rows(sizes: np.ndarray, rule: Slicing, **system: Any) -> tuple[dict[str, np.ndarray], dict[int, str]]:
    """One rule's columns, ``nan`` where it refuses a size; and why, by the size's place."""
    rows = measured_at_once(sizes, rule, **system)
    return (rows, {}) if rows is not None else _one_by_one(map(tuple, sizes.tolist()), rule, system)


def _one_by_one(
    sizes: Iterable[tuple[int, int]], rule: Slicing, system: dict[str, Any]
) -> tuple[dict, dict[int, str]]:
    rows, refused, collected = [], {}, gc.isenabled()
    gc.disable()  # plans make no cycles, and to look for some among all that are cached takes a seventh of the time
    try:
        for place, size in enumerate(sizes):
            try:
                rows.append(record(planned_by(rule, size), **system))
            except ValueError as problem:
                refused[place] = str(problem)
                rows.append((math.nan,) * len(COLUMNS))
    finally:
        if collected:
            gc.enable()
    return dict(zip(COLUMNS, np.array(rows, dtype=float).T, strict=True)), refused


def measured_at_once(sizes: np.ndarray, rule: Slicing, **system: Any) -> dict[str, np.ndarray] | None:
    """The columns of the adaptive planner's plans; ``None`` for other rules, where it refuses a size, and where FLOPs
    of a resampler go by latents that are fitted to views, which columns do not tell.
    """
    if not isinstance(rule, SlicingConfig) or (rule.fits_latents and system.get("resampler") is not None):
        return None
    try:
        planned = plan_many(sizes, rule)
    except ValueError:
        return None
    return measured_plans(sizes, planned, rule, **system)


def measured_plans(
    sizes: np.ndarray, planned: dict[str, np.ndarray], rule: SlicingConfig, **system: Any
) -> dict[str, np.ndarray]:
    """The columns of plans that :func:`uhd.slicing.plan_many` made: of one canvas of slices, or of the overview."""
    grid, cut = planned["grid"], planned["grid"][:, :1] > 0
    shown = np.where(cut, planned["slice_hw"] * grid, planned["overview_hw"])
    scale = shown / sizes
    lines = np.maximum(grid - 1, 0) * sizes[:, ::-1]  # rows - 1 lines across the width, and so on
    return {
        "tokens": planned["num_tokens"].astype(float),
        "tflops": _flops(planned, rule, **system) / 1e12,
        "resolution_kept": np.minimum(scale, 1).prod(axis=1),
        "padding": np.zeros(len(sizes)),
        "seam": lines.sum(axis=1) / np.sqrt(sizes.prod(axis=1)),
        "distortion": scale.max(axis=1) / scale.min(axis=1),
        "views": planned["num_views"].astype(float),
        "patches": planned["num_patches"].astype(float),
        "rows": grid[:, 0].astype(float),
        "columns": grid[:, 1].astype(float),
    }


def _flops(planned: dict[str, np.ndarray], rule: SlicingConfig, **system: Any) -> np.ndarray:
    """As :func:`uhd.slicing.flops.plan_flops` counts them: each formula once for every shape of a view."""
    vit, lm = named(system.get("vit", "clip-l"), VITS), named(system.get("lm", "llama-13b"), LMS)
    resampler = system.get("resampler")

    def view(rows: int, cols: int) -> int:
        if rows == 0:
            return 0
        own = vit_flops(rows * cols, vit, patch_size=rule.patch_size)
        if resampler is None:
            return own
        return own + compressor_flops(vit.output_hw((rows, cols)), vit.width, resampler, width=lm.width)

    slices = planned["num_views"] - 1
    total = slices * _for_each(planned["slice_hw"] // rule.patch_size, view)
    total += _for_each(planned["overview_hw"] // rule.patch_size, view)
    total += _for_each(planned["num_tokens"][:, None], lambda tokens: lm_flops(tokens, lm))
    if resampler is None:
        visual = planned["num_tokens"] - rule.separators.per_image
        visual = visual - np.where(slices > 0, rule.separators.of_cut(*planned["grid"].T), 0)
        total += _for_each(visual[:, None], lambda tokens: mlp_flops(tokens, vit.width, width=lm.width))
    return total


def _for_each(rows: np.ndarray, formula: Callable[..., int]) -> np.ndarray:
    """A formula of one or two whole numbers on every row of (M, 1 | 2), once for equal ones."""
    key = rows[:, 0] if rows.shape[1] == 1 else rows[:, 0] * (MAX_SIDE + 1) + rows[:, 1]
    _, first, place = np.unique(key, return_index=True, return_inverse=True)
    return np.array([float(formula(*row)) for row in rows[first].tolist()])[place]


def front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Places of the (tokens, resolution kept) that no other one beats; of equal ones the first. ``nan`` is on none.

    >>> sorted(front([(454, 1.0), (576, 0.3), (729, 1.0), (64, 0.1)]))
    [0, 3]
    """
    order = sorted((tokens, -kept, place) for place, (tokens, kept) in enumerate(points) if tokens == tokens)
    best, found = -1.0, set()
    for _, kept, place in order:
        if round(-kept, 9) > best:
            best = round(-kept, 9)
            found.add(place)
    return found
