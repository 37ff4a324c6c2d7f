"""What a graph of :func:`uhd.export.onnx` is given, made of images with NumPy and Pillow: torch is not imported."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from uhd import tables
from uhd.files import damage_named, read_json
from uhd.pixels import PixelSettings, cut, load_image, move_borders, patchify
from uhd.schema import SpatialSchema
from uhd.schema.counted import slicing_from_dict
from uhd.settings import Settings, check_choice, check_range
from uhd.slicing import SlicePlan, Slicing

FORMAT = 1
"""Version of ``model.json``; another one is refused, never guessed at."""

Grid = tuple[int, int]


@dataclass(frozen=True)
class Positions(Settings):
    """The vision encoder's position table, which is in the graph: what a patch takes from it.

    Attributes:
        table_hw: (rows, columns) of the table.
        mode: ``"bicubic"``, ``"bilinear"``, or ``"nearest"``: one row of the table a patch.
        antialias: As in :func:`uhd.vision.interpolate_pos_embed`.
        shifted: Under ``"nearest"``, where another rule than floor(i * n / length) rounds otherwise: of a side of so
            many patches the numbers i that take the place after that one, or, as -1 - i, before.
        most: Patches along a side up to which ``shifted`` is complete; ``None``: it is for any.
    """

    table_hw: Grid
    mode: str
    antialias: bool
    shifted: dict[str, tuple[int, ...]]
    most: int | None

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ("bicubic", "bilinear", "nearest"))

    def buckets(self, length: int, side: int) -> np.ndarray:
        """The place in a table of ``side`` rows for each of ``length`` patches."""
        if self.most is not None and length > self.most:
            raise ValueError(f"a view of {length} patches a side is more than the {self.most} that this graph knows")
        places = np.arange(length) * side // length
        moved = np.array(self.shifted.get(str(length), ()), dtype=np.int64)
        places[moved[moved >= 0]] += 1
        places[-1 - moved[moved < 0]] -= 1
        return places


@dataclass(frozen=True)
class Keys(Settings):
    """Positions of a compressor's keys: ``"interpolated"`` of a table of ``size`` x ``size``, or ``"sines"`` of so
    many numbers a side."""

    kind: str
    size: int

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("interpolated", "sines"))


@dataclass(frozen=True)
class Windows(Settings):
    """The windows of a spatial resampler, as in :func:`uhd.tables.pool_weights`: ``side`` x ``side`` of them."""

    side: int
    aligned: bool


@dataclass(frozen=True)
class Graph(Settings):
    """What ``model.json`` holds: all about a graph that the host must know.

    Attributes:
        slicing, schema, pixels: ``to_dict()`` of the encoder's.
        patch_size, width: Side of a patch, px; D of the tokens.
        tokens_per_view: Q where every view has as many; ``None``: one for each block of ``blocks``, or each patch.
        dtype: Of weights and tokens: ``"float32"``, ``"float16"``.
        int8: Whether the ViT's blocks have int8 weights.
        positions, keys, windows: Of the inputs that depend on the grids of views; ``None`` where there are none.
        neighbours: Whether a patch is embedded together with those around it.
        merges: How often the ViT joins 2 x 2 patches: those of a window follow each other then, and ``keys``,
            ``windows`` and ``blocks`` are of what it gives.
        blocks: Patches joined on a side, once or several times, the innermost first.
        views, length: Of a graph of fixed shape, which every call is padded to; ``None`` where any number fits.
        error, bound: The largest difference from the encoder's own tokens, relative to the largest token, that was
            found when the graph was written; and the most that was allowed.
        note: The encoder's.
    """

    slicing: dict[str, Any]
    schema: dict[str, Any]
    pixels: dict[str, Any]
    patch_size: int
    width: int
    tokens_per_view: int | None
    dtype: str
    int8: bool
    positions: Positions | None
    keys: Keys | None
    windows: Windows | None
    neighbours: bool
    merges: int
    blocks: tuple[int, ...]
    views: int | None
    length: int | None
    error: float
    bound: float
    note: str

    def __post_init__(self) -> None:
        check_range(self, ("patch_size", "width", "tokens_per_view", "views", "length"))

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **super().to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Graph:
        if (found := data.get("format")) != FORMAT:
            raise ValueError(f"it has format {found!r}; this version reads format {FORMAT}")
        return super().from_dict({name: value for name, value in data.items() if name != "format"})

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Graph:
        """The description beside a graph; a ``ValueError`` names the file where it is missing or damaged."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"there is no {path}: uhd.export.onnx writes it beside the graph")
        with damage_named(path):
            graph = cls.from_dict(read_json(path))
            _ = graph.rule, graph.own_schema, graph.own_pixels  # damage shows here
            return graph

    @cached_property
    def rule(self) -> Slicing:
        return slicing_from_dict(self.slicing)

    @cached_property
    def own_schema(self) -> SpatialSchema:
        return SpatialSchema.from_dict(self.schema)

    @cached_property
    def own_pixels(self) -> PixelSettings:
        """The encoder's, by Pillow: the fast backend is torch's."""
        return PixelSettings.from_dict(self.pixels).replace(backend="pillow", draft=False)

    def cut(self, image: Any, pixels: PixelSettings | None = None) -> tuple[SlicePlan, list[np.ndarray]]:
        """An image's plan, and its views as normalised patches (n, P) float32, in the plan's order.

        Raises:
            ValueError: A view is planned with latents of its own.
        """
        pixels = pixels or self.own_pixels
        picture = load_image(image, settings=pixels)
        plan = move_borders(picture, self.rule.plan((picture.height, picture.width)), self.rule, settings=pixels)
        if fitted := next((canvas.latents_hw for canvas in plan.canvases if canvas.latents_hw), None):
            raise ValueError(
                f"{plan.strategy!r} plans a view with {tuple(fitted)} latents, a graph has one number for all: export "
                "with a slicing that fits none"
            )
        mean, std = (np.array(values, np.float32)[:, None] for values in pixels.mean_std())

        def normalised(view: np.ndarray) -> np.ndarray:
            patches = patchify(view, self.patch_size).astype(np.float32)
            channels = patches.reshape(len(patches), 3, -1)
            return ((channels / np.float32(255) - mean) / std).reshape(patches.shape)

        return plan, [normalised(view) for view in cut(picture, plan, settings=pixels)]

    def arrays(self, views: Sequence[np.ndarray], grids: Sequence[Grid]) -> dict[str, np.ndarray]:
        """The graph's inputs by name, for views of patches (n, P) and their (rows, columns).

        * ``patches`` (V, L, P) float32, normalised, L the longest view's number, zeros after the others';
          ``mask`` (V, L) bool, True where there is a patch;
        * ``position_rows`` (V, L, h) and ``position_columns`` (V, L, w) float32: what a patch takes from the rows and
          columns of the position table; or ``positions`` (V, L) int64, the number of its row;
        * ``neighbours`` (V, L, 9) int64: rows of all V * L patches, V * L for none;
        * ``key_rows``, ``key_columns`` (V, L, side) float32, the same for the compressor's keys; or ``key_sines``
          (n, D / 2) float32 and a patch's row and column, ``key_row_numbers`` and ``key_column_numbers`` (V, L) int64;
        * ``windows`` (V, Q * 12, L) float32, what the pooled keys of a latent's window take from the patches, and
          ``window_mask`` (V, 12) bool, True where there is such a key;
        * ``blocks`` (V, Q, n) int64: rows of all V * L patches that become one token, -1 after a view's last.

        Where the ViT joins patches, those of a window follow each other, and L of what the compressor takes is as much
        smaller.

        Raises:
            ValueError: No views, or more or longer ones than a graph of fixed shape has.
        """
        grids = list(grids)
        if not grids:
            raise ValueError("no views: give at least one image")
        num, length = self._shape([rows * columns for rows, columns in grids])
        grids += [(self.unit, self.unit)] * (num - len(grids))  # those that fill up are read by nobody
        patches = np.zeros((num, length, 3 * self.patch_size**2), np.float32)
        for place, view in enumerate(views):
            patches[place, : len(view)] = view
        lengths = np.array([rows * columns for rows, columns in grids])
        found = {"patches": patches, "mask": np.arange(length) < lengths[:, None]}
        found |= self._positions(grids, length) | self._neighbours(grids, length)
        if self.merges:
            found = self._by_windows(found, grids)
            grids = [(rows >> self.merges, columns >> self.merges) for rows, columns in grids]
            length >>= 2 * self.merges
        for more in (self._keys, self._windows, self._blocks):
            found |= more(grids, length)
        return found

    @property
    def unit(self) -> int:
        """Patches that become one token, along a side."""
        return int(np.prod(self.blocks, dtype=int)) << self.merges

    def _by_windows(self, found: Mapping[str, np.ndarray], grids: Sequence[Grid]) -> dict[str, np.ndarray]:
        """The same with the patches of every view in the order in which the ViT joins them."""
        shape = found["mask"].shape
        order = np.arange(shape[0] * shape[1]).reshape(shape)
        for own, grid in zip(order, grids, strict=True):
            own[: grid[0] * grid[1]] = own[block_order(grid, (2,) * self.merges).ravel()]
        order = order.ravel()
        moved = {
            name: array.reshape(-1, *array.shape[2:])[order].reshape(array.shape) for name, array in found.items()
        }
        if "neighbours" in moved:
            moved["neighbours"] = np.append(np.argsort(order), len(order))[moved["neighbours"]]
        return moved

    def _shape(self, lengths: Sequence[int]) -> tuple[int, int]:
        if self.views is None or self.length is None:
            return len(lengths), max(lengths)
        if len(lengths) > self.views or max(lengths) > self.length:
            raise ValueError(
                f"{len(lengths)} views of up to {max(lengths)} patches do not fit this graph of {self.views} views of "
                f"{self.length}: give fewer images at once, or export with dynamic=True"
            )
        return self.views, self.length

    def _positions(self, grids: Sequence[Grid], length: int) -> dict[str, np.ndarray]:
        table = self.positions
        if table is None:
            return {}
        if table.mode == "nearest":
            ids = [
                np.add.outer(table.buckets(rows, table.table_hw[0]) * table.table_hw[1], places).ravel()
                for rows, columns in grids
                for places in (table.buckets(columns, table.table_hw[1]),)
            ]
            return {"positions": _stacked(ids, length)}
        rows, columns = _shares(grids, length, table.table_hw, table.mode, table.antialias)
        return {"position_rows": rows, "position_columns": columns}

    def _neighbours(self, grids: Sequence[Grid], length: int) -> dict[str, np.ndarray]:
        if not self.neighbours:
            return {}
        none = len(grids) * length
        near = [tables.neighbours(*grid) for grid in grids]
        own = [np.where(n < 0, none, n + place * length) for place, n in enumerate(near)]
        return {"neighbours": _stacked(own, length, none)}

    def _keys(self, grids: Sequence[Grid], length: int) -> dict[str, np.ndarray]:
        if self.keys is None:
            return {}
        if self.keys.kind == "interpolated":
            rows, columns = _shares(grids, length, (self.keys.size,) * 2, "bicubic", False)
            return {"key_rows": rows, "key_columns": columns}
        longest = max(map(max, grids)) if self.length is None else self.length
        places = [np.indices(grid).reshape(2, -1) for grid in grids]
        return {
            "key_sines": tables.sines(self.keys.size, longest),
            "key_row_numbers": _stacked([rows for rows, _ in places], length),
            "key_column_numbers": _stacked([columns for _, columns in places], length),
        }

    def _windows(self, grids: Sequence[Grid], length: int) -> dict[str, np.ndarray]:
        if self.windows is None:
            return {}
        side, bins = self.windows.side, max(a * b for a, b in tables.POOLS)
        found = np.zeros((len(grids), side, side, bins, length), np.float32)
        mask = np.zeros((len(grids), bins), bool)
        for place, grid in enumerate(grids):
            pools = tables.pool_hw(grid)
            rows, columns = (
                tables.pool_weights(n, side, pool, aligned=self.windows.aligned).reshape(side, pool, n)
                for n, pool in zip(grid, pools, strict=True)
            )
            own = np.einsum("gah,fbw->gfabhw", rows, columns).reshape(side, side, pools[0] * pools[1], -1)
            found[place, :, :, : own.shape[2], : own.shape[3]] = own
            mask[place, : own.shape[2]] = True
        return {"windows": found.reshape(len(grids), side * side * bins, length), "window_mask": mask}

    def _blocks(self, grids: Sequence[Grid], length: int) -> dict[str, np.ndarray]:
        if not self.blocks:
            return {}
        order = [block_order(grid, self.blocks) + place * length for place, grid in enumerate(grids)]
        most = max(map(len, order)) if self.length is None else self.length // self.unit**2
        return {"blocks": _stacked(order, most, -1)}


