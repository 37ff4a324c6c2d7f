"""A plan with a grid of the caller's own choice."""

from __future__ import annotations

from uhd.slicing.adaptive import DEFAULT, PRESETS, SlicingConfig, planner_of
from uhd.slicing.config import MAX_VIEWS, positive_int
from uhd.slicing.plan import SlicePlan, bad_canvases, check_size


def plan_from_grid(
    image_hw: tuple[int, int], grid: tuple[int, int] | None, config: SlicingConfig | str | None = None
) -> SlicePlan:
    """Plan an image with a grid of your own choice: everything else is the adaptive planner's.

    Canvas, slices, overview, their order and all counts follow from ``config``, so that a rule of your own need only
    choose (rows, columns). ``config.max_slices`` bounds what the planner chooses itself, and is not looked at here.

    Args:
        image_hw: (height, width) of the image, px.
        grid: (rows, columns) of the slices. ``None`` or (1, 1): the image is not cut, and is its overview alone.
        config: Settings of the adaptive planner, or the name of a preset; ``None`` is ``"llava-uhd-safe"``.

    Returns:
        The plan; that of :func:`uhd.slicing.plan` where the grid is the one that the planner chooses, and it does not
        make one view of it (``config.one_view_below``).

    Raises:
        ValueError: No size, no grid of whole numbers from 1, a grid of more than 65,536 views or of a canvas that
            would not fit in memory, no preset of that name, or a plan that costs more than ``config.max_tokens``.
        TypeError: ``config`` is another rule's, which has no grid to be given.

    >>> found = plan_from_grid((900, 600), (4, 3))
    >>> found.slice_hw, found.overview_hw, found.num_views, found.num_tokens
    ((350, 308), (406, 266), 13, 844)
    """
    if isinstance(config, str):
        config = SlicingConfig.preset(config)
    config = DEFAULT if config is None else config
    if not isinstance(config, SlicingConfig):
        raise TypeError(
            f"a grid is planned under a SlicingConfig or the name of one ({', '.join(PRESETS)}), got "
            f"{type(config).__name__}: other rules make their own"
        )
    height, width = check_size(image_hw)
    if grid is not None:
        try:
            rows, cols = (positive_int("each", count) or 0 for count in grid)
        except (TypeError, ValueError):
            raise ValueError(
                f"a grid is two whole numbers (rows, columns) from 1, or None for no cut; got {grid!r}"
            ) from None
        if rows * cols >= MAX_VIEWS:
            raise ValueError(
                f"{rows} rows x {cols} columns and the overview are {rows * cols + 1} views, at most {MAX_VIEWS} are "
                "planned"
            )
        grid = None if rows * cols == 1 else (rows, cols)
    found = planner_of(config).build(height, width, grid)
    if bad := next(bad_canvases(found), None):
        raise ValueError(f"grid {grid} is too large, {bad}: choose a smaller grid")
    if config.max_tokens is not None and found.num_tokens > config.max_tokens:
        raise ValueError(
            f"grid {grid} of a {height}x{width} px image (height x width) costs {found.num_tokens} tokens under "
            f"{config.name!r}, max_tokens is {config.max_tokens}: choose a smaller grid"
        )
    return found
