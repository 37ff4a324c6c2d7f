"""The small tables that follow from grids alone: what a position or a bin takes from which patch. NumPy only.

They are made on the host; modules of torch keep them by :func:`uhd.grids.made_once`.
"""

from __future__ import annotations

import math

import numpy as np


def resize_weights(source: int, target: int, mode: str, antialias: bool, exact: type[np.floating]) -> np.ndarray:
    """Weigh what each of `target` samples along one side takes from each of `source` rows: (target, source).

    Args:
        source, target: rows before and after.
        mode, antialias: "bicubic" or "bilinear", as in `interpolate_pos_embed`.
        exact: NumPy type to compute in. Released weights were trained with positions resized in float32.

    >>> resize_weights(2, 3, "bilinear", False, np.float32).tolist()
    [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    """
    scale = exact(source) / exact(target)
    reach = max(scale, exact(1)) if antialias else exact(1)
    places = np.arange(source, dtype=exact) if antialias else np.arange(-2, source + 2, dtype=exact)
    centres = (np.arange(target, dtype=exact)[:, None] + exact(0.5)) * scale - exact(0.5)
    distance = np.abs(places - centres) / reach
    if mode == "bilinear":
        weights = np.clip(1 - distance, 0, None)
    else:
        a = exact(-0.5 if antialias else -0.75)  # torch's: Keys' kernel with it, OpenCV's without
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((distance - 5) * distance + 8) * distance * a - 4 * a
        weights = np.where(distance <= 1, near, np.where(distance < 2, far, exact(0)))
    if antialias:
        return weights / weights.sum(1, keepdims=True)
    inner = weights[:, 2:-2].copy()  # what lies outside is the nearest row
    inner[:, 0] += weights[:, :2].sum(1)
    inner[:, -1] += weights[:, -2:].sum(1)
    return inner


def sines(dim: int, length: int) -> np.ndarray:
    """Make one side of `sincos_2d`: (length, dim), sines of every index in the first half, cosines in the second."""
    # float32 throughout, as where released weights were trained: at index 500 float64 angles differ by over 1e-5.
    omega = np.float32(1) / np.float32(10000) ** (np.arange(dim // 2, dtype=np.float32) / np.float32(dim / 2))
    angles = np.arange(length, dtype=np.float32)[:, None] * omega
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def neighbours(height: int, width: int) -> np.ndarray:
    """Find the patches around and at each patch of a grid: (height * width, 9) numbers, row-major; -1 is outside.

    >>> neighbours(1, 2).tolist()
    [[-1, -1, -1, -1, 0, 1, -1, -1, -1], [-1, -1, -1, 0, 1, -1, -1, -1, -1]]
    """
    numbers = np.pad(np.arange(height * width).reshape(height, width), 1, constant_values=-1)
    around = [numbers[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)]
    return np.stack(around, axis=-1).reshape(-1, 9)


POOLS = ((2, 4), (2, 3), (3, 4), (3, 3), (4, 2), (3, 2), (4, 3))
"""(rows, columns) that a window may be pooled to, in the order of the release: on equal terms the first is taken."""


def pool_hw(grid_hw: tuple[int, int]) -> tuple[int, int]:
    """Choose (rows, columns) of every window's pooled keys: the shape in `POOLS` nearest to the map's own.

    All windows of a map have its shape, so a wide map has wide windows. 6 to 12 keys.

    >>> pool_hw((24, 24)), pool_hw((12, 36))
    ((3, 3), (2, 4))
    """
    aspect = math.log(grid_hw[1] / grid_hw[0])
    return min(POOLS, key=lambda pool: abs(aspect - math.log(pool[1] / pool[0])))


def pool_weights(length: int, windows: int, bins: int, *, aligned: bool) -> np.ndarray:
    """Weigh what each bin takes from each feature along one side.

    Every bin is the mean of `ceil(window / bins)` samples, each interpolated between its two neighbours.

    Args:
        length: features along the side.
        windows: equal windows it is cut into; a border may lie inside a feature.
        bins: bins of a window.
        aligned: feature i covers [i, i + 1) and a sample at its centre is that feature. False is the release: samples
            lie half a feature too far down and right, and windows narrower than a feature are widened to one at their
            start, so that the last ones reach outside the map, where samples count as zero.

    Returns:
        (windows * bins, length), float32, on the CPU; rows sum to 1, those that reach outside to less.

    Source: `roi_align` of torchvision, sampling_ratio -1, in the same float32 arithmetic.
    """
    size, half = length / windows, np.float32(0.5 if aligned else 0.0)
    weights = np.zeros((windows, bins, length), dtype=np.float32)
    for window in range(windows):
        start, end = (np.float32(window * size + extra) - half for extra in (0.0, size))
        extent = end - start if aligned else max(end - start, np.float32(1))
        step = extent / np.float32(bins)
        samples = math.ceil(step)
        for place, sample in np.ndindex(bins, samples):
            at = start + np.float32(place) * step + np.float32(sample + 0.5) * step / np.float32(samples)
            if at < -1 or at > length:
                continue
            at = min(max(at, np.float32(0)), np.float32(length - 1))
            low = math.floor(at)
            share = at - np.float32(low)
            weights[window, place, low] += (1 - share) / np.float32(samples)
            weights[window, place, min(low + 1, length - 1)] += share / np.float32(samples)
    return weights.reshape(windows * bins, length)
