"""Where slices, overview, separators and markers go in the language model's sequence; the same counts as the plan's.

Every separator and every marker is one position, whatever the tokenizer would make of its text, so the number of
positions is known from the grid alone. Their ids are the business of :mod:`uhd.schema.separators`.
"""

from __future__ import annotations

import itertools
import operator
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from uhd.settings import Settings, check_choice, plain_name, unknown_name
from uhd.slicing import PRESETS as SLICING_PRESETS
from uhd.slicing import SeparatorCount, SlicePlan, SlicingConfig

Marks = tuple[str, str]
NO_MARKS: Marks = ("", "")
OVERVIEW = "overview"

_VIEW_SYMBOL = re.compile(r"s\d+|overview")
_RESERVED = re.compile(r"s\d+|overview|\d+")


@dataclass(frozen=True)
class SpatialSchema(Settings):
    """The order of an image's views and the symbols around and between them. Frozen, hashable, JSON-able.

    An image is ``around_image(image id, overview, around_slices(slices))``, with the overview first or last; an uncut
    image has no slices. A separator "after every slice" is one between them plus a closing mark of ``around_slices``.
    The empty string is no symbol.

    Attributes:
        name: The preset this came from.
        column, row: Between two slices of a row, and between two rows.
        around_slice, around_slices, around_overview, around_image: Pairs (before, after) around each slice, all slices
            of a cut image, the overview, and everything.
        image_id: Pair around the image's number in its sample, which is one symbol; ``None``: images have no numbers.
        overview: ``"first"`` or ``"last"``.
        learned: Those of the symbols that have an embedding of their own rather than the tokenizer's.

    Raises:
        ValueError, TypeError: A setting is wrong; the message names it.
    """

    name: str = "custom"
    column: str = ","
    row: str = "\n"
    around_slice: Marks = NO_MARKS
    around_slices: Marks = NO_MARKS
    around_overview: Marks = NO_MARKS
    around_image: Marks = NO_MARKS
    image_id: Marks | None = None
    overview: str = "last"
    learned: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in ("column", "row"):
            if not isinstance(getattr(self, key), str):
                raise TypeError(f'{key} must be a string ("" for none), got {getattr(self, key)!r}')
        for key in ("around_slice", "around_slices", "around_overview", "around_image", "image_id"):
            marks = getattr(self, key)
            is_pair = isinstance(marks, tuple) and len(marks) == 2 and all(isinstance(mark, str) for mark in marks)
            if not is_pair and not (key == "image_id" and marks is None):
                raise TypeError(f'{key} must be a tuple of two strings ("" for none), got {marks!r}')
        check_choice("overview", self.overview, ("first", "last"))
        for symbol in self.separators:
            if _RESERVED.fullmatch(symbol):
                raise ValueError(
                    f"{symbol!r} cannot be a separator: s0, s1, ..., overview and numbers name views and images"
                )
        unused = [symbol for symbol in self.learned if symbol not in self.separators]
        if not isinstance(self.learned, tuple) or unused:
            raise ValueError(f"learned must be a tuple of symbols that this schema uses, got {self.learned!r}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SpatialSchema:
        """A named preset, or that of a slicing preset under its name, with other fields as in ``changes``.

        Raises:
            ValueError: No such preset; the message lists the nearest names and all of them.
        """
        key = plain_name(name)
        if key in PRESETS:
            return PRESETS[key].replace(**changes) if changes else PRESETS[key]
        if key in _SCHEMA_OF_SLICING:
            return PRESETS[_SCHEMA_OF_SLICING[key]].replace(**{"name": key, **changes})
        raise unknown_name("schema", name, [*PRESETS, *_SCHEMA_OF_SLICING])

    @property
    def separators(self) -> tuple[str, ...]:
        """Every separator and mark once, in order of the fields; an image's number is not among them."""
        pairs = (self.around_slice, self.around_slices, self.around_overview, self.around_image, self.image_id or ())
        found = (self.column, self.row, *itertools.chain.from_iterable(pairs))
        return tuple(dict.fromkeys(symbol for symbol in found if symbol))

    @property
    def slicing_preset(self) -> str:
        """Name of the slicing preset that this schema was released with; a ``ValueError`` where it is no preset."""
        if self.name in _SLICING_OF_SCHEMA:
            return _SLICING_OF_SCHEMA[self.name]
        if self.name in SLICING_PRESETS:
            return self.name
        raise ValueError(f"schema {self.name!r} has no slicing of its own: pass a base to slicing_config")

    def slicing_config(self, base: SlicingConfig | str | None = None) -> SlicingConfig:
        """A planner's settings that agree with this schema in separators and in the place of the overview.

        Args:
            base: Settings or a slicing preset's name to start from; ``None`` is what the schema was released with,
                tokens per view included. A ``ValueError`` where there is no such preset.

        >>> SpatialSchema.preset("minicpm-v-2.5").slicing_config().tokens_per_view
        96
        """
        changes: dict[str, Any] = {}
        if base is None:
            base = self.slicing_preset
            if self.name in _TOKENS_PER_VIEW:
                changes["tokens_per_view"] = _TOKENS_PER_VIEW[self.name]
        config = SlicingConfig.preset(base) if isinstance(base, str) else base
        first = self.overview == "first"
        return config.replace(separators=self.separator_count(), overview_first=first, **changes)

    def separator_count(self) -> SeparatorCount:
        """How many positions that are no view's the schema adds, as a rule on the grid.

        >>> SpatialSchema.preset("llava-uhd").separator_count()
        SeparatorCount(per_image=0, per_cut=0, per_slice=1, per_row=0)
        """

        def size(*symbols: str) -> int:
            return sum(map(bool, symbols))

        numbering = () if self.image_id is None else (*self.image_id, "number")
        column, row = size(self.column), size(self.row)
        # rows * (cols - 1) columns and rows - 1 rows, sorted by what they grow with
        return SeparatorCount(
            per_image=size(*self.around_image, *self.around_overview, *numbering),
            per_cut=size(*self.around_slices) - row,
            per_slice=size(*self.around_slice) + column,
            per_row=row - column,
        )

    def symbols(self, grid: tuple[int, int] | None, *, image_index: int = 0) -> tuple[str, ...]:
        """The image's sequence for a (rows, columns) grid, or for an uncut image (``None``).

        Slices are ``"s0"``, ``"s1"``, ... row-major, the overview is ``"overview"``; every other symbol is a
        separator, a mark or the image's number.

        Raises:
            ValueError: The grid is not two positive ints, or the index is negative.

        >>> SpatialSchema.preset("llava-uhd").symbols((2, 1))
        ('s0', '\\n', 's1', '\\n', 'overview')
        """
        return self._sequence([] if grid is None else [_check_grid(grid)], 1, image_index)

    def _sequence(self, grids: Iterable[tuple[int, int]], overviews: int, image_index: int) -> tuple[str, ...]:
        if image_index < 0:
            raise ValueError(f"image_index counts a sample's images from 0, got {image_index}")
        number = [] if self.image_id is None else _around(self.image_id, [str(image_index)])
        overview = _around(self.around_overview, [OVERVIEW]) * overviews
        cut: list[str] = []
        first = 0
        for rows, cols in grids:
            cells = [_around(self.around_slice, [f"s{first + place}"]) for place in range(rows * cols)]
            lines = [_joined(self.column, cells[row * cols : (row + 1) * cols]) for row in range(rows)]
            cut += _around(self.around_slices, _joined(self.row, lines))
            first += rows * cols
        body = overview + cut if self.overview == "first" else cut + overview
        return tuple(symbol for symbol in _around(self.around_image, number + body) if symbol)


class Entry(NamedTuple):
    """One symbol of a laid-out image and its positions ``start .. stop - 1``; ``view`` indexes ``plan.views``."""

    symbol: str
    view: int | None
    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class TokenLayout:
    """One image's part of the language model's sequence, as ``schema`` orders it. Positions count from its first one.

    ``entries`` are its symbols with the positions they take: a view as many as it has visual tokens, any other one.
    """

    entries: tuple[Entry, ...]
    schema: SpatialSchema

    @property
    def symbols(self) -> tuple[str, ...]:
        """The entries' names, e.g. ``("s0", ",", "s1", "\\n", "overview")``."""
        return tuple(entry.symbol for entry in self.entries)

    @property
    def num_tokens(self) -> int:
        return self.entries[-1].stop

    @property
    def num_visual_tokens(self) -> int:
        return sum(self.tokens_per_view)

    @property
    def num_separators(self) -> int:
        """Positions of separators, marks and the image's number."""
        return self.num_tokens - self.num_visual_tokens

    @property
    def view_order(self) -> tuple[int, ...]:
        """Indices into ``plan.views`` as they come in the sequence."""
        return tuple(entry.view for entry in self.entries if entry.view is not None)

    @property
    def tokens_per_view(self) -> tuple[int, ...]:
        """Visual tokens of every view, in the order of ``plan.views``; with a packing, of the whole image."""
        return tuple(stop - start for start, stop in self._spans)

    @cached_property
    def _spans(self) -> tuple[tuple[int, int], ...]:
        views = sorted((entry for entry in self.entries if entry.view is not None), key=lambda entry: entry.view)
        return tuple((entry.start, entry.stop) for entry in views)

    def span(self, view_index: int) -> tuple[int, int]:
        """(start, stop) of a view's positions, by its index in ``plan.views``; :meth:`view_at` is the inverse."""
        if not 0 <= view_index < len(self._spans):
            raise IndexError(f"view index {view_index} is outside 0..{len(self._spans) - 1}")
        return self._spans[view_index]

    def view_at(self, position: int) -> int | None:
        """Index in ``plan.views`` of the view at a position, ``None`` at a separator or mark."""
        if not 0 <= position < self.num_tokens:
            raise IndexError(f"position {position} is outside 0..{self.num_tokens - 1}")
        return self.entries[bisect_right(self.entries, position, key=lambda entry: entry.start) - 1].view

    def text(self, view: str | Callable[[Entry], str] = "[{symbol}:{tokens}]") -> str:
        """The sequence as text, for people and for comparison; it is not meant to be tokenised.

        ``view`` is what stands for a view: a format string that may use ``{symbol}``, ``{tokens}`` and ``{index}`` (in
        ``plan.views``), or a function of its :class:`Entry`, e.g. ``lambda e: "<unk>" * e.num_tokens``.
        """
        write = view if callable(view) else lambda e: view.format(symbol=e.symbol, tokens=e.num_tokens, index=e.view)
        return "".join(entry.symbol if entry.view is None else write(entry) for entry in self.entries)

    def __str__(self) -> str:
        return self.text()


def layout(
    plan: SlicePlan,
    schema: SpatialSchema | str | None = None,
    *,
    image_index: int = 0,
    tokens_per_view: int | Sequence[int] | None = None,
) -> TokenLayout:
    """Lay out one planned image.

    Views are matched by kind, not by place: the plan's slices become ``s0``, ``s1``, ... in their own order and its
    overview goes where the schema wants it. A plan without slices or overview has those symbols left out. Several
    canvases of slices follow each other as separate cut parts, unless their slices fill the plan's grid row by row.
    ``plan.num_separators`` is the strategy's own count.

    Args:
        plan: From any strategy.
        schema: Or a preset's name; ``None`` is ``"llava-uhd"``.
        image_index: The image's number in its sample, for schemas that write it.
        tokens_per_view: Visual tokens of every view, or one number for each in the order of ``plan.views``; ``None``
            takes the plan's.

    Raises:
        ValueError: The plan has no views, its slices do not fill their grid, its tokens are not counted by view (as
            those of AnyRes) while ``tokens_per_view`` is ``None``, or the given numbers do not fit.

    >>> from uhd.slicing import plan
    >>> print(layout(plan((1008, 672)), "minicpm-v-2.6").text("{symbol} "))
    <image_id>0</image_id><image>overview </image><slice>s0 </slice><slice>s1 </slice>
    <slice>s2 </slice><slice>s3 </slice>
    <slice>s4 </slice><slice>s5 </slice>
    >>> layout(plan((1008, 672))).span(6)
    (390, 454)
    """
    if not isinstance(schema, SpatialSchema):
        schema = SpatialSchema.preset("llava-uhd" if schema is None else schema)
    if not plan.views:
        raise ValueError(f"the plan of {plan.strategy!r} has no views, there is nothing to lay out")
    cut = [canvas for canvas in plan.canvases if canvas.kind == "slice"]
    for canvas in cut:
        if len(canvas.tiles) != canvas.grid[0] * canvas.grid[1]:
            raise ValueError(
                f"{plan.strategy!r} cut {len(canvas.tiles)} slices for a grid {canvas.grid} (rows, columns): "
                "rows and columns cannot be told apart, lay it out with your own code"
            )
    counts = _token_counts(plan, tokens_per_view)
    views = [view for view in plan.views if view.kind == "slice"]
    grids, slices = [canvas.grid for canvas in cut], iter([view.index for view in views])
    if plan.grid and [(view.row, view.col) for view in views] == list(itertools.product(*map(range, plan.grid))):
        grids = [plan.grid]
    overviews = [view.index for view in plan.views if view.kind == OVERVIEW]
    overview = iter(overviews)
    entries, start = [], 0
    for symbol in schema._sequence(grids, len(overviews), image_index):
        index = None
        if _VIEW_SYMBOL.fullmatch(symbol):
            index = next(overview if symbol == OVERVIEW else slices)
        stop = start + (1 if index is None else counts[index])
        entries.append(Entry(symbol, index, start, stop))
        start = stop
    return TokenLayout(tuple(entries), schema)


def parse_symbols(symbols: Sequence[str], schema: SpatialSchema) -> tuple[int, int] | None:
    """The (rows, columns) grid of a sequence, ``None`` for an uncut image: inverse of :meth:`SpatialSchema.symbols`.

    Raises:
        ValueError: The sequence is not one of the schema's (the message gives the position), or the schema writes the
            same sequence for several grids, as one without separators does.

    >>> schema = SpatialSchema.preset("llava-uhd")
    >>> parse_symbols(("s0", ",", "s1", "\\n", "overview"), schema)
    (1, 2)
    """
    symbols = tuple(symbols)
    slices = sum(bool(_VIEW_SYMBOL.fullmatch(symbol)) and symbol != OVERVIEW for symbol in symbols)
    number = next((int(symbol) for symbol in symbols if re.fullmatch(r"\d+", symbol)), 0)
    grids = [(rows, slices // rows) for rows in range(1, slices + 1) if slices % rows == 0] or [None]
    options = {grid: schema.symbols(grid, image_index=number) for grid in grids}
    found = [grid for grid, option in options.items() if option == symbols]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"schema {schema.name!r} writes the same symbols for the grids {found}: its grid is not in them"
        )
    agreed = {
        grid: sum(itertools.takewhile(bool, map(operator.eq, symbols, option))) for grid, option in options.items()
    }
    position = max(agreed.values())
    wanted = {options[grid][position : position + 1] for grid, length in agreed.items() if length == position}
    got = repr(symbols[position]) if position < len(symbols) else "the end"
    names = sorted(repr(option[0]) if option else "the end" for option in wanted)
    raise ValueError(f"position {position}: got {got}, schema {schema.name!r} expects {' or '.join(names)} there")


def _token_counts(plan: SlicePlan, tokens_per_view: int | Sequence[int] | None) -> tuple[int, ...]:
    num_views = len(plan.views)
    if tokens_per_view is None:
        counts = tuple(view.num_tokens for view in plan.views)
        if not plan.tokens_by_view:
            raise ValueError(
                f"{plan.strategy!r} counts {plan.num_visual_tokens} visual tokens for the whole image, its "
                f"{num_views} views alone {sum(counts)}: pass tokens_per_view, what your compressor gives each"
            )
        return counts
    if not isinstance(tokens_per_view, Iterable):
        tokens_per_view = (tokens_per_view,) * num_views
    counts = tuple(operator.index(count) for count in tokens_per_view)
    if len(counts) != num_views or min(counts) < 1:
        raise ValueError(f"tokens_per_view must be {num_views} positive numbers, one a view, got {counts}")
    return counts


def _check_grid(grid: tuple[int, int]) -> tuple[int, int]:
    try:
        rows, cols = map(operator.index, grid)
    except (TypeError, ValueError):
        raise ValueError(f"a grid is two ints (rows, columns), or None for an uncut image, got {grid!r}") from None
    if rows < 1 or cols < 1:
        raise ValueError(f"a grid has at least one row and one column, got {rows} rows and {cols} columns")
    return rows, cols


def _around(marks: Marks, symbols: list[str]) -> list[str]:
    return [marks[0], *symbols, marks[1]]


def _joined(separator: str, parts: Sequence[list[str]]) -> list[str]:
    """The parts as one list, with the separator between them."""
    first, *rest = parts
    return first + [symbol for part in rest for symbol in (separator, *part)]


_IMAGE, _SLICE = ("<image>", "</image>"), ("<slice>", "</slice>")

# MiniCPM-V 2.5: the slices are images themselves, <slice> is around all of them
_MINICPM_2_5 = SpatialSchema(
    name="minicpm-v-2.5",
    column="",
    around_slice=_IMAGE,
    around_slices=_SLICE,
    around_overview=_IMAGE,
    overview="first",
)
_MINICPM_2_6 = _MINICPM_2_5.replace(
    name="minicpm-v-2.6", around_slice=_SLICE, around_slices=NO_MARKS, image_id=("<image_id>", "</image_id>")
)

PRESETS: dict[str, SpatialSchema] = {
    schema.name: schema
    for schema in (
        # thunlp/LLaVA-UHD: "," or "\n" after every slice, so the last row is closed too
        SpatialSchema(name="llava-uhd", around_slices=("", "\n")),
        # arXiv 2403.11703: "," separates the slices of a row, "\n" the rows
        SpatialSchema(name="llava-uhd-paper"),
        # ParadoxZW/LLaVA-UHD-Better: three trained vectors, one of them between the last slice and the overview
        SpatialSchema(
            name="llava-uhd-better",
            column="sep0",
            row="sep1",
            around_slices=("", "sep2"),
            learned=("sep0", "sep1", "sep2"),
        ),
        _MINICPM_2_5.replace(name="minicpm-v-2.0", around_image=("", "\n")),
        _MINICPM_2_5,
        _MINICPM_2_6,
        _MINICPM_2_6.replace(name="minicpm-v-4.6"),
    )
}
"""Schemas by name, as released."""

_SCHEMA_OF_SLICING = {
    "llava-uhd-safe": "llava-uhd",
    "minicpm-v": "minicpm-v-2.6",
    "minicpm-v-4.6-4x": "minicpm-v-4.6",
    "uhd-plus": "llava-uhd",
}
_SLICING_OF_SCHEMA = {
    "llava-uhd-better": "llava-uhd-paper",
    "minicpm-v-2.0": "minicpm-v",
    "minicpm-v-2.5": "minicpm-v",
    "minicpm-v-2.6": "minicpm-v",
}
_TOKENS_PER_VIEW = {"minicpm-v-2.5": 96}
