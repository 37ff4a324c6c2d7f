"""Where an encoder's tokens looked: what each took of the image, as a map over the source pixels.

A compressor tells what a token takes of each feature of its view (``attention_weights``, see
:class:`uhd.resampler.protocol.Compressor`); a feature is a rectangle of the view, and :mod:`uhd.slicing.coordinates`
says which rectangle of the image that is. A weight is spread evenly over its rectangle, by exact areas.

What a feature itself saw is not part of it: inside a ViT every patch attends to all others of its view.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uhd import saving
from uhd.batch import SliceBatch
from uhd.grids import Grid, as_grid
from uhd.merge import assemble
from uhd.resampler.stitch import feature_lengths, pack_features
from uhd.schema import TokenLayout
from uhd.slicing import SlicePlan, view_to_image

LONGEST = 256
"""Px of a map's longer side, unless told."""


def attention_maps(
    self: Any, images: Sequence[Any] | SliceBatch, size_hw: tuple[int, int] | None = None, heads: bool = False
) -> list[Tensor]:
    """Where each visual token of images looked, over their source pixels.

    A perceiver's weights are its softmax's, the mean of its layers; a spatial or pyramid resampler's are taken back
    through the pooling of its windows. What joins blocks of patches has no weights: a token looked at its block
    evenly. Where a strategy puts maps together (LLaVA-NeXT), a token looked at what stitching, un-padding and pooling
    made it of; learned newlines and separators looked at nothing, and have no map.

    Padding is no part of the image: what a token took of it is left out, and the rest of its map is scaled up to 1;
    a patch partly on padding counts for the part that is not. A token that saw nothing but padding has an even map.
    What a crop cut off, and a view's rim that no patch covers, is 0.

    Args:
        images: As in :meth:`VisualEncoder.forward`, or a batch that :meth:`VisualEncoder.prepare` made.
        size_hw: (h, w) of all maps. ``None``: each image's own shape with a longer side of 256. An image's maps are
            ``num_visual_tokens * h * w`` numbers, so a smaller size is the way to spare memory.
        heads: A map for each head of the attention; their mean is the map without.

    Returns:
        For each image (plan.num_visual_tokens, h, w), or (plan.num_visual_tokens, H, h, w) with ``heads``: float32, on
        the encoder's device, without gradients. Each map sums to 1.

    Raises:
        ValueError: The compressor tells no weights, or not those of the plan's tokens; ``size_hw`` has a side below 1;
            the encoder was only described; as in :meth:`VisualEncoder.prepare`.
        TypeError: ``size_hw`` is not two whole numbers.
    """
    size_hw = None if size_hw is None else as_grid(size_hw, "size_hw")
    saving.refuse_described(self)
    if not hasattr(self.compressor, "attention_weights"):
        raise ValueError(
            f"{type(self.compressor).__name__} does not tell where its tokens look: give it attention_weights("
            "features, grids), see uhd.resampler.Compressor"
        )
    batch = images if isinstance(images, SliceBatch) else self.prepare(images)
    found = []
    with torch.no_grad():
        for one in batch.split_images():
            (plan,) = one.plans
            found.append(_image_maps(self, one, size_hw or map_size(plan.image_hw), heads))
    return found


