"""Borders between slices that avoid content: where each may move to, what it cuts there, and the plan that results.

Sizes and pixels as everywhere: (height, width), px, uint8. A border at y lies between the rows of px y - 1 and y and
goes over the whole image; columns likewise. It may move by ``border_moves`` patches' worth of the image's px, in steps
of a view's px or of a 32nd of that; never so far that a slice of less than a patch is left, or that its neighbour
could reach it. What it cuts is the sum, over its length, of absolute differences of grey (R + 2 G + B) // 4: across
it, and along it on both sides. The least wins; of equal ones the smallest move, then the one up or to the left. All of
that is whole numbers, so it is the same on every machine.

>>> from uhd.slicing import SlicingConfig, plan
>>> config = SlicingConfig.preset("llava-uhd-safe", border_moves=2)
>>> page = np.full((800, 600, 3), 255, np.uint8)
>>> page[255:275] = np.arange(600)[:, None] % 2 * 255  # a line of print where the image would be cut
>>> found = move_borders(plan((800, 600), config), config, lambda box: page[box[0] : box[2], box[1] : box[3]])
>>> moved_borders(found), [view.size_hw for view in found.views[::2]]
(((276, 533), (300,)), [(322, 350), (308, 350), (308, 350), (378, 280)])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from uhd.slicing.adaptive import SlicingConfig, planner_of
from uhd.slicing.metrics import cut_edges
from uhd.slicing.plan import Box, Canvas, SlicePlan

Borders = tuple[tuple[int, ...], tuple[int, ...]]
"""The y of every border between rows of slices and the x of every one between columns, px of the image, rising."""

Crop = Callable[[Box], np.ndarray]
"""The px (h, w, 3) of a part of an image."""

_PIECE = 1024
"""Px of a border that are looked at together: they stay in the cache, and an image may be long."""

_MOST_STEPS = 32  # that a border tries to either side


def move_borders(plan: SlicePlan, config: SlicingConfig, crop: Crop) -> SlicePlan:
    """The plan of an image with every border where it cuts least.

    Args:
        plan: By ``config``, from the image's size.
        config: Its ``border_moves`` say how far.
        crop: Gives the image's px; it is asked for those near borders only.

    Returns:
        A plan of as many views and tokens, in the same grid, whose slices have a canvas each; ``plan`` itself where no
        border moves, where there is none, or where its borders were moved before.
    """
    if not config.border_moves or plan.grid is None or _even_slices(plan) is None:
        return plan
    ys, xs = (tuple(_moved(plan, axis, config.border_moves, crop)) for axis in (0, 1))
    return with_borders(plan, (ys, xs), config)


def with_borders(plan: SlicePlan, borders: Sequence[Sequence[int]], config: SlicingConfig) -> SlicePlan:
    """The plan of an image with its borders at these places; itself where they are those of equal slices.

    Raises:
        ValueError: They are not as many as the grid's, do not rise, or lie outside of the image.
    """
    slices, even = _even_slices(plan), even_borders(plan)
    ys, xs = (tuple(lines) for lines in borders)
    if (ys, xs) == even:
        return plan
    boxes = _boxes(plan.image_hw, ys, xs)
    counts = (len(ys), len(xs)) == tuple(map(len, even))
    if slices is None or not counts or any(min(box.size_hw) < 1 for box in boxes.values()):
        raise ValueError(
            f"borders at y {ys} and x {xs} do not cut an image of {plan.image_hw} px (height, width) into the plan's "
            f"grid {plan.grid} (rows, columns) of slices"
        )
    fit, canvases = _fitter(config), []
    for cell, source in boxes.items():
        view_hw = fit(*source.size_hw)
        tiles = (Box(0, 0, *view_hw),)
        sizes = {"content_hw": view_hw, "size_hw": view_hw, "view_hw": view_hw}
        canvases.append(slices.replace(**sizes, grid=(1, 1), tiles=tiles, source=source, cell=cell))
    place = plan.canvases.index(slices)
    return plan.replace(canvases=(*plan.canvases[:place], *canvases, *plan.canvases[place + 1 :]))


def even_borders(plan: SlicePlan) -> Borders:
    """Where a plan's borders would be if its slices were equal, each at the nearest px; none: ``((), ())``."""
    ys, xs = (
        tuple((2 * side * number + count) // (2 * count) for number in range(1, count))
        for side, count in zip(plan.image_hw, plan.grid or (1, 1), strict=True)
    )
    return ys, xs


def moved_borders(plan: SlicePlan) -> Borders | None:
    """Where a plan's borders are that were moved, the inverse of :func:`with_borders`; ``None``: they were not."""
    slices = [canvas for canvas in plan.canvases if canvas.kind == "slice"]
    sources = {canvas.cell: canvas.source for canvas in slices if canvas.source is not None}
    if plan.grid is None or len(sources) != len(slices):
        return None
    ys, xs = (tuple(sorted({source[axis] for source in sources.values()} - {0})) for axis in (0, 1))
    return (ys, xs) if sources == _boxes(plan.image_hw, ys, xs) and (ys, xs) != even_borders(plan) else None


def _boxes(image_hw: tuple[int, int], ys: tuple[int, ...], xs: tuple[int, ...]) -> dict[tuple[int, int], Box]:
    """What lies between borders, by its (row, column)."""
    rows, cols = pairwise((0, *ys, image_hw[0])), list(pairwise((0, *xs, image_hw[1])))
    return {
        (row, col): Box(top, left, bottom, right)
        for row, (top, bottom) in enumerate(rows)
        for col, (left, right) in enumerate(cols)
    }


@lru_cache(maxsize=64)
def _fitter(config: SlicingConfig) -> Callable[[int, int], tuple[int, int]]:
    """The planner's own fit of a view, within the view's budget also where rounding or a thin strip exceeds it."""
    return planner_of(config.replace(clamp=True)).fit


def _even_slices(plan: SlicePlan) -> Canvas | None:
    """The one canvas of slices of a plan from a size, where the image has px for every border; else ``None``."""
    slices = [canvas for canvas in plan.canvases if canvas.kind == "slice"]
    if len(slices) != 1 or slices[0].source is not None or plan.grid != slices[0].grid:
        return None
    return slices[0] if all(n <= side for n, side in zip(plan.grid, plan.image_hw, strict=True)) else None


def _moved(plan: SlicePlan, axis: int, most: int, crop: Crop) -> Iterator[int]:
    side, count, view = plan.image_hw[axis], plan.grid[axis], plan.slice_hw[axis]
    patch = side * plan.patch_size, count * view  # px of the image that one shows, as a fraction
    least = -(-patch[0] // patch[1])
    reach = min(most * patch[0] // patch[1], (side // count - least) // 2)
    step = max(side // (count * view), -(-reach // _MOST_STEPS), 1)
    steps = reach // step
    across = plan.image_hw[1 - axis]
    for place in even_borders(plan)[axis]:
        if steps < 1:
            yield place
            continue
        low, high = place - steps * step - 1, place + steps * step + 1
        costs = np.zeros(2 * steps + 1, np.int64)
        for start in range(0, across, _PIECE):
            stop = min(start + _PIECE, across)
            last = min(stop + 1, across)  # where the change from the piece's last px leads
            strip = crop(Box(low, start, high, last) if axis == 0 else Box(start, low, last, high))
            costs += _costs(strip, axis, step, stop - start)
        by_move = sorted(range(-steps, steps + 1), key=lambda move: (abs(move), move))
        yield place + step * min(by_move, key=lambda move: costs[move + steps])


def _costs(strip: np.ndarray, axis: int, step: int, length: int) -> np.ndarray:
    """What borders cut on the first ``length`` px of a strip, between every ``step``-th pair of its rows (axis 0) or
    columns (1)."""
    lines = np.moveaxis(strip, axis, 0)
    if step == 1:
        grey = _grey(lines)
        before, after = grey[:-1], grey[1:]
    else:
        before, after = _grey(lines[:-1:step]), _grey(lines[1::step])
    along = _change(before[:, 1:], before[:, :-1]) + _change(after[:, 1:], after[:, :-1])
    return _change(before[:, :length], after[:, :length]) + along


def _grey(pixels: np.ndarray) -> np.ndarray:
    """(R + 2 G + B) // 4 of (n, m, 3) px, uint8."""
    total = pixels[..., 1].astype(np.uint16)
    total += total
    total += pixels[..., 0]
    total += pixels[..., 2]
    total >>= 2
    return np.ascontiguousarray(total.astype(np.uint8))


def _change(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The sums of absolute differences of two uint8 arrays (n, m), line by line."""
    return (np.maximum(one, other) - np.minimum(one, other)).sum(axis=1, dtype=np.uint32)


class Gradient(NamedTuple):
    """Absolute differences of an image's grey to the px below, (h - 1, w), and to the right, (h, w - 1); uint8."""

    down: np.ndarray
    right: np.ndarray

    @classmethod
    def of(cls, pixels: np.ndarray) -> Gradient:
        """That of (h, w, 3) uint8."""
        grey = _grey(pixels)
        below, beside = (grey[1:], grey[:-1]), (grey[:, 1:], grey[:, :-1])
        return cls(*(np.maximum(*pair) - np.minimum(*pair) for pair in (below, beside)))


def content_cut(plan: SlicePlan, image: np.ndarray | Gradient) -> float:
    """The share of an image's gradient that lies on borders between its detail views, 0..1; 0 where it has none.

    The gradient is the sum of absolute differences of grey between px next to each other. On a border are those across
    it, and those along it on both sides: what :func:`move_borders` makes small. A border is where ``seam`` of
    :class:`uhd.slicing.metrics.PlanMetrics` counts one, of any strategy.

    Args:
        plan: The image's plan.
        image: (h, w, 3) uint8, or its :class:`Gradient`, made once for many plans.

    Raises:
        ValueError: The image is not of the plan's size.

    >>> from uhd.slicing import plan
    >>> page = np.zeros((400, 600, 3), np.uint8)
    >>> page[100:, 300:] = 255
    >>> round(content_cut(plan((400, 600), "llava-uhd"), page), 3)
    0.502
    """
    found = image if isinstance(image, Gradient) else Gradient.of(image)
    image_hw = len(found.right), found.down.shape[1]
    if image_hw != tuple(plan.image_hw):
        raise ValueError(f"the plan is for an image of {plan.image_hw} px (height, width), this one has {image_hw}")
    marks = Gradient(*(np.zeros(part.shape, bool) for part in found))
    for axis, place, start, stop in cut_edges(plan):
        if not 0 < place < image_hw[axis]:  # an edge less than half a px inside
            continue
        across, along = marks if axis == 0 else (marks.right.T, marks.down.T)
        across[place - 1, start:stop] = True
        along[place - 1 : place + 1, start : stop - 1] = True
    every = sum(int(part.sum(dtype=np.int64)) for part in found)
    cut = sum(int(part[mark].sum(dtype=np.int64)) for part, mark in zip(found, marks, strict=True))
    return cut / every if every else 0.0
