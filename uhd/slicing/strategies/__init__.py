"""Slicing rules by name: each is a function from (height, width) to a :class:`uhd.slicing.SlicePlan`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from uhd.slicing.config import SlicingConfig
from uhd.slicing.plan import SlicePlan, plan

_SUMMARIES = {
    "llava-uhd": "adaptive grid of up to 7 slices near 336 px, overview last; the released LLaVA-UHD rule",
    "llava-uhd-safe": "the same, with every view kept within 576 patches also for degenerate images (the default)",
    "llava-uhd-paper": "the first release's rule: cap 6 that may be exceeded by one, small images are cut too",
    "minicpm-v": "adaptive grid of up to 9 slices near 448 px, sides rounded, overview first; MiniCPM-V 2.0 to 2.6",
    "minicpm-v-4.6": "the same in multiples of 56 px, patches / 16 tokens a view; MiniCPM-V 4.6",
    "minicpm-v-4.6-4x": "the same in multiples of 28 px, patches / 4 tokens a view; MiniCPM-V 4.6 in its 4x mode",
}


def strategies() -> dict[str, str]:
    """Every rule's name and one line about it."""
    return dict(_SUMMARIES)


def strategy(name: str) -> Callable[[tuple[int, int]], SlicePlan]:
    """The rule of this name (dashes and underscores are the same), to be called with (height, width) in px.

    Raises:
        ValueError: No such rule; the message lists the nearest names.
    """
    return partial(plan, config=SlicingConfig.preset(name))
