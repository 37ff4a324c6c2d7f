"""Plans for several images of one sample, and for videos: the modes that strategies have for them, and one budget."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uhd.settings import Settings
from uhd.slicing.config import Recounted, Slicing, positive_int
from uhd.slicing.plan import SlicePlan, check_size
from uhd.slicing.rules import SlicingLike, find

Count = Callable[[SlicePlan], SlicePlan]

FRAMES = ("video", "single", "rule")


@dataclass(frozen=True)
class VideoPlan(Settings):
    """How the frames of one video are cut and counted: a plan each, and whether a learned newline follows the last."""

    plans: tuple[SlicePlan, ...]
    newline: bool = False

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> VideoPlan:
        """The inverse of ``to_dict``; a ``ValueError`` where it is no plan, or has no frames."""
        found = super().from_dict(data)
        if not found.plans:
            raise ValueError("not the dictionary of a VideoPlan: plans is empty, a video has frames")
        return found

    @property
    def num_frames(self) -> int:
        return len(self.plans)

    @property
    def num_tokens(self) -> int:
        """Positions in the language model's sequence, separators and the newline included."""
        return sum(frame.num_tokens for frame in self.plans) + self.newline

    @property
    def num_patches(self) -> int:
        """ViT patches of all frames."""
        return sum(frame.num_patches for frame in self.plans)


def plan_images(
    sizes_hw: Iterable[Sequence[int]],
    config: SlicingLike | None = None,
    *,
    max_tokens: int | None = None,
    multi_image: bool = False,
    count: Count | None = None,
) -> tuple[SlicePlan, ...]:
    """Plan the images of one sample, (height, width) in px each, under one budget: a plan for each.

    While all of them cost more than ``max_tokens``, the costliest image, of equals the last, is planned with fewer
    slices: the largest number of slices that costs less than before, at last its overview alone. So the order in which
    images shrink does not depend on the budget, a larger budget never gives any image less, and equal input gives
    equal plans.

    Args:
        sizes_hw: The images.
        config: As in :func:`uhd.plan`. A rule of your own is only ever reduced to its overview.
        max_tokens: Bound on the sum of ``num_tokens``.
        multi_image: Plan as the strategy does where a sample has several images: LLaVA-OneVision takes one padded view
            and a newline for each from two images on, DeepSeek-VL2 stops cropping from three on. Others have no such
            mode.
        count: Applied to every plan before its tokens are counted, such as an encoder's own count.

    Raises:
        ValueError: As in :func:`uhd.plan`; or not even the smallest plans fit the budget.

    >>> from uhd.slicing import plan_images
    >>> [found.num_tokens for found in plan_images([(1008, 672), (300, 400)])]
    [454, 194]
    >>> [found.num_tokens for found in plan_images([(1008, 672), (300, 400)], max_tokens=300)]
    [194, 64]
    """
    slicing = find(config) if count is None else _CountedBy(find(config), count)
    return plan_sample(list(sizes_hw), [], slicing, max_tokens=max_tokens, multi_image=multi_image)[0]


def _within(ladders: Sequence[Iterator[SlicePlan]], max_tokens: int | None) -> tuple[list[SlicePlan], int]:
    """A plan of every ladder, and their tokens: more than ``max_tokens`` only where no ladder goes lower."""
    plans = [next(ladder) for ladder in ladders]
    total = sum(item.num_tokens for item in plans)
    costliest = [(-item.num_tokens, -place) for place, item in enumerate(plans)]
    heapq.heapify(costliest)
    while max_tokens is not None and total > max_tokens and costliest:
        place = -heapq.heappop(costliest)[1]
        lower = next(ladders[place], None)
        if lower is not None:
            total += lower.num_tokens - plans[place].num_tokens
            plans[place] = lower
            heapq.heappush(costliest, (-lower.num_tokens, -place))
    return plans, total


def plan_sample(
    images_hw: Sequence[Sequence[int]],
    videos: Sequence[tuple[Sequence[int], int]],
    slicing: Slicing,
    *,
    video_slicing: Slicing | None = None,
    frames: str = "video",
    max_tokens: int | None = None,
    multi_image: bool = False,
) -> tuple[tuple[SlicePlan, ...], tuple[VideoPlan, ...]]:
    """Plan images, (height, width) in px, and videos, (height, width) and number of their frames, under one budget.

    Videos whose frames are single views cost what they cost, and the images shrink to what is left, as in
    :func:`plan_images`; with ``frames="rule"`` every frame shrinks with them. ``video_slicing``: by default the
    images'. Other arguments and errors as in :func:`plan_images` and :func:`plan_video`.
    """
    max_tokens, by_rule = positive_int("max_tokens", max_tokens), frames == "rule"
    moving = slicing if video_slicing is None else video_slicing
    videos = [(check_size(frame_hw), positive_int("num_frames", number)) for frame_hw, number in videos]
    still = slicing.for_images(len(images_hw)) if multi_image else slicing
    ladders = [_ladder(check_size(size_hw), still) for size_hw in images_hw]
    clips: list[VideoPlan] = []
    if by_rule:
        ladders += [_ladder(frame_hw, moving) for frame_hw, number in videos for _ in range(number)]
    else:
        clips = [plan_video(*video, moving, frames=frames) for video in videos]
    fixed = sum(clip.num_tokens for clip in clips)
    plans, total = _within(ladders, None if max_tokens is None else max_tokens - fixed)
    if by_rule:
        rest = iter(plans[len(images_hw) :])
        clips = [VideoPlan(tuple(next(rest) for _ in range(number))) for _, number in videos]
    if max_tokens is not None and total + fixed > max_tokens:
        raise _over_budget(plans[: len(images_hw)], clips, total + fixed, max_tokens)
    return tuple(plans[: len(images_hw)]), tuple(clips)


