"""A video processor in the transformers manner: frames are views, planned and rendered as images are."""

# no `from __future__ import annotations`: transformers reads the types of the keywords below at run time

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.dataclasses import validate_typed_dict
from PIL import Image
from torch import Tensor
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import VideosKwargs
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from uhd.encoded import EncodedVideo
from uhd.hf.image_processing import Planning, as_slicing
from uhd.hf.plans import write_plans
from uhd.hf.versions import VideoProcessorBase
from uhd.hf.visual_inputs import pairs
from uhd.loading import named, one_size
from uhd.pixels.source import plain_source
from uhd.slicing import VideoPlan
from uhd.slicing.sample import plan_sample

Image.init()
_PICTURE_SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind != "MPEG"}


class UHDVideosKwargs(VideosKwargs, total=False):
    """What a call may override beside transformers' own keywords.

    frames (`str`): ``"video"``, ``"single"`` or ``"rule"``, see :func:`uhd.slicing.plan_video`. slicing, max_slices,
    max_tokens, background, max_pixels, pixel_backend: As for images.
    """

    frames: str | None
    slicing: Any
    max_slices: int | None
    max_tokens: int | None
    background: list | tuple | None
    max_pixels: int | None
    pixel_backend: str | None


UHDVideoProcessorKwargs = UHDVideosKwargs
"""The name by which transformers finds the keywords of :class:`UHDVideoProcessor`."""


@dataclass(frozen=True, eq=False)
class PlannedVideo:
    """The upright RGB frames of a video and its plan, which was made together with those of its sample."""

    frames: tuple[Image.Image, ...]
    plan: VideoPlan


