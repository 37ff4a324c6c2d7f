"""Where a point of the image is in a view, a patch, a token, and back.

Points are (y, x) and boxes (top, left, bottom, right), in px with edges at whole numbers: pixel i covers [i, i + 1).
Everything is computed in fractions, so a map followed by its inverse gives the number one started with, exactly.
Call ``float`` on the results to draw them. Every map takes a point or a box.

>>> from uhd.slicing import plan
>>> page = plan((1008, 672))  # 3 x 2 slices of 336 px, then the overview
>>> [float(side) for side in view_box(page, 1)]
[0.0, 336.0, 336.0, 672.0]
>>> [float(side) for side in image_to_view(page, 1, (100, 400))]
[100.0, 64.0]
>>> view_to_image(page, 1, (100, 64)) == (100, 400)
True
>>> [float(side) for side in image_to_canvas(page, 1, (252, 504))]
[101.5, 199.5]
>>> [(hit.view, hit.patch) for hit in locate(page, (100, 400))]
[(1, (7, 4)), (6, (2, 11))]
>>> patch_index(page, 1, (7, 4)), patch_at(page, 748)
(748, (1, (7, 4)))
>>> [float(side) for side in patch_box(page, 1, (7, 4))]
[98.0, 392.0, 112.0, 406.0]
>>> token_range(page, 1), view_of_token(page, 127)
(range(64, 128), 1)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from numbers import Rational
from typing import NamedTuple

from uhd.slicing.plan import Box, SlicePlan

Coordinates = tuple[Fraction, ...]
Axes = list[tuple[Fraction, Fraction]]
"""Of y and of x: (scale, shift), which maps y to scale * y + shift."""


class PatchHit(NamedTuple):
    """A view that shows a point: its index, the point in it (px), and the patch (row, column) the point lies in."""

    view: int
    point: Coordinates
    patch: tuple[int, int]


def image_to_canvas(plan: SlicePlan, canvas: int, place: Sequence[float | Rational]) -> Coordinates:
    """A point or box of the image, px -> the same on canvas number ``canvas``, px."""
    return _map(place, _resize(plan, canvas))


def canvas_to_image(plan: SlicePlan, canvas: int, place: Sequence[float | Rational]) -> Coordinates:
    """The inverse of :func:`image_to_canvas`."""
    return _map(place, _inverse(_resize(plan, canvas)))


def canvas_to_view(plan: SlicePlan, view: int, place: Sequence[float | Rational]) -> Coordinates:
    """A point or box on the view's canvas, px -> the same in view number ``view``, px (outside of it too)."""
    return _map(place, _cut(plan, view))


def view_to_canvas(plan: SlicePlan, view: int, place: Sequence[float | Rational]) -> Coordinates:
    """The inverse of :func:`canvas_to_view`."""
    return _map(place, _inverse(_cut(plan, view)))


def image_to_view(plan: SlicePlan, view: int, place: Sequence[float | Rational]) -> Coordinates:
    """A point or box of the image, px -> the same in view number ``view``, px (outside of it too)."""
    return canvas_to_view(plan, view, image_to_canvas(plan, _item(plan.views, view, "view").canvas, place))


def view_to_image(plan: SlicePlan, view: int, place: Sequence[float | Rational]) -> Coordinates:
    """The inverse of :func:`image_to_view`: from a view's px to the image's."""
    return canvas_to_image(plan, _item(plan.views, view, "view").canvas, view_to_canvas(plan, view, place))


def view_box(plan: SlicePlan, view: int) -> Coordinates:
    """The part of the image that a view shows, px; it reaches outside the image where the view is padded."""
    return view_to_image(plan, view, (0, 0, *_item(plan.views, view, "view").size_hw))


def patch_box(plan: SlicePlan, view: int, patch: tuple[int, int]) -> Coordinates:
    """The part of the image under patch (row, column) of a view, px."""
    rows, cols = _item(plan.views, view, "view").patches_hw
    (row, col), p = patch, plan.patch_size
    if not (0 <= row < rows and 0 <= col < cols):
        raise ValueError(f"view {view} has {rows}x{cols} patches (rows x columns), so no patch {patch}")
    return view_to_image(plan, view, (row * p, col * p, (row + 1) * p, (col + 1) * p))


