"""A view's map cut into as many windows as there are latents, and a few pooled keys from each of them.

RoI alignment of a regular grid of windows is a product of two small matrices, one a side, so that it needs no operator
of its own: :func:`pool_weights` makes them and :func:`pool_windows` applies them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from uhd import tables
from uhd.grids import made_once, sent
from uhd.tables import pool_hw

pool_weights = made_once(tables.pool_weights)


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