class UHDVideoProcessor(Planning, VideoProcessorBase, PilBackend):
    """Videos to packed patches, by the planner and the renderer of :class:`uhd.hf.UHDImageProcessor`.

    A video is a list of equally large frames (anything :func:`uhd.pixels.load_image` takes), an array or tensor
    (T, h, w, c) or (T, c, h, w), or the path or address of a file that transformers can decode (it needs
    ``torchcodec``). Videos come as one video, as a list of them, or as a list of lists, one a sample.

    A call returns, for K videos with V views and N patches in all:

    * ``pixel_values_videos`` (N, P), as ``pixel_values`` of the image processor.
    * ``video_grids`` (V, 2) int64: (rows, columns) of each view in patches; a frame has one view or more.
    * ``video_plans`` (K, L) uint8: the plans, see :func:`uhd.hf.plans.write_plans`.
    * ``num_video_tokens`` (K,) int64: positions in the language model's sequence.

    Args:
        frames: How frames are planned: ``"video"`` as the strategy plans videos, ``"single"`` one view each,
            ``"rule"`` as images.
        num_frames, fps: As many frames of a video, or a second of it, at equal distances; ``None`` takes all. Frames
            that are decoded already do not tell their speed: ``fps`` needs a call's ``video_metadata`` for them, whose
            ``fps`` says it, one for each video.
        do_sample_frames: ``False`` takes all whatever those say.
        slicing and the rest: As in :class:`uhd.hf.UHDImageProcessor`; ``max_tokens`` bounds all videos of a sample
            together.

    Raises:
        ValueError: A video has no frames, or frames of different sizes; a keyword that does not apply; or as the image
            processor.
    """

    valid_kwargs = UHDVideosKwargs
    auto_classes = {"AutoVideoProcessor": "UHDVideoProcessor"}  # noqa: RUF012
    model_input_names = ["pixel_values_videos", "video_grids", "video_plans"]  # noqa: RUF012

    frames = "video"
    num_frames = None
    fps = None
    do_sample_frames = None
    default_return_tensors = "pt"

    @classmethod
    def of(cls, image_processor: Planning) -> "UHDVideoProcessor":
        """A video processor with the slicing and the pixel settings of an image processor."""
        shared = set(cls.valid_kwargs.__annotations__) & set(image_processor.valid_kwargs.__annotations__)
        return cls(**{name: getattr(image_processor, name, None) for name in shared})

    def plan(self, frame_hw: tuple[int, int], num_frames: int, **kwargs: Any) -> VideoPlan:
        """The plan for a video of so many frames of this (height, width), px, under a call's keywords."""
        return self.plan_videos([(frame_hw, num_frames)], **kwargs)[0]

    def plan_videos(self, videos: list[tuple[tuple[int, int], int]], **kwargs: Any) -> tuple[VideoPlan, ...]:
        """The plans of one sample's videos, each (height, width) of its frames and their number."""
        planner, frames = self.planner(kwargs), self.setting("frames", kwargs)
        return plan_sample([], videos, planner, frames=frames, max_tokens=self.setting("max_tokens", kwargs))[1]

    def load_all(self, videos: list[Any], kwargs: Mapping[str, Any]) -> list[tuple[Image.Image, ...]]:
        """The frames of each video, sampled, as upright RGB Pillow images; errors number the videos.

        Raises:
            ValueError: ``video_metadata`` describes another number of videos; or as the class says.
        """
        told = _metadata(kwargs.get("video_metadata"))
        if told and len(told) != len(videos):
            raise ValueError(f"got {len(videos)} videos and video_metadata of {len(told)}: give as many, in order")
        each = told or [None] * len(videos)
        return [self._load(video, number, kwargs, each[number]) for number, video in enumerate(videos)]

    def _load(
        self, video: Any, number: int, kwargs: Mapping[str, Any], told: VideoMetadata | None
    ) -> tuple[Image.Image, ...]:
        num_frames, fps = self.setting("num_frames", kwargs), self.setting("fps", kwargs)
        if self.setting("do_sample_frames", kwargs) is False:
            num_frames = fps = None
        if num_frames is not None and fps is not None:
            raise ValueError(f"give num_frames or fps, got num_frames={num_frames} and fps={fps}")
        if isinstance(video, (str, Path)):
            decoded, _ = self.fetch_videos(
                str(video), lambda metadata, **_: default_sample_indices_fn(metadata, num_frames, fps)
            )
            video = list(decoded)
        elif fps is not None:
            if told is None or not told.fps:
                raise ValueError(
                    f"fps={fps} needs a file, the speed of the frames of video {number} is not known: give "
                    "num_frames, or their fps in video_metadata"
                )
            if told.total_num_frames not in (None, len(video)):
                raise ValueError(
                    f"video {number} has {len(video)} frames, its video_metadata says {told.total_num_frames}"
                )
            video = [video[place] for place in _evenly(len(video), max(int(len(video) / told.fps * fps), 1), number)]
        elif num_frames is not None and len(video):
            video = [video[place] for place in _evenly(len(video), num_frames, number)]
        found = []
        for place, frame in enumerate(video):
            with named(f"video {number}, frame", place, frame):
                found.append(self.picture(frame, kwargs))
        one_size(found, number)  # or it is refused
        return tuple(found)

    def sample_frames(
        self, metadata: VideoMetadata, num_frames: int | None = None, fps: float | None = None, **kwargs: Any
    ) -> np.ndarray:
        """Places of frames at equal distances, as transformers chooses them; raises where the speed is not known."""
        return default_sample_indices_fn(metadata, num_frames, fps)

    def preprocess(self, videos: Any, **kwargs: Any) -> BatchFeature:
        """See the class."""
        validate_typed_dict(self.valid_kwargs, kwargs)
        for name in self.valid_kwargs.__annotations__:
            kwargs.setdefault(name, getattr(self, name, None))
        self._validate_preprocess_kwargs(**kwargs)
        ready = isinstance(videos, list) and videos and all(isinstance(video, PlannedVideo) for video in videos)
        planned = videos if ready else self._planned(videos, kwargs)
        plans = [video.plan for video in planned]
        frames = [frame for video in planned for frame in video.frames]
        batch = self._patches(frames, [frame for plan in plans for frame in plan.plans], kwargs)
        data = {
            "pixel_values_videos": batch.patches.numpy(),
            "video_grids": pairs(batch.grids),
            "video_plans": write_plans(plans),
            "num_video_tokens": np.array([plan.num_tokens for plan in plans], np.int64),
        }
        return self._batch(data, kwargs)

    def _planned(self, videos: Any, kwargs: Mapping[str, Any]) -> list[PlannedVideo]:
        flat, counts = arrange_videos(videos)
        found, start = [], 0
        loaded = self.load_all(flat, kwargs)
        for count in [1] * len(flat) if counts is None else counts:
            sample = loaded[start : start + count]
            plans = self.plan_videos(list(map(size_of, sample)), **kwargs)
            found += [PlannedVideo(frames, plan) for frames, plan in zip(sample, plans, strict=True)]
            start += count
        return found

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        super()._validate_preprocess_kwargs(**kwargs)
        if kwargs.get("return_metadata"):
            raise ValueError("return_metadata does not apply: nothing here reads it. Leave it out")


