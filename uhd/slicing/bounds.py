"""The most that any image can cost under a config: for memory profiling of an inference engine."""

from __future__ import annotations

import math
from typing import NamedTuple

from uhd.slicing.config import SlicingConfig
from uhd.slicing.plan import MAX_SIDE, SlicePlan, considered_grids, plan, to_multiple


class WorstCase(NamedTuple):
    """Upper bounds over images, and a costly image.

    ``num_views`` views an image, ``view_patches`` ViT patches a view, ``num_patches`` and ``num_tokens`` an image;
    ``image_hw`` is the costliest of the images shaped like a grid of the largest slice count. With a fixed number of
    tokens a view and no ``max_tokens`` it reaches ``num_views`` and ``num_tokens`` exactly; elsewhere it may stay well
    below the bounds.
    """

    num_views: int
    view_patches: int
    num_patches: int
    num_tokens: int
    image_hw: tuple[int, int]


def worst_case(config: SlicingConfig, *, max_aspect: float = 200.0) -> WorstCase:
    """Bounds that no image of an aspect up to ``max_aspect`` (either way) exceeds.

    With ``clamp``, or under the ``march2024`` rule, they hold for every image: a view never exceeds its budget.
    Without it a view of a degenerate image (a side below one patch) grows with the aspect, hence ``max_aspect``.

    Raises:
        ValueError: ``max_aspect`` < 1, or ``max_tokens`` lies below the overview's cost.
    """
    if max_aspect < 1:
        raise ValueError(f"max_aspect is longer side / shorter side, so at least 1; got {max_aspect}")
    slices = config.most_slices if config.most_slices > 1 else 0
    units = _view_units(config, max_aspect)
    view_tokens = config.tokens_per_view or units
    if config.max_tokens is not None:
        slices = min(slices, max(config.max_tokens // (config.tokens_per_view or 1) - 1, 0))  # and the overview
    views = slices + 1
    grids = [None] if not slices else [(slices, 1), (1, slices)]
    tokens = views * view_tokens + max(config.separators.count(grid) for grid in grids)
    if config.max_tokens is not None:
        tokens = min(tokens, config.max_tokens)
    view_patches, patches = units * config.merge**2, views * units * config.merge**2
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
    plans = [plan(size, config) for size in sizes if max(size) <= MAX_SIDE]
    return max(plans, key=lambda found: (found.num_tokens, found.num_patches))
