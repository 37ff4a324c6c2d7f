"""The tensors that a processor gives, and that a model's ``forward`` takes beside text, turned into visual tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from uhd.batch import SliceBatch
from uhd.encoded import num_rows
from uhd.encoder import VisualEncoder
from uhd.hf.placing import GridItem, Media, PlannedItem, check_schemas, group
from uhd.hf.plans import read_plans
from uhd.hf.processing import pack_encoded, pack_encoded_videos
from uhd.slicing import SlicePlan, VideoPlan, plan

VISUAL_INPUTS = (
    "pixel_values",
    "grids",
    "num_patches",
    "slice_grids",
    "image_sizes",
    "image_tokens",
    "view_tokens",
    "image_plans",
    "pixel_values_videos",
    "video_grids",
    "video_plans",
    "video_tokens",
)
"""What a processor gives beside text."""


def by_name(*values: Any) -> dict[str, Any]:
    """The first of :data:`VISUAL_INPUTS` by name."""
    return dict(zip(VISUAL_INPUTS, values, strict=False))


def kinds_given(visual: Mapping[str, Any]) -> set[str]:
    """Which of images and videos there are; an empty list of encoded ones is none."""
    kinds = {"image": ("pixel_values", "image_tokens"), "video": ("pixel_values_videos", "video_tokens")}
    return {kind for kind, names in kinds.items() if any(_given(visual[name]) for name in names)}


def _given(value: Any) -> bool:
    return value is not None and not (isinstance(value, (list, tuple)) and not value)


def _one_form(visual: Mapping[str, Any], kind: str, pixels: str, tokens: Sequence[str]) -> dict[str, Any]:
    """The inputs, no encoded images as ``None``; pixels beside visual tokens are refused: one would be ignored."""
    visual = {name: value if _given(value) else None for name, value in visual.items()}
    both = [name for name in (pixels, *tokens) if visual[name] is not None]
    if visual[pixels] is not None and len(both) > 1:
        raise ValueError(f"{kind}s come as pixels or as visual tokens, got {', '.join(both)}: leave one of them out")
    return visual


def read_images(encoder: VisualEncoder, visual: Mapping[str, Any]) -> Media:
    """Encode images, or take what is encoded; they are counted, not laid out yet.

    Args:
        encoder: Whose strategy and schema the inputs must fit.
        visual: :data:`VISUAL_INPUTS` by name, at least the first eight, which are those of images.

    Raises:
        ValueError: Inputs are missing, or do not agree with each other or with the encoder's strategy; pixels and
            visual tokens are both given.
    """
    visual, schema = _one_form(visual, "image", "pixel_values", ("image_tokens", "view_tokens")), encoder.schema
    tokens = visual["image_tokens"]
    if isinstance(tokens, (list, tuple)):
        check_schemas(tokens, schema)
        visual.update(pack_encoded(tokens))
        tokens = visual["image_tokens"]
    by_plans = visual["image_plans"] is not None
    needed = ("pixel_values", "grids") if tokens is None else () if by_plans else ("view_tokens",)
    missing = [name for name in (*needed, "num_patches") if visual[name] is None]
    if missing or (visual["slice_grids"] is None and visual["image_sizes"] is None and not by_plans):
        missing += [] if missing else ["slice_grids (or image_sizes)"]
        raise ValueError(f"images need {', '.join(missing)}: pass everything that the processor returned")
    plans = _given_plans(encoder, visual)
    if plans is not None:
        if tokens is None:
            tokens = _encode(encoder, visual["pixel_values"], visual["grids"], plans, "image")
        return _media(encoder, tokens, plans, "image_tokens")
    first = False
    if tokens is None:
        tokens, lengths = encoder.encode_packed(visual["pixel_values"], visual["grids"].tolist())
        first = encoder.slicing.overview_first
    else:
        lengths = visual["view_tokens"].tolist()
    if visual["slice_grids"] is None:
        slices = [plan(tuple(hw), encoder.slicing).grid for hw in visual["image_sizes"].tolist()]
    else:
        slices = [tuple(grid) if all(grid) else None for grid in visual["slice_grids"].tolist()]
    images = group(lengths, visual["num_patches"].tolist(), slices)
    if len(tokens) != sum(lengths):
        raise ValueError(f"got {len(tokens)} image tokens, view_tokens add up to {sum(lengths)}")
    items = tuple(GridItem(counts, grid, first, schema) for counts, grid in images)
    return Media(tokens, items)


def _given_plans(encoder: VisualEncoder, visual: Mapping[str, Any]) -> tuple[SlicePlan, ...] | None:
    """The images' plans; ``None`` where their grids of slices say all."""
    if visual["image_plans"] is not None:
        plans = read_plans(visual["image_plans"])
        if not all(isinstance(item, SlicePlan) for item in plans):
            raise ValueError("image_plans hold the plan of a video: pass those as video_plans")
    elif visual["view_tokens"] is not None or encoder.slicing.uses_schema:
        return None
    elif visual["image_sizes"] is None:
        raise ValueError("images need image_plans (or image_sizes): pass everything that the processor returned")
    else:
        plans = tuple(encoder.plan(tuple(hw)) for hw in visual["image_sizes"].tolist())
    counts, given = [item.num_views for item in plans], visual["num_patches"].tolist()
    if counts != given:
        raise ValueError(
            f"the images' plans have {counts} views, num_patches says {given}: their processor plans otherwise "
            "than this model"
        )
    return plans


