"""What every module over packed views needs: a check of the views' grids, and tables kept for each distinct grid."""

from __future__ import annotations

import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

KEPT_GRIDS = 64
KEPT_BYTES = 256 << 20


def as_grid(grid_hw: Sequence[int], name: str = "grid") -> tuple[int, int]:
    """One (rows, columns) pair of positive host integers as a plain tuple.

    Raises:
        TypeError: not two integers.
        ValueError: a side below 1.
    """
    try:
        rows, columns = (operator.index(n) for n in grid_hw)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be two integers (rows, columns); got {grid_hw!r}") from error
    if rows < 1 or columns < 1:
        raise ValueError(f"{name} must be at least (1, 1); got ({rows}, {columns})")
    return rows, columns


def check_grids(grids: Sequence[Sequence[int]] | Tensor) -> tuple[tuple[int, int], ...]:
    """The views' grids as plain tuples.

    Raises:
        TypeError: an entry is not two integers, or a tensor is not on the CPU (reading it would hide a device sync).
        ValueError: a side below 1.
    """
    if isinstance(grids, Tensor):
        if grids.device.type != "cpu":
            raise TypeError(f"grids must be on the host; got a tensor on {grids.device}. Keep the plan's integers")
        grids = grids.tolist()
    return tuple(as_grid(grid, f"grids[{view}]") for view, grid in enumerate(grids))


class _Entry(NamedTuple):
    table: Tensor
    source: Tensor | None  # shares the source's storage, so that its address cannot be given to another tensor
    version: int


class GridTables:
    """Tables that depend on a grid and perhaps on a tensor, such as resized position embeddings.

    A table is used again while its source has the same storage and version, so that no write through autograd's
    bookkeeping, no reassignment and no other device or dtype can leave a stale one. Fused optimizers and writes
    through ``tensor.data`` leave no trace there: call :meth:`refresh` before looking up tables of a source that may
    train. Safe in threads; copies and pickles are empty; the least recently used go when there are more than
    ``kept_grids``, or more than ``kept_bytes``.
    """

    def __init__(self, kept_grids: int = KEPT_GRIDS, kept_bytes: int = KEPT_BYTES) -> None:
        self.kept_grids, self.kept_bytes = kept_grids, kept_bytes
        self._entries: OrderedDict[tuple, _Entry] = OrderedDict()
        self._lock = threading.Lock()
        self._contents: Tensor | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self) -> tuple:
        return GridTables, (self.kept_grids, self.kept_bytes)

    def clear(self) -> None:
        """Forget every table."""
        with self._lock:
            self._entries.clear()

    def refresh(self, source: Tensor) -> None:
        """Forget every table unless ``source``, of which all are made, holds the same numbers as at the last call."""
        if _stamp(source) is None:
            return  # nothing is kept
        contents = contents_of([source])
        if self._contents is None or not torch.equal(contents, self._contents.to(contents.device)):
            self.clear()
            self._contents = contents

    def get(self, key: tuple, source: Tensor | None, make: Callable[[], Tensor]) -> Tensor:
        """The table of ``key`` (a grid, and whatever else ``make`` depends on), made anew where none is valid."""
        stamp = _stamp(source)
        if stamp is None:
            return make()
        version = 0 if source is None else source._version
        with self._lock:
            found = self._entries.get(key)
        if found is None or found.version != version or _stamp(found.source) != stamp:
            with torch.inference_mode(False), torch.no_grad():  # so that it can serve training later
                table, source = make(), None if source is None else source.detach()
            if type(table) not in (Tensor, nn.Parameter):
                return table
            found = _Entry(table, source, version)
        with self._lock:
            self._entries[key] = found
            self._entries.move_to_end(key)
            self._shrink()
        return found.table

    def _shrink(self) -> None:
        while len(self._entries) > 1:
            size = sum(entry.table.nbytes for entry in self._entries.values())
            if len(self._entries) <= self.kept_grids and size <= self.kept_bytes:
                return
            self._entries.popitem(last=False)


def _stamp(source: Tensor | None) -> tuple | None:
    """What tells one storage and view of it from another; ``None`` where that cannot be told: then nothing is kept."""
    if torch.compiler.is_compiling():
        return None
    if source is None:
        return ()
    plain = type(source) in (Tensor, nn.Parameter)
    if not plain or source.is_inference() or (torch.is_grad_enabled() and source.requires_grad):
        return None
    try:
        return source.data_ptr(), source.device, source.dtype, source.shape, source.stride()
    except RuntimeError:  # inside a functorch transform
        return None


def contents_of(sources: Iterable[Tensor]) -> Tensor:
    """A number of all bits of each tensor, and one entry of every row and column: equal for equal contents.

    Fused optimizers and writes through ``tensor.data`` leave no trace in a tensor's version; this sees them.
    """
    parts: list[Tensor] = []
    for source in sources:
        bits = _bits(source.detach())
        parts.append(bits.sum(dtype=torch.int64)[None])
        if source.dim() == 2:
            along = torch.arange(max(source.shape), device=source.device)
            picked = source.detach()[along % source.shape[0], along % source.shape[1]]
            parts.append(_bits(picked).to(torch.int64))
    return torch.cat(parts)


def _bits(tensor: Tensor) -> Tensor:
    """The numbers as integers, in words as long as they fill: sums of long words are the fast ones."""
    flat = tensor.contiguous().flatten()
    size, start, own = flat.nbytes, flat.storage_offset() * flat.itemsize, flat.itemsize
    words = (torch.int64, torch.int32, torch.int16)
    return flat.view(next(w for w in words if own <= w.itemsize and not (size % w.itemsize or start % w.itemsize)))
