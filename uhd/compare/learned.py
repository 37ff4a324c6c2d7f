"""What a rule costs when a model learns to read, as docs/learned.md measured it, for a mix of shapes.

All numbers are shares of exact answers to "read everything", of models that were trained alike but for how images were
cut (one native view: also for larger tables of positions and latents), with 95 % intervals. Two costs are joined:

* of resolution: the arm that sees the overview alone, with as many tokens, keeps less and answers less. Its loss over
  what it keeps less is a rate, about 0.8 exact answers for a px kept;
* of the kind of cutting: an arm's difference to native slices on images of a shape (longer side / shorter side), less
  what its own resolution explains at that rate.

They are of small models on short words. A rule that cuts in another way than the measured arms has no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from uhd.slicing import PRESETS, Slicing, SlicingConfig, plan_many
from uhd.slicing.strategies.anyres import AnyResConfig
from uhd.slicing.strategies.fixed import SquarePadConfig, StretchConfig

from .summary import ASPECTS

DIFFERENCES: dict[str, tuple[tuple[float, float, float], ...]] = {
    "stretch": ((0.115, 0.073, 0.158), (0.120, 0.075, 0.165), (-0.153, -0.226, -0.081), (-0.241, -0.303, -0.180)),
    "pad": ((0.063, 0.020, 0.105), (0.032, -0.012, 0.075), (-0.345, -0.409, -0.281), (-0.399, -0.465, -0.332)),
    "next": ((-0.004, -0.072, 0.064), (-0.003, -0.049, 0.044), (-0.047, -0.096, 0.002), (-0.225, -0.287, -0.164)),
    "anyres": ((0.017, -0.035, 0.070), (-0.038, -0.083, 0.007), (0.011, -0.034, 0.055), (-0.027, -0.090, 0.037)),
    "native-direct": ((0.164, 0.117, 0.210), (0.128, 0.088, 0.167), (0.122, 0.049, 0.196), (0.117, 0.058, 0.176)),
}
"""Arm of docs/learned.md -> (difference to native slices, its interval) in each of :data:`ASPECTS`; the last one on
images of its own, to slices of as many tokens."""

MORE_KEPT: dict[str, tuple[float, ...]] = {
    "uhd": (0.0, 0.0, 0.0, 0.0),
    "stretch": (0.013, 0.027, -0.201, -0.336),
    "pad": (0.001, -0.049, -0.359, -0.534),
    "next": (0.002, -0.007, -0.039, -0.197),
    "anyres": (0.002, -0.007, 0.003, -0.009),
    "native-direct": (0.025, 0.093, 0.026, 0.011),
}
"""How much more of the resolution that arm keeps than native slices, on average over the images it was judged on."""

RESOLUTION = (-0.362, -0.391, -0.334)
"""Difference of the arm ``overview-wide`` to native slices in all, with its interval."""

LESS_KEPT = 0.947 - 0.490
"""What it keeps less, on average over the images."""

RATE = tuple(-difference / LESS_KEPT for difference in RESOLUTION)
"""Exact answers lost for a share of px lost: about 0.79, from 0.86 to 0.73."""

KINDS = {
    "uhd": "native slices",
    "stretch": "one square view, stretched",
    "pad": "one square view, padded",
    "next": "LLaVA-NeXT's five canvases",
    "anyres": "full AnyRes",
    "native-direct": "one native view",
}


_PLANNED = {
    kind: {option: getattr(PRESETS[name], option) for option in SlicingConfig.later}
    for kind, name in {"uhd": "llava-uhd", "native-direct": "uhd-plus"}.items()
}
"""Options of the adaptive planner -> the arm that has just these."""


class Lost(NamedTuple):
    """Share of exact answers that a rule loses against native slices that keep every px, with its interval."""

    kind: str
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def kind_of(rule: Slicing) -> str | None:
    """Which arm of the learned comparison cuts as this rule does; ``None``: none, as with other options of planning.

    >>> from uhd.slicing import find
    >>> [kind_of(find(name)) for name in ("llava-uhd", "siglip", "llava-next", "uhd-plus", "qwen2-vl")]
    ['uhd', 'stretch', 'next', 'native-direct', None]
    """
    if isinstance(rule, AnyResConfig):
        return "next" if len(rule.grids) <= 5 else "anyres"
    if isinstance(rule, SlicingConfig):
        same = (kind for kind, measured in _PLANNED.items() if all(getattr(rule, k) == v for k, v in measured.items()))
        return next(same, None)
    kinds = {StretchConfig: "stretch", SquarePadConfig: "pad"}
    return next((kind for known, kind in kinds.items() if isinstance(rule, known)), None)


def differs(rule: Slicing, sizes_hw: np.ndarray) -> np.ndarray:
    """(S,) whether a rule sees an image of that size in its own way: one native view only where it replaces slices.

    >>> from uhd.slicing import find
    >>> differs(find("uhd-plus"), np.array([[100, 100], [1000, 900], [250, 2001]])).tolist()
    [False, True, False]
    """
    if kind_of(rule) != "native-direct":
        return np.ones(len(sizes_hw), bool)
    one = sizes_hw.max(axis=1) <= rule.one_view_below * sizes_hw.min(axis=1)
    return one & (plan_many(sizes_hw, rule.replace(one_view_below=None, max_tokens=None))["grid"][:, 0] > 0)


def shapes(sizes_hw: np.ndarray, counts: np.ndarray, *, among: np.ndarray | None = None) -> tuple[float, ...]:
    """The share of images in each of :data:`ASPECTS`, of (S, 2) sizes, px, and the (S,) images of each.

    ``among``: (S,) bool, images that are in none elsewhere.

    >>> sizes, counts = np.array([[1000, 1000], [300, 1500]]), np.array([3, 1])
    >>> shapes(sizes, counts), shapes(sizes, counts, among=sizes[:, 0] > 300)
    ((0.75, 0.0, 0.0, 0.25), (0.75, 0.0, 0.0, 0.0))
    """
    aspects, total = sizes_hw.max(axis=1) / sizes_hw.min(axis=1), counts.sum()
    counts = counts if among is None else np.where(among, counts, 0)
    inside = (counts[(aspects >= bucket.low) & (aspects < bucket.high)].sum() for bucket in ASPECTS)
    return tuple(float(number / total) for number in inside)


def lost(rule: Slicing, kept: float, shares: Sequence[float]) -> Lost | None:
    """What a rule loses that keeps so much of images of these :func:`shapes`; ``None``: its kind was not measured.

    Ends of intervals are added as if all of them erred together, which is wider than if they erred each for itself.

    >>> from uhd.slicing import find
    >>> print(lost(find("llava-uhd"), 0.5, (1, 0, 0, 0)), lost(find("siglip"), 0.5, (1, 0, 0, 0)))
    +0.396 [+0.365, +0.428] +0.291 [+0.218, +0.365]
    """
    kind = kind_of(rule)
    if kind is None:
        return None
    rate, most, least = RATE
    gain, low, high = 0.0, 0.0, 0.0
    for place, share in enumerate(shares):
        found = DIFFERENCES[kind][place] if kind in DIFFERENCES else (0.0, 0.0, 0.0)
        explained = rate * MORE_KEPT[kind][place]
        gain, low, high = (
            total + share * (part - explained) for total, part in zip((gain, low, high), found, strict=True)
        )
    missing = 1 - kept
    return Lost(kind, rate * missing - gain, least * missing - high, most * missing - low)
