"""Stitching the feature maps of a plan's views to the tokens of its strategy: pooled, un-padded, with newlines.

>>> from uhd.slicing import plan
>>> cut = plan((336, 672), "llava-next")
>>> features = [torch.zeros(count, 1) for count in feature_lengths(cut)]
>>> len(pack_features(features, cut, newline=torch.ones(1))) == cut.num_tokens
True
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from uhd.grids import Grid
from uhd.settings import check_range
from uhd.slicing.plan import Packing, SlicePlan


def feature_hw(packing: Packing, kind: str) -> Grid:
    """Tell (rows, columns) of the feature map that a packing expects of a view of this kind, before any pooling."""
    return packing.overview_view_hw if kind == "overview" and packing.overview_view_hw else packing.view_hw


def feature_lengths(plan: SlicePlan) -> list[int]:
    """Count the features that every view must bring to :func:`pack_features`, in the order of ``plan.views``.

    >>> from uhd.slicing import plan
    >>> feature_lengths(plan((336, 672), "llava-next"))
    [576, 576, 576]
    """
    if plan.packing is None:
        return [view.num_tokens for view in plan.views]
    return [prod(feature_hw(plan.packing, view.kind)) for view in plan.views]


def pack_features(
    features: Tensor | Sequence[Tensor],
    plan: SlicePlan,
    *,
    newline: Tensor | None = None,
    separator: Tensor | None = None,
) -> Tensor:
    """Turn one image's features into its tokens, by the steps of ``plan.packing`` in their order.

    Every view's map is resized to ``pooled_hw``; the slices' maps are put together (less the ``overlap``), cut to
    ``kept``, resized to ``resized_hw`` and pooled by ``merge``; then come the learned embeddings. The overview and the
    slices keep the plan's order. Resizing is bilinear, corners not aligned, not antialiased; pooling is the mean.

    Args:
        features: For every view of ``plan.views`` its (n, D), row-major; or (V, n, D); or packed (sum of n, D).
        plan: Where there is no packing, the views just follow each other.
        newline: (D,), where the packing has newlines.
        separator: (D,), where the packing has a separator.

    Returns:
        (plan.num_tokens, D); (plan.num_visual_tokens, D) without a packing. Differentiable in all inputs.

    Raises:
        ValueError: Features or embeddings do not fit the plan, or its packing does not give what it counts.

    Source: transformers, models/llava_next and models/llava_onevision ``pack_image_features``, ``apply_pooling``.
    """
    maps = _split(features, plan)
    packing = plan.packing
    if packing is None:
        return torch.cat(maps)
    if packing.newline or packing.overview_newline:
        _check_learned("newline", newline, maps[0], plan)
    if packing.separator is not None:
        _check_learned("separator", separator, maps[0], plan)
    blocks: list[Tensor] = []
    for kind, run in groupby(zip(maps, plan.views, strict=True), key=lambda pair: pair[1].kind):
        parts = [_pooled(part, kind, packing) for part, _ in run]
        if kind == "slice" and packing.map_hw is not None:
            parts = [_detail(parts, plan)]
        parts = [_merged(part, packing.merge) for part in parts]
        ends = packing.overview_newline if kind == "overview" else packing.newline
        blocks.append(torch.cat([_rows(part, newline if ends else None) for part in parts]))
    mark = None if packing.separator is None else separator.to(blocks[0]).unsqueeze(0)
    if packing.separator == "between" and len(blocks) > 1:
        blocks = [part for block in blocks for part in (mark, block)][1:]
    elif packing.separator == "end":
        blocks.append(mark)
    tokens = torch.cat(blocks)
    if len(tokens) != plan.num_tokens:
        raise ValueError(
            f"the packing of {plan.strategy!r} gives {len(tokens)} tokens, its plan counts {plan.num_tokens}"
        )
    return tokens


def _split(features: Tensor | Sequence[Tensor], plan: SlicePlan) -> list[Tensor]:
    wanted = feature_lengths(plan)
    if isinstance(features, Tensor) and features.ndim == 2:
        if len(features) != sum(wanted):
            raise ValueError(
                f"{plan.strategy!r} packs {sum(wanted)} features {wanted}, got {len(features)} packed rows"
            )
        return list(features.split(wanted))
    maps = list(features)
    shapes = [tuple(part.shape) for part in maps]
    if any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
        raise ValueError(f"every view's features must be (n, D) with the same D, got {shapes}")
    if [shape[0] for shape in shapes] != wanted:
        raise ValueError(
            f"{plan.strategy!r} packs {len(wanted)} views of {wanted} features, got {[shape[0] for shape in shapes]}"
        )
    return maps


def _check_learned(name: str, vector: Tensor | None, like: Tensor, plan: SlicePlan) -> None:
    if vector is None or vector.shape != like.shape[1:]:
        got = None if vector is None else tuple(vector.shape)
        raise ValueError(
            f"the packing of {plan.strategy!r} needs {name}=, a learned ({like.shape[1]},) embedding, got {got}: "
            "uhd.resampler.FeaturePacker holds one"
        )


def _pooled(part: Tensor, kind: str, packing: Packing) -> Tensor:
    rows, cols = feature_hw(packing, kind)
    part = rearrange(part, "(h w) d -> h w d", h=rows, w=cols)
    return part if packing.pooled_hw is None else resize_map(part, packing.pooled_hw)


def _detail(parts: list[Tensor], plan: SlicePlan) -> Tensor:
    """Make one map of the slices': stitched, un-padded, resized."""
    packing = plan.packing
    stitched = _stitched(parts, plan.grid, packing.overlap)
    if stitched.shape[:2] != packing.map_hw:
        raise ValueError(
            f"the slices of {plan.strategy!r} make a map of {tuple(stitched.shape[:2])} features (rows, columns), its "
            f"packing says {packing.map_hw}"
        )
    if packing.kept is not None:
        top, left, bottom, right = packing.kept
        stitched = stitched[top:bottom, left:right]
    return stitched if packing.resized_hw is None else resize_map(stitched, packing.resized_hw)