def block_order(grid: Grid, sides: Sequence[int]) -> np.ndarray:
    """The patches of every block, (blocks, patches of one): blocks of ``sides[0]`` a side, of these blocks, and so on.

    Blocks are row-major over the view, and so is what a block is made of at every step.

    >>> block_order((2, 4), (2,)).tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7]]

    Raises:
        ValueError: A side of the grid is no multiple of all sides together.
    """
    rows, columns = grid
    unit = int(np.prod(sides, dtype=int))
    if rows % unit or columns % unit:
        raise ValueError(f"a view of {rows} x {columns} patches cannot be joined by {unit} a side")
    found = np.arange(rows * columns).reshape(rows, columns, 1)
    for side in sides:
        rows, columns = rows // side, columns // side
        found = found.reshape(rows, side, columns, side, -1).swapaxes(1, 2).reshape(rows, columns, -1)
    return found.reshape(rows * columns, -1)


def _stacked(parts: Sequence[np.ndarray], length: int, rest: int = 0) -> np.ndarray:
    """(V, length, ...) int64 of V arrays that are as long or shorter."""
    found = np.full((len(parts), length, *parts[0].shape[1:]), rest, np.int64)
    for place, part in enumerate(parts):
        found[place, : len(part)] = part
    return found


def _shares(
    grids: Sequence[Grid], length: int, table_hw: Grid, mode: str, antialias: bool
) -> tuple[np.ndarray, np.ndarray]:
    """What each patch takes from the rows and from the columns of a table: (V, length, h) and (V, length, w)."""
    found = tuple(np.zeros((len(grids), length, side), np.float32) for side in table_hw)
    for place, grid in enumerate(grids):
        for axis, (share, side) in enumerate(zip(found, table_hw, strict=True)):
            weights = tables.resize_weights(side, grid[axis], mode, antialias, np.float32)
            own = np.repeat(weights, grid[1], axis=0) if axis == 0 else np.tile(weights, (grid[0], 1))
            share[place, : len(own)] = own
    return found  # type: ignore[return-value]


