"""How answers are scored, and how sure a difference between two rules is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from uhd.nano.evaluate import edit_distance


def exact(answer: str, truths: Sequence[str]) -> bool:
    """Whether an answer is one of the true ones, but for spaces around it."""
    return answer.strip() in [truth.strip() for truth in truths]


def anls(answer: str, truths: Sequence[str]) -> float:
    """The normalised Levenshtein similarity that is averaged: 1 - distance / longer length, 0 where that is below 0.5.

    Of the true answers the nearest counts; case, and spaces around, do not. Source: Biten et al., Scene Text Visual
    Question Answering (ICCV 2019), section 5.

    >>> anls("Hello", ["hallo", "x"]), anls("no", ["yes"])
    (0.8, 0.0)
    """
    found = 0.0
    for truth in truths:
        one, other = answer.strip().lower(), truth.strip().lower()
        longer = max(len(one), len(other))
        near = 1 - edit_distance(one, other) / longer if longer else 1.0
        found = max(found, near if near >= 0.5 else 0.0)
    return found


def characters_wrong(answer: str, truths: Sequence[str]) -> tuple[int, int]:
    """(edit distance, length) of the true answer that is nearest to an answer."""
    each = [(edit_distance(answer.strip(), truth.strip()), len(truth.strip())) for truth in truths]
    return min(each, key=lambda pair: pair[0] / max(pair[1], 1))


def paired(scores: Sequence[float], first: Sequence[float], images: Sequence[str]) -> list[float | None]:
    """Difference of two rules' mean scores, and its 95 % interval over images, by Student's t.

    Questions about one image are not independent, so images are what is counted. There is no interval of one image,
    nor where all images agree on the difference: that is no measure of how certain it is.
    """
    sums: dict[str, list[float]] = {}
    for one, other, image in zip(scores, first, images, strict=True):
        found = sums.setdefault(image, [0, 0])
        found[0], found[1] = found[0] + one - other, found[1] + 1
    difference = sum(apart for apart, _ in sums.values()) / len(scores)
    spread = sum((apart - difference * asked) ** 2 for apart, asked in sums.values())
    if len(sums) < 2 or not spread:
        return [difference, None, None]
    half = quantile(len(sums) - 1) * math.sqrt(spread * len(sums) / (len(sums) - 1)) / len(scores)
    return [difference, max(difference - half, -1.0), min(difference + half, 1.0)]


def quantile(freedom: float) -> float:
    """97.5 % of Student's t are below this.

    t = sqrt(freedom) * tan(angle), where the angle has the density cos(angle) ** (freedom - 1).
    """
    far = min(np.pi / 2, 12 / np.sqrt(freedom))
    angles = far * (np.arange(-10_000, 10_000) + 0.5) / 10_000
    density = np.cos(angles).clip(0) ** (freedom - 1)
    below = np.cumsum(density) - density / 2
    return float(np.sqrt(freedom) * np.tan(np.interp(0.975, below / density.sum(), angles)))
