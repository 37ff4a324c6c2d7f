"""Position embeddings for views of any grid: interpolate a learned table, or pick its rows by bucket.

Tables are flat, row-major over (row, column). Everything here is a pure function of its arguments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from uhd.grids import as_grid

MODES = ("bicubic", "bilinear", "nearest")
BUCKET_RULES = ("integer", "transformers", "remote")


def interpolate_pos_embed(
    table: Tensor,
    src_hw: tuple[int, int],
    dst_hw: tuple[int, int],
    mode: str = "bicubic",
    antialias: bool = False,
) -> Tensor:
    """Resample a table of position embeddings from one grid to another.

    The LLaVA-UHD paper reshapes the table to 2D and interpolates it to every slice's grid. Its release and CLIP in
    transformers use bicubic without antialias, timm's `resample_abs_pos_embed` bicubic with it, SigLIP2 NaFlex
    bilinear with it. Samples lie at cell centres (`align_corners=False`). To a grid of one column, antialias is right
    here; on the CPU torch repeats the first row of a contiguous image there, which SigLIP2 in transformers meets.

    Args:
        table: (h*w, D) floating point, row-major, patch rows only (no class token).
        src_hw: (rows, columns) of `table`, in patches.
        dst_hw: (rows, columns) wanted, in patches.
        mode: "bicubic", "bilinear", or "nearest": target row i takes source row floor(i*h/h'), in integers.
        antialias: widen the kernel when shrinking; for bicubic and bilinear only.

    Returns:
        (h'*w', D) in the dtype of `table`, computed in float32 (float64 stays float64). The table itself comes back
        only when both numbers of the grid agree: (8, 32) to (16, 16) is a real interpolation.

    Raises:
        ValueError: rows that are not h*w, an unusable grid, an unknown mode, or antialias with "nearest".
        TypeError: a table that is not floating point, or a grid that is not two integers.
    """
    src_hw, dst_hw = as_grid(src_hw, "src_hw"), as_grid(dst_hw, "dst_hw")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    if antialias and mode == "nearest":
        raise ValueError("antialias needs mode 'bicubic' or 'bilinear'; got 'nearest'")
    if not torch.is_floating_point(table):
        raise TypeError(f"table must be floating point; got {table.dtype}")
    if table.dim() != 2 or table.shape[0] != src_hw[0] * src_hw[1]:
        raise ValueError(
            f"table must have shape (h*w, D) with h*w = {src_hw[0]}*{src_hw[1]} = {src_hw[0] * src_hw[1]} rows; "
            f"got {tuple(table.shape)}. Class and register rows must be split off first"
        )
    if src_hw == dst_hw:
        return table
    if mode == "nearest":
        rows, columns = (_integer_buckets(d, s, table.device) for d, s in zip(dst_hw, src_hw, strict=True))
        return table[_flat_ids(rows, columns, src_hw[1])]
    image = rearrange(table, "(h w) d -> 1 d h w", h=src_hw[0])
    image = image.to(torch.promote_types(table.dtype, torch.float32))
    # torch on the CPU (2.14, 2.15) repeats the first row when it antialiases to one column; to one row it is right
    turned = antialias and dst_hw[1] == 1
    image, size = (image.mT, dst_hw[::-1]) if turned else (image, dst_hw)
    resized = F.interpolate(image, size=size, mode=mode, align_corners=False, antialias=antialias)
    return rearrange(resized.mT if turned else resized, "1 d h w -> (h w) d").to(table.dtype)


def bucket_position_ids(grid_hw: tuple[int, int], table_side: int, rule: str = "integer") -> Tensor:
    """Rows of a square position table that the patches of a view take when nothing is interpolated.

    Args:
        grid_hw: (rows, columns) of the view, in patches.
        table_side: n, the side of the square table, in patches (70 for MiniCPM-V: 980 px / 14).
        rule: "integer": floor(i*n/h), exact. The other two keep the float32 rounding of existing code, for checkpoints
            trained with it: "transformers" (`models/minicpmv4_6`: thresholds k/n against i/h) and "remote" (MiniCPM-V
            2.5 and 2.6 hub code: multiples of a float32 step 1/h, which moves single rows, such as 4 of 49). Both are
            torch's arithmetic on the CPU, to the last bit.

    Returns:
        (h*w,) int64 on the CPU, row-major: row_bucket * n + column_bucket.

    Raises:
        ValueError: an unusable grid or side, or an unknown rule.
        TypeError: a grid that is not two integers.
    """
    grid_hw = as_grid(grid_hw, "grid_hw")
    (side, _) = as_grid((table_side, table_side), "table_side")
    if rule == "integer":
        rows, columns = (_integer_buckets(n, side) for n in grid_hw)
    elif rule in BUCKET_RULES:
        rows, columns = (_float_buckets(n, side, accumulate=rule == "remote") for n in grid_hw)
    else:
        raise ValueError(f"rule must be one of {', '.join(BUCKET_RULES)}; got {rule!r}")
    return _flat_ids(rows, columns, side)


def _integer_buckets(length: int, side: int, device: torch.device | None = None) -> Tensor:
    return torch.arange(length, device=device) * side // length


def _float_buckets(length: int, side: int, *, accumulate: bool) -> Tensor:
    """Bucket of each of `length` fractions among the thresholds k/side, rounded as the two codes round."""
    thresholds = torch.arange(1 / side, 1.0, 1 / side)
    if accumulate:
        step = 1 / torch.tensor(length)  # there the length is a tensor, so that the step itself is a float32
        fractions = torch.arange(0, 1 - 1e-6, step.item())
    else:
        fractions = torch.arange(length) / length
    return torch.bucketize(fractions, thresholds, right=True)


def _flat_ids(rows: Tensor, columns: Tensor, side: int) -> Tensor:
    return (rows[:, None] * side + columns[None, :]).flatten()
