"""Where the images and videos of a batch stand in a prompt, counted before anything is merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from uhd.encoded import EncodedImage, EncodedVideo, num_rows
from uhd.schema import Entry, SpatialSchema, TokenLayout
from uhd.schema.counted import layout_of, video_layout
from uhd.schema.layout import OVERVIEW
from uhd.slicing import SlicePlan, VideoPlan


@dataclass(frozen=True)
class GridItem:
    """An image of the adaptive planner: its views' numbers of tokens and its grid of slices."""

    counts: tuple[int, ...]
    grid: tuple[int, int] | None
    overview_first: bool
    schema: SpatialSchema

    @property
    def rows(self) -> int:
        """Visual tokens."""
        return sum(self.counts)

    @property
    def num_tokens(self) -> int:
        """Positions, separators included."""
        return self.rows + self.schema.separator_count().count(self.grid)

    def layout(self, index: int) -> TokenLayout:
        """Where its views go, as the ``index``-th image of its sample."""
        entries, stop = [], 0
        for symbol in self.schema.symbols(self.grid, image_index=index):
            view = None
            if symbol == OVERVIEW:
                view = 0 if self.overview_first else len(self.counts) - 1
            elif symbol[0] == "s" and symbol[1:].isdigit():
                view = int(symbol[1:]) + self.overview_first
            start, stop = stop, stop + (1 if view is None else self.counts[view])
            entries.append(Entry(symbol, view, start, stop))
        return TokenLayout(tuple(entries), self.schema)


@dataclass(frozen=True)
class PlannedItem:
    """An image or a video of any strategy, by its plan."""

    plan: SlicePlan | VideoPlan
    schema: SpatialSchema

    @property
    def rows(self) -> int:
        return _rows(self.plan)

    @property
    def num_tokens(self) -> int:
        return self.layout(0).num_tokens

    def layout(self, index: int) -> TokenLayout:
        if isinstance(self.plan, VideoPlan):
            return video_layout(self.plan, self.schema)
        return layout_of(self.plan, self.schema, image_index=index)


@dataclass(frozen=True, eq=False)
class Media:
    """Visual tokens (M, D) of the images, or of the videos, of a batch, and how each of them is laid out."""

    tokens: Tensor
    items: tuple[GridItem | PlannedItem, ...]

    @property
    def lengths(self) -> list[int]:
        return [item.num_tokens for item in self.items]


def _rows(item: SlicePlan | VideoPlan) -> int:
    """Rows of the item's visual tokens."""
    return num_rows(item) if isinstance(item, SlicePlan) else sum(map(num_rows, item.plans)) + item.newline


def check_schemas(items: Sequence[EncodedImage | EncodedVideo], schema: SpatialSchema) -> None:
    for place, item in enumerate(items):
        wanted = PlannedItem(item.plan, schema).layout(0).schema
        if item.layout.schema.replace(name=wanted.name) != wanted:
            kind = "video" if isinstance(item, EncodedVideo) else "image"
            raise ValueError(
                f"encoded {kind} {place} is laid out by schema {item.layout.schema.name!r}, the model by "
                f"{schema.name!r}: encode it again with model.visual"
            )


def group(
    lengths: Sequence[int], num_views: Sequence[int], slices: Sequence[tuple[int, int] | None]
) -> tuple[tuple[tuple[int, ...], tuple[int, int] | None], ...]:
    """Every image's numbers of tokens by view, and its grid of slices."""
    if len(num_views) != len(slices) or sum(num_views) != len(lengths):
        raise ValueError(
            f"num_patches counts {sum(num_views)} views of {len(num_views)} images, there are {len(lengths)} views "
            f"and grids of {len(slices)} images: pass everything that the processor returned"
        )
    images, start = [], 0
    for image, (count, grid) in enumerate(zip(num_views, slices, strict=True)):
        wanted = 1 + (0 if grid is None else grid[0] * grid[1])
        if count != wanted:
            raise ValueError(
                f"image {image} has {count} views, a grid of {grid or 'no'} slices and an overview are {wanted}: its "
                "processor plans otherwise than this model"
            )
        images.append((tuple(lengths[start : start + count]), grid))
        start += count
    return tuple(images)


def match(counts: Sequence[int], lengths: Sequence[int], kind: str = "image") -> list[int]:
    """Number of each image (or video) in its sample, where samples of so many positions take some of these lengths."""
    indices: list[int] = []
    for sample, wanted in enumerate(counts):
        first, got = len(indices), 0
        while got < wanted and len(indices) < len(lengths):
            got += lengths[len(indices)]
            indices.append(len(indices) - first)
        if got != wanted:
            taken = lengths[first : len(indices)]
            raise ValueError(
                f"sample {sample} has {wanted} {kind} positions, its {len(taken)} {kind}s take {sum(taken)} "
                f"({list(taken)}); the batch has {sum(counts)} positions and {len(lengths)} {kind}s of "
                f"{sum(lengths)}. Prompts come from the processor, with its slicing that of the model, and are never "
                "cut"
            )
    if len(indices) < len(lengths):
        raise ValueError(
            f"the batch has {len(lengths)} {kind}s, its samples' {kind} positions ({list(counts)}) take "
            f"{len(indices)} of them: every {kind} needs its place in a prompt"
        )
    return indices
