"""Plans for several images of one sample, and for videos: the modes that strategies have for them, and one budget."""

from __future__ import annotations

import heapq
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from uhd.slicing.adaptive import SlicingConfig, uncut
from uhd.slicing.config import positive_int
from uhd.slicing.plan import Packing, SlicePlan, check_size
from uhd.slicing.rules import Rule, find, plan
from uhd.slicing.strategies import StrategyConfig
from uhd.slicing.strategies.anyres import AnyResConfig, DeepSeekVL2Config, VideoFrameConfig
from uhd.slicing.strategies.fixed import SquarePadConfig

AnyConfig = SlicingConfig | StrategyConfig | Rule
Count = Callable[[SlicePlan], SlicePlan]

FRAMES = ("video", "single", "rule")


@dataclass(frozen=True)
class VideoPlan:
    """How the frames of one video are cut and counted. Frozen, hashable, JSON-able.

    Attributes:
        plans: One plan a frame.
        newline: One learned embedding follows the last frame.
    """

    plans: tuple[SlicePlan, ...]
    newline: bool = False

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

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` is the inverse."""
        return {"plans": [frame.to_dict() for frame in self.plans], "newline": self.newline}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> VideoPlan:
        """The inverse of :meth:`to_dict`, also after JSON text; a ``ValueError`` where the data are no such plan."""
        try:
            return cls(tuple(SlicePlan.from_dict(frame) for frame in data["plans"]), bool(data["newline"]))
        except (KeyError, TypeError) as problem:
            raise ValueError(f"not the dictionary of a VideoPlan: {problem!r}") from None


def plan_images(
    sizes_hw: Iterable[Sequence[int]],
    config: AnyConfig | str | None = None,
    *,
    max_tokens: int | None = None,
    multi_image: bool = False,
    count: Count | None = None,
) -> tuple[SlicePlan, ...]:
    """Plan the images of one sample, under one budget.

    While all of them cost more than ``max_tokens``, the costliest image, of equals the last, is planned with fewer
    slices: the largest number of slices that costs less than before, at last its overview alone. So the order in which
    images shrink does not depend on the budget, a larger budget never gives any image less, and equal input gives
    equal plans.

    Args:
        sizes_hw: (height, width) of every image, px.
        config: As in :func:`uhd.plan`. A rule of your own is only ever reduced to its overview.
        max_tokens: Bound on the sum of ``num_tokens``.
        multi_image: Plan as the strategy does where a sample has several images: LLaVA-OneVision takes one padded view
            and a newline for each from two images on, DeepSeek-VL2 stops cropping from three on. Others have no such
            mode.
        count: Applied to every plan before its tokens are counted, such as an encoder's own count.

    Returns:
        One plan an image.

    Raises:
        ValueError: As in :func:`uhd.plan`; or not even the smallest plans fit the budget.
    """
    planner = Planner(find("llava-uhd-safe" if config is None else config), count)
    return plan_sample(list(sizes_hw), [], planner, max_tokens=max_tokens, multi_image=multi_image)[0]


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


@dataclass(frozen=True)
class Planner:
    """What images, or the frames of videos, are planned by: a rule as in :func:`uhd.plan`, and an encoder's count."""

    rule: AnyConfig
    count: Count | None = None


def plan_sample(
    images_hw: Sequence[Sequence[int]],
    videos: Sequence[tuple[Sequence[int], int]],
    planner: Planner,
    *,
    video_planner: Planner | None = None,
    frames: str = "video",
    max_tokens: int | None = None,
    multi_image: bool = False,
) -> tuple[tuple[SlicePlan, ...], tuple[VideoPlan, ...]]:
    """Plan the images and the videos of one sample, under one budget.

    Videos whose frames are single views cost what they cost, and the images shrink to what is left, as in
    :func:`plan_images`; with ``frames="rule"`` every frame shrinks with them.

    Args:
        images_hw: (height, width) of every image, px.
        videos: Of every video the (height, width) of its frames, px, and their number.
        planner: For the images.
        video_planner: For the videos; ``None`` is the images'.
        frames: As in :func:`plan_video`.
        max_tokens: Bound on the tokens of all images and videos together.
        multi_image: As in :func:`plan_images`; videos do not count as images.

    Raises:
        ValueError: As in :func:`plan_images` and :func:`plan_video`.
    """
    max_tokens, by_rule = positive_int("max_tokens", max_tokens), frames == "rule"
    moving = planner if video_planner is None else video_planner
    videos = [(check_size(frame_hw), _frame_count(number)) for frame_hw, number in videos]
    rule = multi_image_rule(planner.rule, len(images_hw)) if multi_image else planner.rule
    ladders = [_ladder(check_size(size_hw), rule, planner.count or _as_planned) for size_hw in images_hw]
    clips: list[VideoPlan] = []
    if by_rule:
        flat = [frame_hw for frame_hw, number in videos for _ in range(number)]
        ladders += [_ladder(frame_hw, moving.rule, moving.count or _as_planned) for frame_hw in flat]
    else:
        clips = [plan_video(*video, moving.rule, frames=frames, count=moving.count) for video in videos]
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


def _frame_count(num_frames: Any) -> int:
    """A whole number of at least 1, or a ``ValueError``."""
    try:
        count = operator.index(num_frames)
    except TypeError:
        raise ValueError(f"num_frames must be a whole number, got {num_frames!r}") from None
    if count < 1:
        raise ValueError(f"a video has at least 1 frame, got {count}")
    return count


def plan_video(
    frame_hw: Sequence[int],
    num_frames: int,
    config: AnyConfig | str | None = None,
    *,
    frames: str = "video",
    max_tokens: int | None = None,
    count: Count | None = None,
) -> VideoPlan:
    """Plan a video of equal frames.

    Args:
        frame_hw: (height, width) of its frames, px.
        num_frames: At least 1.
        config: As in :func:`uhd.plan`.
        frames: ``"video"``: as the strategy plans videos: LLaVA-OneVision pools every frame to 196 tokens and ends
            with one newline, all others as ``"single"``. ``"single"``: every frame is one view, the overview alone.
            ``"rule"``: every frame is planned as an image.
        max_tokens: Bound on the video's tokens, shared by its frames as in :func:`plan_images`.
        count: As in :func:`plan_images`.

    Raises:
        ValueError: As in :func:`plan_images`; no frames; an unknown mode; or ``"single"`` for a rule without overview.
    """
    num_frames, max_tokens = _frame_count(num_frames), positive_int("max_tokens", max_tokens)
    if frames not in FRAMES:
        raise ValueError(f"frames must be one of {', '.join(map(repr, FRAMES))}, got {frames!r}")
    size_hw = check_size(frame_hw)
    rule, fitted = find("llava-uhd-safe" if config is None else config), count or _as_planned
    if frames == "rule":
        video = (size_hw, num_frames)
        return plan_sample([], [video], Planner(rule, count), frames=frames, max_tokens=max_tokens)[1][0]
    own = video_rule(rule) if frames == "video" else None
    if own is not None:
        rule, frame = own, fitted(plan(size_hw, own))
    else:
        frame = fitted(single_view(size_hw, rule))
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


def multi_image_rule(rule: AnyConfig, num_images: int) -> AnyConfig:
    """What a strategy plans each of several images of one sample by; the rule itself where it has no such mode.

    Source: transformers, models/llava_onevision/ (nested images); DeepSeek-VL2, ``tokenize_with_images``.
    """
    if _is_onevision(rule) and num_images > 1:
        name = f"{rule.name}-multi-image"
        fill = rule.square_fill
        return SquarePadConfig(name, rule.patch_size, rule.tile, fill, newline=True, resample=rule.resample)
    if isinstance(rule, DeepSeekVL2Config) and num_images > 2:
        return rule.replace(cropping=False)
    return rule


def video_rule(rule: AnyConfig) -> VideoFrameConfig | None:
    """What a strategy plans the frames of a video by; ``None`` where it has no such mode."""
    if isinstance(rule, VideoFrameConfig):
        return rule
    if not _is_onevision(rule):
        return None
    return VideoFrameConfig(f"{rule.name}-video", rule.patch_size, rule.tile, resample=rule.resample)


def _is_onevision(rule: AnyConfig) -> bool:
    return isinstance(rule, AnyResConfig) and rule.max_tiles is not None


def single_view(image_hw: tuple[int, int], rule: AnyConfig) -> SlicePlan:
    """The plan of the rule's only view, else of its overview alone; learned newlines of the overview stay.

    Raises:
        ValueError: The rule cuts this image and has no overview.
    """
    if isinstance(rule, SlicingConfig):
        return _uncut(image_hw, rule)
    found = plan(image_hw, rule)
    alone = found if found.num_views == 1 else overview_alone(found)
    if alone is None:
        raise ValueError(
            f"{found.strategy!r} cuts a {image_hw[0]}x{image_hw[1]} px image (height x width) and has no overview, so "
            'there is no single view: use frames="rule"'
        )
    return alone


def _uncut(image_hw: tuple[int, int], config: SlicingConfig) -> SlicePlan:
    """The adaptive planner's overview, also under the rule whose smallest grids would cut."""
    return uncut(check_size(image_hw), config)


def overview_alone(found: SlicePlan) -> SlicePlan | None:
    """A plan without its slices; ``None`` where it has no overview."""
    canvases = tuple(canvas for canvas in found.canvases if canvas.kind == "overview")
    if not canvases:
        return None
    packing, visual, separators = found.packing, sum(canvas.tokens_per_view for canvas in canvases), 0
    if packing is not None:
        packing = Packing(
            view_hw=packing.overview_view_hw or packing.view_hw,
            pooled_hw=packing.pooled_hw,
            merge=packing.merge,
            overview_newline=packing.overview_newline,
            separator="end" if packing.separator == "end" else None,
        )
        visual = math.prod(packing.overview_hw)
        separators = packing.overview_newline * packing.overview_hw[0] + (packing.separator is not None)
        if packing == Packing(view_hw=packing.view_hw):
            packing = None
    return replace(
        found,
        canvases=canvases,
        grid=None,
        num_visual_tokens=visual,
        num_separators=separators,
        packing=packing,
    )


def _as_planned(found: SlicePlan) -> SlicePlan:
    return found


def _ladder(image_hw: tuple[int, int], rule: AnyConfig, count: Count) -> Iterator[SlicePlan]:
    """The image's own plan, and then ever cheaper ones."""
    current = count(plan(image_hw, rule))
    yield current
    for lower in _fewer_slices(image_hw, rule, current):
        lower = count(lower)
        if lower.num_tokens < current.num_tokens:
            current = lower
            yield current


def _fewer_slices(image_hw: tuple[int, int], rule: AnyConfig, own: SlicePlan) -> Iterator[SlicePlan]:
    slices = sum(view.kind == "slice" for view in own.views)
    for cap in range(slices - 1, 0, -1):
        lower = capped(rule, cap)
        if lower is None:
            break
        yield plan(image_hw, lower)
    if slices > 0:
        alone = _uncut(image_hw, rule) if isinstance(rule, SlicingConfig) else overview_alone(own)
        if alone is not None:
            yield alone


def capped(rule: AnyConfig, cap: int) -> AnyConfig | None:
    """The same rule with at most ``cap`` slices; ``None`` where its settings do not say how."""
    if isinstance(rule, SlicingConfig):
        return rule.replace(max_slices=cap)
    if not isinstance(rule, StrategyConfig):
        return None
    names = {f.name for f in fields(rule)}
    if "grids" in names:
        grids = tuple(grid for grid in rule.grids if math.prod(grid) <= cap)
        return rule.replace(grids=grids) if grids else None
    if "max_tiles" not in names or cap >= rule.max_tiles:
        return rule if "max_tiles" in names else None
    least = {"min_tiles": min(rule.min_tiles, cap)} if "min_tiles" in names else {}
    return rule.replace(max_tiles=cap, **least)


__all__ = ["Planner", "VideoPlan", "plan_images", "plan_sample", "plan_video"]