def packed(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What :meth:`Graph.arrays` made, without padding: (N, ...), and ``ends`` (V,) int32 of the views, no mask.

    This is what a program of :func:`uhd.export.torch_program` takes.
    """
    mask = given["mask"]
    found = {"ends": mask.sum(1).cumsum().astype(np.int32)}
    for name, array in given.items():
        if name != "mask":
            found[name] = array if name == "key_sines" else array[mask]
    if "neighbours" in given:
        places = np.append(mask.ravel().cumsum() - 1, mask.sum())  # of a padded row among the packed ones; none: N
        found["neighbours"] = places[found["neighbours"]]
    return found


def inputs(images: Sequence[Any], description: str | os.PathLike[str] | Graph) -> dict[str, np.ndarray]:
    """Images to what an exported graph takes, without torch.

    Args:
        images: A list of paths, Pillow images, bytes or arrays, as :func:`uhd.pixels.load_image` takes them; decoded
            by Pillow, whatever the encoder's backend.
        description: The ``model.json`` that stands beside the graph.

    Returns:
        Arrays under the graph's input names, the views of all images one after the other: see :meth:`Graph.arrays`.

    Raises:
        ValueError, TypeError, OSError: No images, one is refused, by its number in the list; or the description is
            missing or damaged.
    """
    graph = description if isinstance(description, Graph) else Graph.read(description)
    if not isinstance(images, (list, tuple)):
        raise TypeError(f"expected a list of images, got {type(images).__name__}: put one image into a list")
    plans, views = [], []
    for number, image in enumerate(images):
        try:
            plan, own = graph.cut(image)
        except (ValueError, TypeError) as problem:
            raise type(problem)(f"image {number}: {problem}") from problem
        plans.append(plan)
        views += own
    return graph.arrays(views, [view.patches_hw for plan in plans for view in plan.views])