def map_size(image_hw: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of an image's maps unless told.

    >>> map_size((1000, 750))
    (256, 192)
    """
    height, width = (max(round(side * LONGEST / max(image_hw)), 1) for side in image_hw)
    return height, width


def _image_maps(encoder: Any, batch: SliceBatch, size_hw: tuple[int, int], heads: bool) -> Tensor:
    (plan,) = batch.plans
    weights, grids = _view_weights(encoder, batch)
    stride = getattr(encoder.vision, "stride", None)
    covered = [_coverage(plan, view, grid, stride, size_hw) for view, grid in enumerate(grids)]
    like = weights[0]
    areas = [tuple(torch.from_numpy(side).to(like.device, like.dtype) for side in sides) for sides in covered]
    if plan.packing is None:
        tokens = [_map([own], [area], size_hw, heads) for own, area in zip(weights, areas, strict=True)]
        return torch.cat(tokens).float()
    made_of = _packed(plan, like).split([len(own) for own in weights], dim=1)
    parts = [torch.einsum("tq,qkn->tkn", share, own) for share, own in zip(made_of, weights, strict=True)]
    return _map(parts, areas, size_hw, heads).float()


def _view_weights(encoder: Any, batch: SliceBatch) -> tuple[list[Tensor], list[Grid]]:
    """Of every view what its tokens took of its features, (q, H, n), and the features' grid."""
    (plan,) = batch.plans
    weights: list[Tensor] = []
    grids: list[Grid] = []
    latents = encoder.asked([view.latents_hw for view in plan.views])
    for patches, of_views in encoder.steps(batch.patches, batch.grids):
        features, of_features = encoder.features(patches, of_views, batch.inner)
        own = (latents[len(grids) : len(grids) + len(of_views)],) if latents else ()
        weights += encoder.compressor.attention_weights(features, of_features, *own)
        grids += of_features
    wanted = feature_lengths(plan)
    if getattr(encoder.compressor, "tokens_per_view", None) is not None and encoder.slicing.nested:
        weights = [own[:count] for own, count in zip(weights, wanted, strict=True)]
    got = [len(own) for own in weights]
    if got != wanted:
        raise ValueError(
            f"the plan's views have {wanted} tokens, the compressor tells where {got} look: see encoder(images)"
        )
    return weights, grids


def _packed(plan: SlicePlan, like: Tensor) -> Tensor:
    """What each visual token is made of by the plan's packing, of all views' features: (num_visual_tokens, q)."""
    features = torch.eye(sum(feature_lengths(plan))).to(like)
    learned = like.new_zeros(len(features))
    return pack_features(features, plan, newline=learned, separator=learned)[_are_visual(plan)]


def _are_visual(plan: SlicePlan) -> Tensor:
    """(num_tokens,) bool: which tokens of a packing are no learned embedding."""
    features, learned = torch.ones(sum(feature_lengths(plan)), 1), torch.zeros(1)
    return pack_features(features, plan, newline=learned, separator=learned)[:, 0] > 0.5


def map_numbers(plan: SlicePlan, layout: TokenLayout) -> Tensor:
    """The number of the map at each position of an image's layout, (num_tokens,); -1 where none is: a separator."""
    if plan.packing is not None:
        visual = _are_visual(plan)
        return torch.where(visual, visual.cumsum(0) - 1, -1)
    nothing = {entry.symbol: torch.full((1,), -1.0) for entry in layout.entries if entry.view is None}
    numbers = torch.arange(plan.num_visual_tokens, dtype=torch.float64)[:, None]
    return assemble(numbers, layout, nothing)[:, 0].long()


def _map(
    parts: Sequence[Tensor], areas: Sequence[tuple[Tensor, Tensor]], size_hw: tuple[int, int], heads: bool
) -> Tensor:
    """Spread weights (T, H, n) of views' features over the image: (T, h, w), or (T, H, h, w)."""
    on_image = [(rows.any(1)[:, None] & columns.any(1)).flatten() for rows, columns in areas]
    parts = [part * there for part, there in zip(parts, on_image, strict=True)]
    total = sum(part.sum(-1) for part in parts)[..., None]
    lost = (total == 0).to(total.dtype)  # to padding, all of it
    parts = [part / (total + lost) for part in parts]
    if not heads:
        parts, lost = [part.mean(1) for part in parts], lost.mean(1)
    found = lost[..., None] / (size_hw[0] * size_hw[1])
    for part, (rows, columns) in zip(parts, areas, strict=True):
        looked = part.flatten(1).any(1)  # few of a packing's tokens are of this view
        if not looked.any():
            continue
        grid = part[looked].unflatten(-1, (len(rows), len(columns)))
        spread = torch.einsum("...rc,rh,cw->...hw", grid, rows, columns)
        found = found.expand(*found.shape[:-2], *size_hw).clone()
        found[looked] += spread
    return found.expand(*found.shape[:-2], *size_hw).contiguous()


def _coverage(
    plan: SlicePlan, view: int, grid_hw: Grid, stride: int | None, size_hw: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """How a feature's weight is spread: (rows, h) and (columns, w), float64; a row sums to 1, or to 0 on padding."""
    start, end = view_to_image(plan, view, (0, 0)), view_to_image(plan, view, (1, 1))
    sides = []
    for axis in range(2):
        reach = plan.views[view].patches_hw[axis] * plan.patch_size  # a rim that no patch covers is not seen
        edges = _edges(grid_hw[axis], reach, stride)
        scale = Fraction(size_hw[axis], plan.image_hw[axis])
        placed = np.array([float((start[axis] + (end[axis] - start[axis]) * edge) * scale) for edge in edges])
        pixels = np.arange(size_hw[axis])
        overlap = np.minimum(placed[1:, None], pixels + 1) - np.maximum(placed[:-1, None], pixels)
        overlap = overlap.clip(0)
        sums = overlap.sum(1, keepdims=True)
        sides.append(np.divide(overlap, sums, out=np.zeros_like(overlap), where=sums > 0))
    return sides[0], sides[1]


def _edges(count: int, reach: int, stride: int | None) -> list[Fraction]:
    """Where ``count`` features of a side of ``reach`` px begin and end, px of the view."""
    if stride is None or count not in (reach // stride, -(-reach // stride)):
        return [Fraction(reach * place, count) for place in range(count + 1)]
    return [Fraction(min(place * stride, reach)) for place in range(count + 1)]