def locate(plan: SlicePlan, point: Sequence[float | Rational]) -> tuple[PatchHit, ...]:
    """Every view and patch that shows the image's point (y, x), px; slices that overlap give several.

    Raises:
        ValueError: The point is outside of the image.
    """
    if len(point) != 2:
        raise ValueError(f"expected a point (y, x), got {len(point)} numbers")
    y, x = (_fraction(value) for value in point)
    if not (0 <= y < plan.image_hw[0] and 0 <= x < plan.image_hw[1]):
        raise ValueError(f"point (y, x) = {tuple(point)} lies outside the {plan.image_hw} (height, width) image")
    hits = []
    for view in plan.views:
        inside = image_to_view(plan, view.index, (y, x))
        patch = (inside[0] // plan.patch_size, inside[1] // plan.patch_size)
        # a view whose side is no multiple of the patch has a rim that no patch covers
        if all(0 <= i < n for i, n in zip(patch, view.patches_hw, strict=True)):
            hits.append(PatchHit(view.index, inside, patch))
    return tuple(hits)


def patch_index(plan: SlicePlan, view: int, patch: tuple[int, int]) -> int:
    """Row of a patch in the image's packed (N, P) patches."""
    patch_box(plan, view, patch)  # raises where there is no such patch
    before = sum(v.num_patches for v in plan.views[:view])
    return before + patch[0] * plan.views[view].patches_hw[1] + patch[1]


def patch_at(plan: SlicePlan, index: int) -> tuple[int, tuple[int, int]]:
    """The inverse of :func:`patch_index`: (view, (row, column))."""
    view, rest = _find([v.num_patches for v in plan.views], index, "packed patch")
    return view, divmod(rest, plan.views[view].patches_hw[1])


def token_range(plan: SlicePlan, view: int) -> range:
    """The visual tokens (separators not counted) that a view's latents become, in feeding order."""
    counts = _token_counts(plan)
    _item(plan.views, view, "view")
    return range(sum(counts[:view]), sum(counts[: view + 1]))


def view_of_token(plan: SlicePlan, token: int) -> int:
    """The view whose latents hold this visual token: the inverse of :func:`token_range`."""
    return _find(_token_counts(plan), token, "visual token")[0]


def _token_counts(plan: SlicePlan) -> list[int]:
    counts = [view.num_tokens for view in plan.views]
    if not plan.tokens_by_view:
        raise ValueError(
            f"strategy {plan.strategy!r} joins the views' {sum(counts)} tokens into {plan.num_visual_tokens}: "
            "no token belongs to one view"
        )
    return counts


def _find(counts: list[int], index: int, what: str) -> tuple[int, int]:
    ends = list(accumulate(counts))
    if not 0 <= index < ends[-1]:
        raise ValueError(f"{what} {index} is not in 0..{ends[-1] - 1}")
    view = bisect_right(ends, index)
    return view, index - (ends[view] - counts[view])


def _item(items: Sequence, index: int, what: str):
    if not 0 <= index < len(items):
        raise ValueError(f"the plan has {len(items)} {what}s, so no {what} {index}")
    return items[index]


def _resize(plan: SlicePlan, canvas: int) -> Axes:
    found = _item(plan.canvases, canvas, "canvas")
    source = found.source or Box(0, 0, *plan.image_hw)
    scales = [Fraction(new, old) for new, old in zip(found.content_hw, source.size_hw, strict=True)]
    return [(scale, to - start * scale) for scale, to, start in zip(scales, found.offset, source[:2], strict=True)]


def _cut(plan: SlicePlan, view: int) -> Axes:
    found = _item(plan.views, view, "view")
    scales = [Fraction(new, old) for new, old in zip(found.size_hw, found.box.size_hw, strict=True)]
    return [(scale, -start * scale) for scale, start in zip(scales, found.box[:2], strict=True)]


def _inverse(axes: Axes) -> Axes:
    return [(1 / scale, -shift / scale) for scale, shift in axes]


def _map(place: Sequence, axes: Axes) -> Coordinates:
    if len(place) not in (2, 4):
        raise ValueError(f"expected a point (y, x) or a box (top, left, bottom, right), got {len(place)} numbers")
    each = zip(place, axes * (len(place) // 2), strict=True)
    return tuple(scale * _fraction(value) + shift for value, (scale, shift) in each)


def _fraction(value: float | Rational) -> Fraction:
    try:  # item() turns NumPy's numbers, which Fraction does not take, into Python's
        return Fraction(value.item() if hasattr(value, "item") else value)
    except (OverflowError, ValueError, TypeError):
        raise ValueError(f"a coordinate is a finite number of px, got {value!r}") from None
