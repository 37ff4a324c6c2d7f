"""What travels from a processor to a model beside text, and how a model turns it into visual tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uhd.batch import SliceBatch
from uhd.encoded import EncodedImage, EncodedVideo, frames_of, num_rows
from uhd.encoder import VisualEncoder
from uhd.hf.placing import check_schemas
from uhd.hf.plans import read_plans, write_plans
from uhd.schema.counted import planned_layout
from uhd.slicing import SlicePlan, VideoPlan

MISSING = "pass everything that the processor returned"
ROWS = "; a trainer that leaves some out, as TRL's GRPO, needs a processor with image_processor.pad_patches = True"


@dataclass(frozen=True, eq=False)
class VisualInputs:
    """Images and videos of a batch, for I images with V views and N patches in all; each may be ``None``.

    Attributes:
        pixel_values: (N, P) uint8 raw or floating normalised patches of all views; or (I, L, P), an image a row and
            zeros behind its patches, which needs ``image_sizes`` alone, see :func:`pad_patches`.
        grids: (V, 2) (rows, columns) of each view in patches.
        num_patches: (I,) VIEWS of each image, not patches of the ViT: transformers' name for them.
        image_sizes: (I, 2) (height, width) in px.
        image_plans: (I, L) uint8, see :func:`uhd.hf.plans.write_plans`; ``None`` plans ``image_sizes`` anew.
        image_tokens: Instead of pixels: encoded images, or their packed tokens (M, D) with ``image_plans``.
        pixel_values_videos, video_grids, video_plans, video_tokens: The same for videos, whose frames have the views.
    """

    pixel_values: Tensor | None = None
    grids: Tensor | None = None
    num_patches: Tensor | None = None
    image_sizes: Tensor | None = None
    image_plans: Tensor | None = None
    image_tokens: Tensor | Sequence[EncodedImage] | None = None
    pixel_values_videos: Tensor | None = None
    video_grids: Tensor | None = None
    video_plans: Tensor | None = None
    video_tokens: Tensor | Sequence[EncodedVideo] | None = None

    def __post_init__(self) -> None:
        for name in ("image_tokens", "video_tokens"):
            if isinstance(getattr(self, name), (list, tuple)) and not getattr(self, name):
                object.__setattr__(self, name, None)  # no encoded images are none
        if self.pixel_values is not None and self.pixel_values.dim() == 3 and not len(self.pixel_values):
            for name in ("pixel_values", "image_sizes"):  # samples without images, cut from a batch with some
                object.__setattr__(self, name, None)
        for kind, pixels in (("image", self.pixel_values), ("video", self.pixel_values_videos)):
            if pixels is not None and getattr(self, f"{kind}_tokens") is not None:
                name = "pixel_values" if kind == "image" else "pixel_values_videos"
                raise ValueError(
                    f"{kind}s come as pixels or as visual tokens, got {name}, {kind}_tokens: leave one of them out"
                )

    @classmethod
    def take(cls, kwargs: dict[str, Any], **more: Any) -> VisualInputs:
        """Remove from ``kwargs`` what is an image's or a video's: by name, or together as ``visual``.

        ``more`` of it is what was passed beside them.
        """
        together = kwargs.pop("visual", None)
        if together is not None:
            beside = [field.name for field in fields(cls) if {**kwargs, **more}.get(field.name) is not None]
            if beside:
                raise ValueError(
                    f"images and videos come as visual, got {', '.join(beside)} as well: give one of them"
                )
            return together
        return cls(**more, **{field.name: kwargs.pop(field.name) for field in fields(cls) if field.name in kwargs})

    def given(self) -> dict[str, Any]:
        """What there is, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    def to(self, *args: Any, **kwargs: Any) -> VisualInputs:
        """All tensors moved, as by ``Tensor.to``."""
        tensors = {name: value for name, value in self.given().items() if isinstance(value, Tensor)}
        return replace(self, **{name: tensor.to(*args, **kwargs) for name, tensor in tensors.items()})

    @property
    def any(self) -> bool:
        """Whether anything was given at all."""
        return bool(self.given())

    @property
    def kinds(self) -> set[str]:
        """Which of ``"image"`` and ``"video"`` there are."""
        given = {
            "image": (self.pixel_values, self.image_tokens),
            "video": (self.pixel_values_videos, self.video_tokens),
        }
        return {kind for kind, values in given.items() if any(value is not None for value in values)}