def read_videos(encoder: VisualEncoder, visual: Mapping[str, Any]) -> Media:
    """Encode videos, or take what is encoded; arguments and errors as for :func:`read_images`."""
    visual = _one_form(visual, "video", "pixel_values_videos", ("video_tokens",))
    tokens, plans = visual["video_tokens"], visual["video_plans"]
    if isinstance(tokens, (list, tuple)):
        check_schemas(tokens, encoder.schema)
        packed = pack_encoded_videos(tokens)
        tokens, plans = packed["video_tokens"], packed["video_plans"]
    needed = {"video_plans": plans}
    if tokens is None:
        needed |= {name: visual[name] for name in ("pixel_values_videos", "video_grids")}
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise ValueError(f"videos need {', '.join(missing)}: pass everything that the processor returned")
    plans = read_plans(plans)
    if not all(isinstance(item, VideoPlan) for item in plans):
        raise ValueError("video_plans hold the plan of an image: pass those as image_plans")
    if tokens is None:
        frames = [frame for item in plans for frame in item.plans]
        rows = _encode(encoder, visual["pixel_values_videos"], visual["video_grids"], frames, "frame")
        parts = rows.split([sum(map(num_rows, item.plans)) for item in plans])
        tokens = torch.cat([_ended(encoder, part, item) for part, item in zip(parts, plans, strict=True)])
    return _media(encoder, tokens, plans, "video_tokens")


def _ended(encoder: VisualEncoder, tokens: Tensor, video: VideoPlan) -> Tensor:
    """A video's tokens with the newline that its plan ends with."""
    newline = getattr(encoder.packer, "newline", None)
    if not video.newline:
        return tokens
    if newline is None:
        raise ValueError(
            "a video's plan ends with a newline, this model's strategy has none: its processor plans "
            "otherwise than this model"
        )
    return torch.cat([tokens, newline.to(tokens)[None]])


def _encode(encoder: VisualEncoder, patches: Tensor, grids: Tensor, plans: Sequence[SlicePlan], kind: str) -> Tensor:
    """The tokens of planned images or frames; their views' grids are compared first."""
    wanted = [list(view.patches_hw) for item in plans for view in item.views]
    if grids.tolist() != wanted:
        raise ValueError(
            f"the {len(plans)} {kind}s' plans have {len(wanted)} views, there are {len(grids)} grids, or their "
            "rows and columns differ: pass everything that the processor returned"
        )
    return encoder.encode(SliceBatch.from_patches(patches, plans))


def _media(encoder: VisualEncoder, tokens: Tensor, plans: Sequence[SlicePlan | VideoPlan], name: str) -> Media:
    items = tuple(PlannedItem(item, encoder.schema) for item in plans)
    if len(tokens) != sum(item.rows for item in items):
        raise ValueError(f"got {len(tokens)} {name}, their plans count {sum(item.rows for item in items)}")
    return Media(tokens, items)
