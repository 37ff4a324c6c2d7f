"""Batches of equal-sized images to packed patches and back, in the order of `uhd.pixels.patchify`."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from uhd.pixels import patchify as fold
from uhd.pixels import unpatchify as unfold


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut equal-sized images (V, C, H, W), H and W multiples of p = `patch_size` px, into (V*h*w, P), P = C*p*p.

    View by view, row-major over the grid, inner order (c, py, px), which is that of a flattened `Conv2d` weight.
    ValueError: not four axes, or a side that is no multiple of the patch.

    >>> import torch
    >>> images = torch.arange(8).reshape(1, 1, 2, 4)  # one view of one channel, 2 x 4 px
    >>> patchify(images, 2).tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    if images.dim() != 4 or images.shape[2] % patch_size or images.shape[3] % patch_size:
        raise ValueError(
            f"images must be (V, C, H, W), H and W multiples of the {patch_size} px patch; got {tuple(images.shape)}"
        )
    return fold(rearrange(images, "v c h w -> (v h) w c"), patch_size)


def unpatchify(patches: Tensor, grid_hw: tuple[int, int], patch_size: int, *, channels: int = 3) -> Tensor:
    """The inverse of `patchify`, for views of one grid: (V*h*w, P) -> (V, channels, h*p, w*p).

    ValueError: P or the number of patches does not fit.

    >>> import torch
    >>> unpatchify(torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7]]), (1, 2), 2, channels=1).tolist()
    [[[[0, 1, 2, 3], [4, 5, 6, 7]]]]
    """
    rows, columns = grid_hw
    if patches.dim() != 2 or patches.shape[1] != channels * patch_size**2 or patches.shape[0] % (rows * columns):
        raise ValueError(
            f"patches must be (V*{rows}*{columns}, {channels}*{patch_size}*{patch_size} = {channels * patch_size**2})"
            f"; got {tuple(patches.shape)}"
        )
    stacked = unfold(patches, (len(patches) // columns, columns), patch_size)  # one tall view
    return rearrange(stacked, "(v h) w c -> v c h w", h=rows * patch_size).contiguous()
