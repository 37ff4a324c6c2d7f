"""A view's map cut into as many windows as there are latents, and a few pooled keys from each of them.

RoI alignment of a regular grid of windows is a product of two small matrices, one a side, so that it needs no operator
of its own: :func:`pool_weights` makes them and :func:`pool_windows` applies them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from uhd.grids import made_once, sent

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


@made_once
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


def pool_windows(maps: Tensor, side: int, *, aligned: bool) -> Tensor:
    """Pool the features of the `side` x `side` windows of views of one grid; `aligned` as in :func:`pool_weights`.

    (V, h, w, C) -> (V, side*side, bins, C), windows row-major, bins row-major inside their window.
    """
    grid_hw = (maps.shape[1], maps.shape[2])
    rows, columns = (
        sent(pool_weights(length, side, bins, aligned=aligned), maps.device, maps.dtype)
        for length, bins in zip(grid_hw, pool_hw(grid_hw), strict=True)
    )
    pooled = torch.matmul(rows, maps.flatten(2)).unflatten(2, maps.shape[2:])  # (V, g*a, w, C)
    pooled = torch.matmul(columns, pooled)  # (V, g*a, g*b, C)
    return rearrange(pooled, "v (g a) (f b) c -> v (g f) (a b) c", g=side, f=side)


def window_weights(q: Tensor, k: Tensor, num_heads: int) -> Tensor:
    """What latents take of the keys of their window: arguments as of :func:`attend_windows` -> (V, S, Q, H, n)."""
    exact = torch.promote_types(q.dtype, torch.float32)
    q = rearrange(q, "q s (h d) -> q s h d", h=num_heads).to(exact)
    k = rearrange(k, "v q n (h d) -> v q n h d", h=num_heads).to(exact)
    return (torch.einsum("qshd,vqnhd->vsqhn", q, k) * q.shape[-1] ** -0.5).softmax(-1)


def unpool_windows(weights: Tensor, grid_hw: tuple[int, int], side: int, *, aligned: bool) -> Tensor:
    """Give weights of pooled keys, (..., side*side, H, bins), to the features of a map: (..., side*side, H, h, w).

    What bins took from outside the map is lost, see :func:`pool_weights`.
    """
    pool = pool_hw(grid_hw)
    rows, columns = (
        sent(pool_weights(length, side, bins, aligned=aligned), weights.device, weights.dtype).unflatten(
            0, (side, bins)
        )
        for length, bins in zip(grid_hw, pool, strict=True)
    )
    weights = weights.unflatten(-1, pool).unflatten(-4, (side, side))  # (..., g, f, H, a, b)
    found = torch.einsum("...gfkab,gay,fbx->...gfkyx", weights, rows, columns)
    return found.flatten(-5, -4)


def attend_windows(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Let the latents of a window attend to the keys of that window, and to nothing else.

    q (Q, S, D), S latents for each of Q windows; k and v (V, Q, n, D) -> (V, S, Q, D).
    """
    views = len(k)
    q = rearrange(q, "q s (h d) -> q h s d", h=num_heads).expand(views, -1, -1, -1, -1).flatten(0, 1)
    k, v = (rearrange(x, "v q n (h d) -> (v q) h n d", h=num_heads) for x in (k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "(v q) h s d -> v s q (h d)", v=views)
