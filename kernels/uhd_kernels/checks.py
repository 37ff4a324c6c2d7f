"""What the input must be. Shapes, dtypes and devices are seen at once; the numbers in it only where they are read."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def host_views(
    cu_seqlens: Tensor, offsets: Tensor | None, max_seqlen: int, rows: int, table_rows: int | None
) -> tuple[list[int], list[int]]:
    """The bounds and offsets as Python ints, checked. Offsets are zeros where there is no table."""
    views = len(cu_seqlens) - 1
    if offsets is None:
        bounds, starts = cu_seqlens.tolist(), [0] * views
    elif cu_seqlens.device != offsets.device:
        bounds, starts = cu_seqlens.tolist(), offsets.tolist()
    else:  # one wait for the device, since a second would double the stall
        both = torch.cat([cu_seqlens, offsets]).tolist()
        bounds, starts = both[: views + 1], both[views + 1 :]
    if bounds[0] != 0 or bounds[-1] != rows:
        raise ValueError(f"cu_seqlens must run from 0 to N = {rows}, the rows of k; got {bounds[0]} to {bounds[-1]}")
    for view, (start, end) in enumerate(pairwise(bounds)):
        if start > end:
            raise ValueError(f"cu_seqlens must not fall; view {view} runs from {start} to {end}")
    for view, (start, end) in enumerate(pairwise(bounds)):
        if end - start > max_seqlen:
            raise ValueError(f"max_seqlen={max_seqlen}, but view {view} has {end - start} rows; pass at least that")
        first, last = starts[view], starts[view] + end - start
        if table_rows is not None and (first < 0 or last > table_rows):
            raise ValueError(
                f"view {view} asks for rows {first}:{last} of key_positions, which has {table_rows}; "
                "check position_offsets against the grids the table was made for"
            )
    return bounds, starts


def check_packed(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3 or q.shape[-1] == 0:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"expected q (Q, H, d), k (N, H, d) and v (N, H, d) with d >= 1; got {shapes}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape (N, H, d); got k {tuple(k.shape)} and v {tuple(v.shape)}")
    if q.shape[1:] != k.shape[1:]:
        raise ValueError(
            f"q and k must agree in heads and head dim; got q (H, d) = {tuple(q.shape[1:])} and k {tuple(k.shape[1:])}"
        )
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must share one floating dtype; got {q.dtype}, {k.dtype} and {v.dtype}: cast them")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device; got {q.device}, {k.device} and {v.device}: move them")


def check_views(q: Tensor, cu_seqlens: Tensor, key_positions: Tensor | None, offsets: Tensor | None) -> None:
    _check_index("cu_seqlens", cu_seqlens, q.device)
    views = cu_seqlens.shape[0] - 1  # len() would fix it for torch.export
    if views < 0:
        raise ValueError("cu_seqlens is empty; expected (V + 1,) numbers, [0] for no views")
    if (key_positions is None) != (offsets is None):
        raise ValueError("key_positions and position_offsets go together; give both or neither")
    if key_positions is None:
        return
    _check_index("position_offsets", offsets, q.device)
    if offsets.shape[0] != views:
        raise ValueError(f"position_offsets has {len(offsets)} entries for {views} views; give one a view")
    if key_positions.dim() != 3 or key_positions.shape[1:] != q.shape[1:]:
        raise ValueError(f"key_positions must be (L, {q.shape[1]}, {q.shape[2]}); got {tuple(key_positions.shape)}")
    if key_positions.dtype != q.dtype:
        raise TypeError(f"key_positions is {key_positions.dtype} and the keys are {q.dtype}: cast the table")
    if key_positions.device != q.device:
        raise ValueError(f"key_positions is on {key_positions.device} and the keys are on {q.device}: move the table")


def _check_index(name: str, index: Tensor, device: torch.device) -> None:
    if index.dim() != 1:
        raise ValueError(f"{name} must have one dimension; got shape {tuple(index.shape)}")
    if index.dtype != torch.int32:
        raise TypeError(f"{name} must be int32; got {index.dtype}: use {name}.int()")
    if index.device.type != "cpu" and index.device != device:
        raise ValueError(f"{name} must be on {device} or on the host; it is on {index.device}")