def together(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch with its images and videos as one value, ``visual``, which the model takes like the fields themselves.

    accelerate cuts what a stream's batches hold by the first dimension; packed patches and views have one of their
    own, so they must not lie in the batch as tensors.

    >>> sorted(together({"input_ids": torch.ones(1, 3), "pixel_values": torch.ones(4, 12), "grids": None}))
    ['input_ids', 'visual']
    """
    rest = dict(batch)
    visual = VisualInputs.take(rest)
    return {**rest, "visual": visual} if visual.any else rest


VISUAL_KEYS = tuple(field.name for field in fields(VisualInputs))
"""By these names they travel."""


def describe_plans(plans: Sequence[SlicePlan]) -> dict[str, np.ndarray]:
    """The per-image keys of a batch; ``num_image_tokens`` are (I,) positions in the language model's sequence."""
    return {
        "num_patches": np.array([plan.num_views for plan in plans], np.int64),
        "image_sizes": pairs([plan.image_hw for plan in plans]),
        "image_plans": write_plans(plans),
        "num_image_tokens": np.array([plan.num_tokens for plan in plans], np.int64),
    }


def pad_patches(data: Mapping[str, np.ndarray], plans: Sequence[SlicePlan]) -> dict[str, np.ndarray]:
    """A batch of I images with an image a row, which can be cut by images: all else follows from their sizes.

    Args:
        data: ``pixel_values`` (N, P) and the per-image keys.
        plans: Of the images, N patches in all; I of them, at least one.

    Returns:
        ``pixel_values`` (I, L, P), L the patches of the largest image and zeros behind those of the others, and of the
        other keys ``image_sizes`` and ``num_image_tokens``.
    """
    counts = [plan.num_patches for plan in plans]
    patches = data["pixel_values"]
    rows = np.zeros((len(plans), max(counts, default=0), patches.shape[1]), patches.dtype)
    for row, image in zip(rows, np.split(patches, np.cumsum(counts)[:-1]), strict=True):
        row[: len(image)] = image
    return {"pixel_values": rows, **{name: data[name] for name in ("image_sizes", "num_image_tokens")}}


def _without_padding(visual: VisualInputs, plans: Sequence[SlicePlan]) -> VisualInputs:
    """What :func:`pad_patches` padded as (N, P) patches, with the grids and views of the images' plans."""
    rows, counts = visual.pixel_values, torch.tensor([plan.num_patches for plan in plans])
    if len(rows) != len(plans) or counts.max() > rows.shape[1]:
        raise ValueError(
            f"pixel_values {tuple(rows.shape)} hold an image a row, image_sizes are of {len(plans)} images of at most "
            f"{counts.max()} patches: their processor plans otherwise than this model, or they were cut apart"
        )
    real = (torch.arange(rows.shape[1]) < counts[:, None]).to(rows.device)
    if rows[~real].any():
        raise ValueError(
            "a row of pixel_values holds more patches than the plan of its image_sizes: their processor plans "
            "otherwise than this model"
        )
    own = {"grids": pairs(view.patches_hw for plan in plans for view in plan.views)}
    own["num_patches"] = np.array([plan.num_views for plan in plans], np.int64)
    missing = {name: torch.from_numpy(value) for name, value in own.items() if getattr(visual, name) is None}
    return replace(visual, pixel_values=rows[real], **missing)


def pairs(items: Any) -> np.ndarray:
    """Pairs of integers as (n, 2) int64, also where there are none."""
    return np.array(list(items), np.int64).reshape(-1, 2)


def pack_encoded(images: Sequence[EncodedImage]) -> dict[str, Tensor]:
    """Encoded images as a batch's tensors: ``image_tokens`` (M, D), as they were encoded, and the per-image keys."""
    described = describe_plans([image.plan for image in images])
    described["num_image_tokens"] = np.array([image.layout.num_tokens for image in images], np.int64)
    tokens = torch.cat([image.tokens for image in images])
    return {"image_tokens": tokens, **{name: torch.from_numpy(values) for name, values in described.items()}}


def pack_encoded_videos(videos: Sequence[EncodedVideo]) -> dict[str, Tensor]:
    """Encoded videos as a batch's tensors: ``video_tokens`` (M, D), ``video_plans`` and ``num_video_tokens``."""
    return {
        "video_tokens": torch.cat([video.tokens for video in videos]),
        "video_plans": torch.from_numpy(write_plans([video.plan for video in videos])),
        "num_video_tokens": torch.tensor([video.layout.num_tokens for video in videos], dtype=torch.long),
    }


@dataclass(frozen=True, eq=False)
class PlannedMedia:
    """Images, or videos, of a batch: planned and checked, not encoded yet.

    Attributes:
        encoder: Whose tokens they become.
        plans: Of each.
        patches: (N, P) of all their views; ``None`` where they are encoded already.
        tokens: (M, D) that were encoded before, else ``None``.
    """

    encoder: VisualEncoder
    plans: tuple[SlicePlan | VideoPlan, ...]
    patches: Tensor | None
    tokens: Tensor | None

    @property
    def lengths(self) -> list[int]:
        """Positions that each takes, separators included."""
        return [planned_layout(plan, self.encoder.schema).num_tokens for plan in self.plans]

    def chosen(self, kept: Sequence[int] | None = None) -> tuple[SlicePlan | VideoPlan, ...]:
        """The plans of these numbers; ``None``: all."""
        return self.plans if kept is None else tuple(self.plans[place] for place in kept)

    def encode(self, kept: Sequence[int] | None = None, *, whole: bool = False) -> Tensor:
        """Tokens (M, D) of those of these numbers; ``None``: all. ``whole``: see :meth:`uhd.VisualEncoder.encode`."""
        if self.tokens is not None:
            return _rows(self.tokens, [num_rows(plan) for plan in self.plans], kept)
        patches = _rows(self.patches, [plan.num_patches for plan in self.plans], kept)
        plans = self.chosen(kept)
        frames = [frame for plan in plans for frame in frames_of(plan)]
        videos = [plan for plan in plans if isinstance(plan, VideoPlan)]
        return self.encoder.encode(SliceBatch.from_patches(patches, frames), videos=videos, whole=whole)


def read_images(encoder: VisualEncoder, visual: VisualInputs) -> PlannedMedia:
    """Plan images, or take the plans of what is encoded.

    Args:
        encoder: Whose strategy and schema the inputs must fit.
        visual: Images among it, as pixels or tokens.

    Raises:
        ValueError: Inputs are missing, or do not agree with each other or with the encoder's strategy.
    """
    if isinstance(visual.image_tokens, (list, tuple)):
        check_schemas(visual.image_tokens, encoder.schema)
        packed = pack_encoded(visual.image_tokens)
        packed.pop("num_image_tokens")
        visual = replace(visual, **packed)
    padded = visual.pixel_values is not None and visual.pixel_values.dim() == 3
    needed = ("num_patches",) if visual.image_tokens is not None else () if padded else ("grids", "num_patches")
    _require("images", {name: getattr(visual, name) for name in needed}, ROWS)
    if visual.image_plans is None and visual.image_sizes is None:
        raise ValueError(f"images need image_plans (or image_sizes): {MISSING}")
    if visual.image_plans is None:
        plans = tuple(encoder.plan(tuple(hw)) for hw in visual.image_sizes.tolist())
    else:
        plans = read_plans(visual.image_plans)
        if not all(isinstance(plan, SlicePlan) for plan in plans):
            raise ValueError("image_plans hold the plan of a video: pass those as video_plans")
    if padded:
        visual = _without_padding(visual, plans)
    counts, given = [plan.num_views for plan in plans], visual.num_patches.tolist()
    if counts != given:
        raise ValueError(
            f"the images' plans have {counts} views, num_patches says {given}: their processor plans otherwise "
            "than this model"
        )
    return _checked(encoder, plans, visual.pixel_values, visual.grids, visual.image_tokens, "image")


def read_videos(encoder: VisualEncoder, visual: VisualInputs) -> PlannedMedia:
    """Plan videos, or take the plans of what is encoded; arguments and errors as for :func:`read_images`."""
    if isinstance(visual.video_tokens, (list, tuple)):
        check_schemas(visual.video_tokens, encoder.schema)
        packed = pack_encoded_videos(visual.video_tokens)
        packed.pop("num_video_tokens")
        visual = replace(visual, **packed)
    needed = ("video_plans",) if visual.video_tokens is not None else ("video_plans", "video_grids")
    _require("videos", {name: getattr(visual, name) for name in needed})
    plans = read_plans(visual.video_plans)
    if not all(isinstance(plan, VideoPlan) for plan in plans):
        raise ValueError("video_plans hold the plan of an image: pass those as image_plans")
    return _checked(encoder, plans, visual.pixel_values_videos, visual.video_grids, visual.video_tokens, "video")


def _checked(
    encoder: VisualEncoder,
    plans: tuple[SlicePlan | VideoPlan, ...],
    patches: Tensor | None,
    grids: Tensor | None,
    tokens: Tensor | None,
    kind: str,
) -> PlannedMedia:
    """Compare counts with the plans before anything is encoded."""
    media = PlannedMedia(encoder, plans, patches if tokens is None else None, tokens)
    if tokens is not None:
        rows = sum(map(num_rows, plans))
        if len(tokens) != rows:
            raise ValueError(f"got {len(tokens)} {kind}_tokens, their plans count {rows}")
        return media
    views = [view for plan in plans for frame in frames_of(plan) for view in frame.views]
    if grids.tolist() != [list(view.patches_hw) for view in views]:
        raise ValueError(
            f"the {len(plans)} {kind}s' plans have {len(views)} views, there are {len(grids)} grids, or their "
            f"rows and columns differ: {MISSING}, and where a loader cuts batches (accelerate does, of streams), "
            "uhd.hf.together(batch)"
        )
    if len(patches) != (wanted := sum(plan.num_patches for plan in plans)):
        raise ValueError(f"the {len(plans)} {kind}s' plans have {wanted} patches, got {len(patches)}: {MISSING}")
    return media


def _rows(rows: Tensor, counts: Sequence[int], kept: Sequence[int] | None) -> Tensor:
    """The rows of those that are kept, where each has so many."""
    if kept is None:
        return rows
    parts = rows.split(counts)
    return torch.cat([rows[:0], *(parts[place] for place in kept)])


def _require(what: str, given: Mapping[str, Any], advice: str = "") -> None:
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise ValueError(f"{what} need {', '.join(missing)}: {MISSING}{advice}")
