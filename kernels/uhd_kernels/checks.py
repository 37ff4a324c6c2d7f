"""What the input must be. Shapes, dtypes and devices are seen at once; the numbers in it only where they are read."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def host_views(
    cu_seqlens: Tensor, offsets: Tensor | None, max_seqlen: int, rows: int, table_rows: int | None
) -> tuple[list[int], list[int]]:
    """The bounds and offsets as Python ints, checked. Offsets are zeros where there is no table.

    Raises:
        ValueError: a length or an offset is wrong.
    """
    bounds, starts = _to_host(cu_seqlens, offsets)
    _check_bounds(bounds, max_seqlen, rows)
    if table_rows is not None:
        _check_offsets(bounds, starts, table_rows)
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
    if len(cu_seqlens) == 0:
        raise ValueError("cu_seqlens is empty; expected (V + 1,) numbers, [0] for no views")
    if (key_positions is None) != (offsets is None):
        raise ValueError("key_positions and position_offsets go together; give both or neither")
    if key_positions is None:
        return
    _check_index("position_offsets", offsets, q.device)
    if len(offsets) != len(cu_seqlens) - 1:
        raise ValueError(
            f"position_offsets has {len(offsets)} entries for {len(cu_seqlens) - 1} views; give one a view"
        )
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


def _to_host(cu_seqlens: Tensor, offsets: Tensor | None) -> tuple[list[int], list[int]]:
    """The values as Python ints. One wait for the device at most, since a second would double the stall."""
    views = len(cu_seqlens) - 1
    if offsets is None:
        return cu_seqlens.tolist(), [0] * views
    if cu_seqlens.device != offsets.device:
        return cu_seqlens.tolist(), offsets.tolist()
    both = torch.cat([cu_seqlens, offsets]).tolist()
    return both[: views + 1], both[views + 1 :]


def _check_bounds(bounds: list[int], max_seqlen: int, rows: int) -> None:
    if bounds[0] != 0 or bounds[-1] != rows:
        raise ValueError(f"cu_seqlens must run from 0 to N = {rows}, the rows of k; got {bounds[0]} to {bounds[-1]}")
    lengths = [end - start for start, end in pairwise(bounds)]
    for view, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"cu_seqlens must not fall; view {view} runs from {bounds[view]} to {bounds[view + 1]}")
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(f"max_seqlen={max_seqlen}, but the longest view has {max(lengths)} rows; pass at least that")


def _check_offsets(bounds: list[int], offsets: list[int], rows: int) -> None:
    for view, offset in enumerate(offsets):
        end = offset + bounds[view + 1] - bounds[view]
        if offset < 0 or end > rows:
            raise ValueError(
                f"view {view} asks for rows {offset}:{end} of key_positions, which has {rows}; "
                "check position_offsets against the grids the table was made for"
            )