def _stitched(parts: list[Tensor], grid: Grid, overlap: Grid) -> Tensor:
    """Join row-major maps to one (rows, columns, D), without the features on edges that face another map."""
    rows, cols = grid
    leading, trailing = overlap

    def inner(place: int, count: int, length: int) -> slice:
        return slice(leading if place else 0, length - (trailing if place < count - 1 else 0))

    lines = []
    for row in range(rows):
        line = parts[row * cols : (row + 1) * cols]
        cut = [part[inner(row, rows, part.shape[0]), inner(col, cols, part.shape[1])] for col, part in enumerate(line)]
        lines.append(torch.cat(cut, dim=1))
    return torch.cat(lines)


def resize_map(part: Tensor, size_hw: Grid) -> Tensor:
    """Resize a map (rows, columns, D) to ``size_hw``: bilinear, corners not aligned, not antialiased."""
    if tuple(part.shape[:2]) == tuple(size_hw):
        return part
    if not part.numel() or not prod(size_hw):
        return part.new_zeros(*size_hw, part.shape[2])
    channels = rearrange(part, "h w d -> 1 d h w")
    return rearrange(F.interpolate(channels, list(size_hw), mode="bilinear", align_corners=False), "1 d h w -> h w d")


def _merged(part: Tensor, merge: int) -> Tensor:
    """Take the mean of ``merge`` x ``merge`` blocks; a rest at the bottom or right is a block of its own."""
    if merge == 1:
        return part
    if not part.numel():
        return part.new_zeros(-(-part.shape[0] // merge), -(-part.shape[1] // merge), part.shape[2])
    pooled = F.avg_pool2d(rearrange(part, "h w d -> 1 d h w"), merge, ceil_mode=True)
    return rearrange(pooled, "1 d h w -> h w d")


def _rows(part: Tensor, newline: Tensor | None) -> Tensor:
    """Flatten to (rows * columns, D), each row followed by the newline where there is one."""
    if newline is not None:
        end = newline.to(part).expand(part.shape[0], 1, -1)
        part = torch.cat([part, end], dim=1)
    return part.flatten(0, 1)


class FeaturePacker(nn.Module):
    """Holds the learned embeddings of a strategy's packing, and applies :func:`pack_features` with them.

    Args:
        width: D of the tokens.
        newline: Hold one for the ends of feature rows.
        separator: Hold one for between overview and slices, or the end. A strategy whose only embedding is the
            newline (LLaVA-OneVision) ends an image with that.

    Both start as normal noise of standard deviation 1 / sqrt(D), as LLaVA's do.
    """

    def __init__(self, width: int, *, newline: bool = True, separator: bool = False) -> None:
        super().__init__()
        self.width = width
        check_range(self, ("width",), 1, 1 << 20)
        self.newline = nn.Parameter(torch.randn(width) * width**-0.5) if newline else None
        self.separator = nn.Parameter(torch.randn(width) * width**-0.5) if separator else None

    def to_dict(self) -> dict[str, Any]:
        """Give the constructor's arguments in values that JSON takes."""
        newline, separator = self.newline is not None, self.separator is not None
        return {"width": self.width, "newline": newline, "separator": separator}

    def forward(
        self, features: Tensor | Sequence[Tensor] | None = None, plan: SlicePlan | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Turn features into tokens like :func:`pack_features`, with the embeddings held here.

        Without features: the embeddings by its keywords, copied, for many images at one call.
        """
        separator = self.newline if self.separator is None else self.separator
        learned = {"newline": self.newline, "separator": separator}
        if features is None:
            return {name: value.clone() for name, value in learned.items() if value is not None}
        return pack_features(features, plan, **learned)
