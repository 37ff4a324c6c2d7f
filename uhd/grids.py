"""What every module over packed views needs: the check of the views' grids, and work done grid by grid.

Packed means that the patches of all views follow each other, (N, ...), row-major inside a view. A view's grid is its
(rows, columns) in patches, known on the host.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

Grid = tuple[int, int]
"""(rows, columns) of a view, in patches."""

_Key = TypeVar("_Key", bound=Hashable)


def as_grid(grid_hw: Sequence[int], name: str = "grid") -> tuple[int, int]:
    """Check one (rows, columns) pair of positive host integers, and give it as a plain tuple.

    Raises:
        TypeError: not two integers.
        ValueError: a side below 1.

    >>> as_grid([2, 3])
    (2, 3)
    """
    try:
        rows, columns = (operator.index(n) for n in grid_hw)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be two integers (rows, columns); got {grid_hw!r}") from error
    if rows < 1 or columns < 1:
        raise ValueError(f"{name} must be at least (1, 1); got ({rows}, {columns})")
    return rows, columns


def check_grids(grids: Sequence[Sequence[int]] | Tensor) -> tuple[tuple[int, int], ...]:
    """Check the grids of all views, as `as_grid` does, and give them as plain tuples.

    Raises:
        TypeError: also where a tensor is not on the CPU (reading it would hide a device sync).
    """
    if isinstance(grids, Tensor):
        if grids.device.type != "cpu":
            raise TypeError(f"grids must be on the host; got a tensor on {grids.device}. Keep the plan's integers")
        grids = grids.tolist()
    return tuple(as_grid(grid, f"grids[{view}]") for view, grid in enumerate(grids))


def split_views(packed: Tensor, grids: Sequence[Grid]) -> tuple[Tensor, ...]:
    """Split packed rows (N, ...) into the views' own, (rows * columns, ...) each."""
    return packed.split([rows * columns for rows, columns in grids])


def group_views(keys: Iterable[_Key]) -> dict[_Key, list[int]]:
    """Collect the views that share a key, such as their grid or their length.

    >>> group_views([(2, 3), (4, 1), (2, 3)])
    {(2, 3): [0, 2], (4, 1): [1]}
    """
    groups: dict[_Key, list[int]] = {}
    for view, key in enumerate(keys):
        groups.setdefault(key, []).append(view)
    return groups


def map_by_grid(compute: Callable[[Grid, list[int]], Iterable[Tensor]], grids: Sequence[Grid]) -> list[Tensor]:
    """Call `compute` once for each distinct grid, and put its results back in the order of the views.

    Args:
        compute: takes a grid and the views that have it; gives one result for each of them.
        grids: of all views.

    >>> map_by_grid(lambda grid, views: [f"{grid} of view {view}" for view in views], [(2, 3), (4, 1), (2, 3)])
    ['(2, 3) of view 0', '(4, 1) of view 1', '(2, 3) of view 2']
    """
    results: dict[int, Tensor] = {}
    for grid, views in group_views(grids).items():
        results.update(zip(views, compute(grid, views), strict=True))
    return [results[view] for view in range(len(grids))]


def join_blocks(packed: Tensor, grids: Sequence[Grid], side: int) -> Tensor:
    """Put the patches of every `side` x `side` block side by side: (N, D) -> (N / side**2, side**2, D).

    Views stay in order, blocks are row-major inside a view, patches row-major inside a block. The sides of all grids
    must be multiples of `side`, which `shrink_grids` checks.

    >>> join_blocks(torch.arange(8)[:, None], [(2, 4)], 2).squeeze(-1).tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    blocks = [
        rearrange(view, "(h a w b) d -> (h w) (a b) d", h=rows // side, a=side, b=side)
        for view, (rows, _) in zip(split_views(packed, grids), grids, strict=True)
    ]
    return torch.cat(blocks) if blocks else packed.new_zeros(0, side**2, packed.shape[1])


def shrink_grids(grids: Sequence[Sequence[int]] | Tensor, factor: int, advice: str) -> tuple[Grid, ...]:
    """Divide the sides of every grid by `factor`.

    Args:
        grids: of all views, as `check_grids` takes them.
        factor: how many patches along a side become one.
        advice: ends the error message about a side that is no multiple of the factor.

    Raises:
        TypeError, ValueError: as `check_grids`, and for such a side.

    >>> shrink_grids([(4, 8)], 2, "plan with merge=2")
    ((2, 4),)
    """
    grids = check_grids(grids)
    for view, (rows, columns) in enumerate(grids):
        if rows % factor or columns % factor:
            raise ValueError(f"grids[{view}] is {(rows, columns)}; both sides must be multiples of {factor}: {advice}")
    return tuple((rows // factor, columns // factor) for rows, columns in grids)


def made_once(make: Callable[..., np.ndarray]) -> Callable[..., Tensor]:
    """Decorate a function of plain numbers that makes an array: the array is made once and comes as a CPU tensor.

    All callers share the tensor's memory, so none may write to it. Arrays are kept rather than tensors since those
    would remember the mode they were made in (inference, fake tensors); `torch.compile` traces `make` itself.
    """
    kept = functools.lru_cache(maxsize=256)(make)

    @functools.wraps(make)
    def table(*args: object, **kwargs: object) -> Tensor:
        return torch.from_numpy((make if torch.compiler.is_compiling() else kept)(*args, **kwargs))

    return table


def sent(table: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Send a small table from the host to a device; to CUDA without waiting for what runs there.

    CUDA has read ordinary memory when the call returns. Other devices may read it later, so these are waited for.
    """
    return table.to(device, dtype, non_blocking=device.type == "cuda")
