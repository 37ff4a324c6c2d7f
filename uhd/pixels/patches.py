"""The order of pixels inside a patch, and from a view to its patches and back.

Every other file takes the order from here. The functions take NumPy arrays and torch tensors alike.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from einops import rearrange

from uhd.settings import check_choice

INNER = {"chw": "c py px", "hwc": "py px c"}
"""The axes inside a patch by the name of their order: ``"chw"`` is that of vision encoders' weights, ``"hwc"`` that of
pixels in memory."""


def inner_axes(inner: str) -> str:
    """Return the axes inside a patch by the name of their order, for einops.

    >>> inner_axes("hwc")
    'py px c'
    """
    check_choice("inner", inner, INNER)
    return INNER[inner]


def patchify(view: Any, patch_size: int, *, inner: str = "chw") -> Any:
    """Fold a view into patches.

    Patches are row-major; inside one the order is (channel, py, px), so that a patch Conv2d's weight (D, C, p, p),
    flattened to (D, C*p*p), is the matching linear layer. Rows and columns past the last whole patch are left out, as
    a convolution with stride = kernel never sees them (SigLIP 384 with patch 14: the last 6 px).

    >>> view = np.arange(8).reshape(2, 4, 1)  # 2 x 4 px of one channel
    >>> patchify(view, 2)
    array([[0, 1, 4, 5],
           [2, 3, 6, 7]])

    Args:
        view: (h, w, C) array or tensor.
        patch_size: p, px.
        inner: ``"chw"`` as above, or ``"hwc"``: (py, px, channel) inside a patch, as pixels lie in memory.

    Returns:
        ((h // p) * (w // p), C * p * p), same type and dtype. :func:`unpatchify` is the inverse.

    Raises:
        ValueError: Not three axes, a side is shorter than one patch, or there is no such order.
    """
    if len(view.shape) != 3 or min(view.shape[:2]) < patch_size:
        shape = tuple(view.shape)
        raise ValueError(f"a view is (height, width, channels), at least one patch of {patch_size} px, got {shape}")
    seen = view[: view.shape[0] // patch_size * patch_size, : view.shape[1] // patch_size * patch_size]
    return rearrange(seen, f"(h py) (w px) c -> (h w) ({inner_axes(inner)})", py=patch_size, px=patch_size)


def unpatchify(patches: Any, grid_hw: tuple[int, int], patch_size: int, *, inner: str = "chw") -> Any:
    """Unfold (rows * cols, C * p * p) patches to a (rows * p, cols * p, C) view; the inverse of :func:`patchify`.

    >>> unpatchify(np.array([[0, 1, 4, 5], [2, 3, 6, 7]]), (1, 2), 2)[..., 0]
    array([[0, 1, 2, 3],
           [4, 5, 6, 7]])

    Raises:
        ValueError: Not rows * cols patches, their width is no multiple of p * p, or there is no such order.
    """
    rows, cols = grid_hw
    if len(patches.shape) != 2 or patches.shape[0] != rows * cols or patches.shape[1] % patch_size**2:
        raise ValueError(
            f"a {rows}x{cols} grid of {patch_size} px patches is ({rows * cols}, channels * {patch_size**2}), "
            f"got {tuple(patches.shape)}"
        )
    pattern = f"(h w) ({inner_axes(inner)}) -> (h py) (w px) c"
    return rearrange(patches, pattern, h=rows, w=cols, py=patch_size, px=patch_size)


def reorder(patches: Any, source: str, target: str, *, channels: int = 3) -> Any:
    """Change the order inside (N, C * p * p) patches, or inside a patch embedding's weight (D, C * p * p).

    >>> reorder(np.array([[0, 10, 1, 11, 2, 12, 3, 13]]), "hwc", "chw", channels=2)
    array([[ 0,  1,  2,  3, 10, 11, 12, 13]])
    """
    pattern = f"n ({inner_axes(source)}) -> n ({inner_axes(target)})"
    return rearrange(patches, pattern.replace("py px", "place"), c=channels)  # rows and columns stay together


def fold_into(out: np.ndarray, view: np.ndarray, patch_size: int, inner: str) -> None:
    """:func:`patchify` of a (h, w, 3) array, written in one pass to ``out`` (rows * cols, 3 * p * p).

    >>> out, view = np.empty((2, 12), dtype=int), np.arange(24).reshape(2, 4, 3)
    >>> fold_into(out, view, 2, "chw")
    >>> np.array_equal(out, patchify(view, 2))
    True
    """
    p = patch_size
    rows, cols = view.shape[0] // p, view.shape[1] // p
    seen = view[: rows * p, : cols * p]
    if inner == "hwc":  # a row of a patch is one piece of memory on either side
        out.reshape(rows, cols, p, 3 * p)[...] = seen.reshape(rows, p, cols, 3 * p).swapaxes(1, 2)
    else:
        out.reshape(rows, cols, 3, p, p)[...] = seen.reshape(rows, p, cols, p, 3).transpose(0, 2, 4, 1, 3)
