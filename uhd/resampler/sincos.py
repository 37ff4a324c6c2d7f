"""The 2D sine-cosine position table of every resampler of this family, and how it is resized."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_2d(dim: int, grid_hw: tuple[int, int]) -> Tensor:
    """Position table of a grid of patches, row-major.

    Columns `0 : dim/2` hold x (the column index), the rest y (the row index); each half is `dim/4` sines followed by
    `dim/4` cosines of `index * 10000 ** (-k / (dim/4))`. Source: `get_2d_sincos_pos_embed` of MAE, as it stands in the
    resampler files of LLaVA-UHD and MiniCPM-V.

    Args:
        dim: width of the table; a multiple of 4.
        grid_hw: (rows, columns) in patches, both at least 1.

    Returns:
        (rows * columns, dim), float32, on the CPU.

    Raises:
        ValueError: `dim` is not a positive multiple of 4, or a side is below 1.
    """
    rows, columns = grid_hw
    if dim < 4 or dim % 4:
        raise ValueError(f"dim={dim}: a 2D sincos table needs a positive multiple of 4")
    if rows < 1 or columns < 1:
        raise ValueError(f"grid_hw={(rows, columns)}: both sides must be at least 1 patch")
    # float32 throughout, as where released weights were trained: at index 500 float64 angles differ by over 1e-5.
    omega = np.float32(1) / np.float32(10000) ** (np.arange(dim // 4, dtype=np.float32) / np.float32(dim / 4))

    def one_axis(length: int) -> np.ndarray:  # (length, dim / 2)
        angles = np.arange(length, dtype=np.float32)[:, None] * omega
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    x = np.broadcast_to(one_axis(columns)[None], (rows, columns, dim // 2))
    y = np.broadcast_to(one_axis(rows)[:, None], (rows, columns, dim // 2))
    return torch.from_numpy(np.concatenate([x, y], axis=-1).reshape(rows * columns, dim))


def resize_table(table: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """A square table of positions on another grid: bicubic, not antialiased, in float32.

    Args:
        table: (s*s, D) floating point, row-major.
        grid_hw: (rows, columns).

    Returns:
        (rows * columns, D) in the dtype of the table; the table itself where its grid is wanted. Differentiable.

    Source: `get_abs_pos` in the resampler files of LLaVA-UHD.
    """
    side = math.isqrt(len(table))
    if tuple(grid_hw) == (side, side):
        return table
    image = table.float().T.unflatten(1, (side, side)).unsqueeze(0)
    resized = F.interpolate(image, size=grid_hw, mode="bicubic", align_corners=False)
    return resized.flatten(2)[0].T.contiguous().to(table.dtype)