def _over_budget(plans: Sequence[SlicePlan], clips: Sequence[VideoPlan], least: int, max_tokens: int) -> ValueError:
    frames = [frame for clip in clips for frame in clip.plans]
    counts = {"image": len(plans), "video": len(clips), "frame": len(frames)}
    images, videos, shots = (f"{number} {kind}{'s' * (number != 1)}" for kind, number in counts.items())
    what = " and ".join(([images] if plans else []) + ([f"{videos} of {shots}"] if clips else []))
    fewer = " or ".join(["images"] * bool(plans) + ["frames"] * bool(clips))
    return ValueError(
        f"{what} cost at least {least} tokens under {(*plans, *frames)[0].strategy!r}, max_tokens is {max_tokens}: "
        f"raise it to {least}, give fewer {fewer}, or take a strategy with smaller views"
    )


def plan_video(
    frame_hw: Sequence[int],
    num_frames: int,
    config: SlicingLike | None = None,
    *,
    frames: str = "video",
    max_tokens: int | None = None,
    count: Count | None = None,
) -> VideoPlan:
    """Plan a video of ``num_frames`` frames of (height, width) px.

    Args:
        frame_hw, num_frames: The frames.
        config: As in :func:`uhd.plan`.
        frames: ``"video"``: as the strategy plans videos: LLaVA-OneVision pools every frame to 196 tokens and ends
            with one newline, all others as ``"single"``. ``"single"``: every frame is one view, the overview alone.
            ``"rule"``: every frame is planned as an image.
        max_tokens: Bound on the video's tokens, shared by its frames as in :func:`plan_images`.
        count: As in :func:`plan_images`.

    Raises:
        ValueError: As in :func:`plan_images`; no frames; an unknown mode; or ``"single"`` for a rule without overview.

    >>> plan_video((720, 1280), 8, "llava-onevision").num_tokens
    1569
    >>> plan_video((720, 1280), 8, frames="rule").num_tokens
    3632
    """
    num_frames, max_tokens = positive_int("num_frames", num_frames), positive_int("max_tokens", max_tokens)
    if frames not in FRAMES:
        raise ValueError(f"frames must be one of {', '.join(map(repr, FRAMES))}, got {frames!r}")
    size_hw = check_size(frame_hw)
    slicing = find(config) if count is None else _CountedBy(find(config), count)
    if frames == "rule":
        return plan_sample([], [(size_hw, num_frames)], slicing, frames=frames, max_tokens=max_tokens)[1][0]
    own = slicing.for_video() if frames == "video" else None
    frame = slicing.single_view(size_hw) if own is None else own.plan(size_hw)
    # a frame that an encoder counts anew has lost its packing, and the newline with it
    newline = own is not None and frame.packing is not None
    found = VideoPlan((frame,) * num_frames, newline)
    if max_tokens is not None and found.num_tokens > max_tokens:
        fits = max(max_tokens - newline, 0) // frame.num_tokens
        fewer = f"give at most {fits} frame{'s' * (fits != 1)}, or " if fits else ""
        raise ValueError(
            f"{num_frames} frames of {frame.num_tokens} tokens cost {found.num_tokens} under {frame.strategy!r}, "
            f"max_tokens is {max_tokens}: {fewer}raise it"
            + ("" if fits else f" to {frame.num_tokens + newline} at least, which is one frame")
        )
    return found


@dataclass(frozen=True)
class _CountedBy(Recounted):
    """A rule's cuts, counted by a function."""

    rule: Slicing
    count: Count

    def fit(self, plan: SlicePlan) -> SlicePlan:
        return self.count(plan)


def _ladder(image_hw: tuple[int, int], slicing: Slicing) -> Iterator[SlicePlan]:
    """The image's own plan, and then ever cheaper ones."""
    current = slicing.plan(image_hw)
    yield current
    for lower in _fewer_slices(slicing, current):
        if lower.num_tokens < current.num_tokens:
            current = lower
            yield current


def _fewer_slices(slicing: Slicing, own: SlicePlan) -> Iterator[SlicePlan]:
    slices = slicing.slices_of(own)
    for cap in range(slices, 0, -1):
        lower = slicing.capped(cap)
        if lower is None:
            break
        try:
            plan = lower.plan(own.image_hw)
        except ValueError:  # the rule takes this image with more slices, not with so few
            continue
        yield plan
    if slices > 0:
        alone = slicing.overview_of(own)
        if alone is not None:
            yield alone


__all__ = ["VideoPlan", "plan_images", "plan_sample", "plan_video"]
