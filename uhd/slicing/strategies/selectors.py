"""The choices that nearly all tilers make: which grid, or which size, an image gets.

Grids are (rows, columns) and sizes (height, width), px. Float details follow the released code, because they decide
ties: the order of candidates, float32 where the release has it, and where a side is rounded.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

Size = tuple[int, int]
Grids = tuple[Size, ...]


@lru_cache(maxsize=64)
def grids_up_to(most: int, least: int = 1) -> Grids:
    """Every grid of ``least`` to ``most`` cells, sorted by cells and then by columns.

    >>> grids_up_to(3)
    ((1, 1), (2, 1), (1, 2), (3, 1), (1, 3))
    """
    grids = [(rows, cols) for cols in range(1, most + 1) for rows in range(-(-least // cols), most // cols + 1)]
    return tuple(sorted(grids, key=lambda grid: (math.prod(grid), grid[1])))


@lru_cache(maxsize=64)
def pairs_by_ratio(most: int) -> dict[float, Grids]:
    """Pairs (a, b) with ``a * b <= most``, grouped by a / b as first met from ``most`` cells down, ``a`` rising.

    Source: transformers, models/llama4/image_processing_llama4.py ``find_supported_resolutions``.
    """
    groups: dict[float, list[Size]] = {}
    for a, b in sorted(grids_up_to(most), key=lambda pair: (-math.prod(pair), pair[0])):
        groups.setdefault(a / b, []).append((a, b))
    return {ratio: tuple(pairs) for ratio, pairs in groups.items()}


def best_resolution(image_hw: Size, grids: Grids, cell: int) -> Size:
    """The grid whose canvas of ``cell`` px cells keeps most of the image's pixels, then wastes fewest; first wins.

    Pixels kept are those of the image fitted into the canvas (sides truncated), at most its own number: enlarging
    earns nothing. The list's order decides ties, and it differs between code bases.
    Source: transformers, image_processing_utils.py ``select_best_resolution``.

    >>> best_resolution((600, 1000), ((1, 2), (2, 1), (2, 2)), 336)
    (2, 2)
    """
    height, width = image_hw
    best, most_kept, least_waste = grids[0], -1, math.inf
    for rows, cols in grids:
        scale = min(cols * cell / width, rows * cell / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        waste = rows * cols * cell * cell - kept
        if kept > most_kept or (kept == most_kept and waste < least_waste):
            best, most_kept, least_waste = (rows, cols), kept, waste
    return best


def closest_aspect(image_hw: Size, grids: Grids, cell: int) -> Size:
    """The grid whose columns / rows come closest to width / height, as plain numbers; first wins.

    On an exact tie a later grid wins where the image has more than half the pixels of its cells, so only then does
    the image's size matter. Not symmetric under transposition: |w/h - c/r| is not |h/w - r/c|.
    Source: OpenGVLab/InternVL, internvl_chat/internvl/train/dataset.py ``find_closest_aspect_ratio``.

    >>> closest_aspect((600, 1000), grids_up_to(6), 448)
    (2, 3)
    """
    aspect, area = image_hw[1] / image_hw[0], image_hw[0] * image_hw[1]
    best, closest = (1, 1), math.inf
    for rows, cols in grids:
        misfit = abs(aspect - cols / rows)
        if misfit < closest:
            best, closest = (rows, cols), misfit
        elif misfit == closest and area > 0.5 * cell * cell * cols * rows:
            best = (rows, cols)
    return best


def least_upscaling(image_hw: Size, grids: Grids, cell: int, *, dtype: type = np.float64) -> Size:
    """The grid whose canvas enlarges the image least without shrinking it, else the one that shrinks it least.

    Ties go to fewer cells, then to the earlier grid. Sides may be zero or negative (Molmo subtracts a margin): the
    scale is then infinite or negative, and the comparisons hold as in the release.
    Source: transformers, models/llama4/image_processing_llama4.py ``get_best_fit``.

    >>> least_upscaling((600, 1000), grids_up_to(6), 448)
    (2, 3)
    """
    ordered = sorted(grids, key=lambda grid: grid[0] * grid[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = (np.array(ordered) * cell).astype(dtype) / np.array(image_hw).astype(dtype)
    scale = scales.min(axis=1)
    if (scale < 1).all():
        return ordered[int(scale.argmax())]
    return ordered[int(np.where(scale < 1, dtype(10e9), scale).argmin())]


def best_anchor(image_hw: Size, grids: Grids, cell: int) -> Size:
    """The grid of greatest 100 * IoU(its canvas, a box as wide of the image's aspect) + IoU(its canvas, the image).

    Boxes share their top left corner; the box's height is truncated; all in float32. First wins.
    Source: X-PLUG/mPLUG-DocOwl, DocOwl1.5/mplug_docowl/processor.py ``anchor_rank`` (UReader has the same).

    >>> best_anchor((600, 1000), grids_up_to(6), 448)
    (2, 3)
    """
    height, width = image_hw
    canvas = np.array(grids, np.int64) * cell
    same_width = (np.float32(height / width) * canvas[:, 1].astype(np.float32)).astype(np.int64)
    shape = _iou(canvas, np.stack([same_width, canvas[:, 1]], axis=1))
    size = _iou(canvas, np.broadcast_to(np.array([[height, width]], np.int64), canvas.shape))
    return grids[int((shape * np.float32(100) + size).argmax())]


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(A,) float32 overlaps of boxes (A, 2) that share their top left corner."""
    common = np.minimum(a, b).prod(axis=1)
    union = a.prod(axis=1) + b.prod(axis=1) - common
    return common.astype(np.float32) / (union.astype(np.float32) + np.float32(1e-5))


def smart_resize(
    image_hw: Size,
    factor: int,
    min_pixels: int,
    max_pixels: int,
    *,
    frames: int = 1,
    max_aspect: float | None = 200,
    at_least_one: bool = False,
) -> Size:
    """Sides rounded to multiples of ``factor`` (half to even), then scaled into a range of pixels.

    The rounded sides are compared with the bounds, the scale comes from the raw ones. ``frames`` multiplies the
    pixels; ``at_least_one`` keeps a rounded side from being 0, which else only the lower bound repairs.
    Source: transformers, models/qwen2_vl/image_processing_qwen2_vl.py ``smart_resize``.

    Raises:
        ValueError: Longer side / shorter side is above ``max_aspect``.

    >>> smart_resize((600, 1000), 28, 56 * 56, 28 * 28 * 1280)
    (588, 1008)
    """
    height, width = image_hw
    if max_aspect is not None and max(image_hw) / min(image_hw) > max_aspect:
        raise ValueError(f"longer side / shorter side is {max(image_hw) / min(image_hw):.6g}, at most {max_aspect}")
    least = factor if at_least_one else 0
    rows = max(round(height / factor) * factor, least)
    cols = max(round(width / factor) * factor, least)
    if frames * rows * cols > max_pixels:
        shrink = math.sqrt((frames * height * width) / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        cols = max(factor, math.floor(width / shrink / factor) * factor)
    elif frames * rows * cols < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        rows = math.ceil(height * grow / factor) * factor
        cols = math.ceil(width * grow / factor) * factor
    return rows, cols
