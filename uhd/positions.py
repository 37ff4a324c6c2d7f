"""Position tables for views of any grid: interpolated, picked by bucket, or made of sines and cosines.

Tables are flat, row-major over (row, column). Everything here is a pure function of its arguments.
"""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch import Tensor

from uhd import tables
from uhd.grids import as_grid, made_once, sent

MODES = ("bicubic", "bilinear", "nearest")
BUCKET_RULES = ("integer", "transformers", "remote")

resize_weights = made_once(tables.resize_weights)
sines = made_once(tables.sines)


def interpolate_pos_embed(
    table: Tensor, src_hw: tuple[int, int], dst_hw: tuple[int, int], mode: str = "bicubic", antialias: bool = False
) -> Tensor:
    """Resample a table of position embeddings from one grid to another.

    The LLaVA-UHD release and CLIP in transformers use bicubic without antialias, timm's `resample_abs_pos_embed`
    bicubic with it, SigLIP2 NaFlex bilinear with it. Samples lie at cell centres (`align_corners=False`). To a grid of
    one column, antialias is right here; on the CPU torch repeats the first row of a contiguous image there, which
    SigLIP2 in transformers meets.

    One small matrix product a side gives what `torch.nn.functional.interpolate` does, up to rounding, and is faster on
    a CPU. So nobody keeps tables between calls, and none can be stale.

    Args:
        table: (h*w, D) floating point, row-major, patch rows only (no class token).
        src_hw: (rows, columns) of `table`, in patches.
        dst_hw: (rows, columns) wanted, in patches.
        mode: "bicubic", "bilinear", or "nearest": target row i takes source row ``floor(i*h/h')``, in integers.
        antialias: widen the kernel when shrinking; for bicubic and bilinear only.

    Returns:
        ``(h'*w', D)`` in the dtype of `table`, computed in float32 (float64 stays float64). The table itself comes
        back only when both numbers of the grid agree: (8, 32) to (16, 16) is a real interpolation.

    Raises:
        ValueError: rows that are not h*w, an unusable grid, an unknown mode, or antialias with "nearest".
        TypeError: a table that is not floating point, or a grid that is not two integers.

    >>> table = torch.tensor([[0.0], [1.0], [2.0], [3.0]])  # of a 2 x 2 grid
    >>> interpolate_pos_embed(table, (2, 2), (2, 3), mode="bilinear").squeeze(-1).tolist()
    [0.0, 0.5, 1.0, 2.0, 2.5, 3.0]
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
    return table if src_hw == dst_hw else _resized(table, src_hw, dst_hw, mode, antialias)


def _resized(table: Tensor, src_hw: tuple[int, int], dst_hw: tuple[int, int], mode: str, antialias: bool) -> Tensor:
    if mode == "nearest":
        rows, columns = (_integer_buckets(d, s, table.device) for d, s in zip(dst_hw, src_hw, strict=True))
        return table[_flat_ids(rows, columns, src_hw[1])]
    image = table.unflatten(0, src_hw).to(torch.promote_types(table.dtype, torch.float32))  # (h, w, D)
    exact = np.float64 if image.dtype == torch.float64 else np.float32
    rows, columns = (
        sent(resize_weights(source, target, mode, antialias, exact), table.device)
        for source, target in zip(src_hw, dst_hw, strict=True)
    )
    with _without_autocast(table.device.type):
        image = (rows @ image.flatten(1)).unflatten(1, (src_hw[1], -1))  # (h', w, D)
        return (columns @ image).flatten(0, 1).to(table.dtype)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    if device_type != "meta" and torch.is_autocast_enabled(device_type):  # which raises for meta
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def bucket_position_ids(grid_hw: tuple[int, int], table_side: int, rule: str = "integer") -> Tensor:
    """Pick the rows of a square position table that the patches of a view take when nothing is interpolated.

    Args:
        grid_hw: (rows, columns) of the view, in patches.
        table_side: n, the side of the square table, in patches (70 for MiniCPM-V: 980 px / 14).
        rule: "integer": floor(i*n/h), exact. The other two keep the float32 rounding of existing code, for checkpoints
            trained with it, to the last bit: "transformers" (`models/minicpmv4_6`: thresholds k/n against i/h) and
            "remote" (MiniCPM-V 2.5 and 2.6 hub code: multiples of a float32 step 1/h, which moves single rows).

    Returns:
        (h*w,) int64 on the CPU, row-major: row_bucket * n + column_bucket.

    Raises:
        ValueError: an unusable grid or side, or an unknown rule.
        TypeError: a grid that is not two integers.

    >>> bucket_position_ids((1, 4), 2).tolist()
    [0, 0, 1, 1]
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
    thresholds = torch.arange(1 / side, 1.0, 1 / side)
    if accumulate:
        step = 1 / torch.tensor(length)  # there the length is a tensor, so that the step itself is a float32
        fractions = torch.arange(0, 1 - 1e-6, step.item())
    else:
        fractions = torch.arange(length) / length
    return torch.bucketize(fractions, thresholds, right=True)


def _flat_ids(rows: Tensor, columns: Tensor, side: int) -> Tensor:
    return (rows[:, None] * side + columns[None, :]).flatten()


def sincos_2d(
    dim: int, grid_hw: tuple[int, int], *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Make the sine-cosine position table of a grid of patches, row-major.

    Columns `0 : dim/2` hold x (the column index), the rest y (the row index); each half is `dim/4` sines followed by
    `dim/4` cosines of `index * 10000 ** (-k / (dim/4))`. Source: `get_2d_sincos_pos_embed` of MAE, as it stands in the
    resampler files of LLaVA-UHD and MiniCPM-V.

    Args:
        dim: width of the table; a multiple of 4.
        grid_hw: (rows, columns) in patches, both at least 1.
        device: None is the CPU.
        dtype: of the table, which is computed in float32.

    Returns:
        (rows * columns, dim).

    Raises:
        ValueError: `dim` is not a positive multiple of 4, or a side is below 1.

    >>> sincos_2d(4, (1, 2))  # sin x, cos x, sin y, cos y
    tensor([[0.0000, 1.0000, 0.0000, 1.0000],
            [0.8415, 0.5403, 0.0000, 1.0000]])
    """
    rows, columns = grid_hw
    if dim < 4 or dim % 4:
        raise ValueError(f"dim={dim}: a 2D sincos table needs a positive multiple of 4")
    if rows < 1 or columns < 1:
        raise ValueError(f"grid_hw={(rows, columns)}: both sides must be at least 1 patch")
    device = torch.device(device or "cpu")
    y, x = (sent(sines(dim // 2, length), device, dtype) for length in (rows, columns))
    table = torch.cat([x.expand(rows, -1, -1), y[:, None].expand(-1, columns, -1)], dim=-1)
    return table.flatten(0, 1)