def _metadata(given: Any) -> list[VideoMetadata]:
    """One for each video: from one, a list of them, or a list of the samples' lists; none where none is given."""
    if given is None:
        return []
    if isinstance(given, Mapping):  # VideoMetadata is one, too
        return [VideoMetadata(**{"total_num_frames": None, **given})]
    return [item for part in given for item in _metadata(part)]


def same_slicing(one: Planning, other: Planning) -> bool:
    """Whether two processors plan alike before a call's keywords."""
    return as_slicing(one.slicing).to_dict() == as_slicing(other.slicing).to_dict()


def arrange_videos(videos: Any) -> tuple[list[Any], list[int] | None]:
    """All videos in order, and how many each sample has; ``None`` where they are not nested by samples.

    A list is a video where its items are frames; else it is a list of videos, or of the samples' lists of videos.

    Raises:
        ValueError: Neither videos nor lists of them.
    """
    if _is_video(videos):
        return [videos], None
    if not isinstance(videos, (list, tuple)) and _ndim(videos) != 5:
        raise ValueError(
            "a video is a list of frames, an array (T, h, w, c) or (T, c, h, w), or a file; got "
            f"{type(videos).__name__}{f' with {_ndim(videos)} axes' if _ndim(videos) else ''}"
        )
    videos = list(videos)
    empty = [isinstance(item, (list, tuple)) and not item for item in videos]
    if all(_is_video(item) or nothing for item, nothing in zip(videos, empty, strict=True)) and not all(empty):
        return videos, None
    nested = [list(item) if isinstance(item, (list, tuple)) and not _is_video(item) else [item] for item in videos]
    flat = [video for sample in nested for video in sample]
    for video in flat:
        if not _is_video(video) and not (isinstance(video, (list, tuple)) and not video):
            raise ValueError(
                f"videos are nested too deeply, or mixed with frames: got {type(video).__name__} where a video is "
                "expected. Give a video, a list of videos, or a list of the samples' lists of videos"
            )
    return flat, [len(sample) for sample in nested] if videos else None


def _is_video(item: Any) -> bool:
    if isinstance(item, (EncodedVideo, PlannedVideo)) or _ndim(item) == 4:
        return True
    if isinstance(item, (str, Path)):
        return not _is_frame(item)
    return isinstance(item, (list, tuple)) and bool(item) and all(_is_frame(part) for part in item)


def _is_frame(item: Any) -> bool:
    if isinstance(item, (str, Path)):
        text = str(item)
        suffix = os.path.splitext(text.partition("?")[0])[1]  # pathlib takes a third of a second for 8 MB of base64
        if text.startswith("data:image") or suffix.lower() in _PICTURE_SUFFIXES:
            return True
        return not text.startswith("data:") and isinstance(plain_source(item), bytes)  # base64
    if isinstance(item, Mapping):
        return bool(item.keys() & {"bytes", "path"})
    return (
        isinstance(item, (Image.Image, bytes, bytearray, memoryview)) or hasattr(item, "read") or _ndim(item) in (2, 3)
    )


def _ndim(item: Any) -> int | None:
    return item.ndim if isinstance(item, (np.ndarray, Tensor)) else None


def size_of(frames: Sequence[Image.Image]) -> tuple[tuple[int, int], int]:
    """(height, width) of a video's frames, and their number: what it is planned by."""
    return (frames[0].height, frames[0].width), len(frames)


def _evenly(total: int, num_frames: int, number: int) -> list[int]:
    """Places of ``num_frames`` frames at equal distances, as transformers chooses them."""
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}: leave it out to take all {total}")
    if num_frames > total:
        raise ValueError(f"video {number} has {total} frames, num_frames is {num_frames}: ask for at most {total}")
    return default_sample_indices_fn(VideoMetadata(total_num_frames=total), num_frames).tolist()


__all__ = ["PlannedVideo", "UHDVideoProcessor", "UHDVideosKwargs", "arrange_videos"]
