"""From a canvas of a plan to its views, and the resize that equals the reference's bytes: Pillow's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from uhd.slicing.plan import Canvas, SlicePlan, within

from .settings import RESAMPLE, PixelSettings, check_filter

_TAPS: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "bilinear": (1, lambda x: 1 - x),
    "bicubic": (2, lambda x: np.where(x < 1, (1.25 * x - 2.25) * x**2 + 1, ((-0.75 * x + 3.75) * x - 6) * x + 3)),
    "lanczos": (3, lambda x: np.sinc(x) * np.sinc(x / 3)),
}
"""Without widening: pixels to either side that count, and their weight by distance; as PyTorch's, a = -0.75."""

MOST_RESIZED = 1 << 26
"""Pixels up to which an image is resized whole, as the releases do, even if one view of it is kept: 200 MB of RGB."""


def resize(
    image: Any,
    size_hw: tuple[int, int],
    name: str,
    antialias: bool,
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image:
    """Resize 8-bit RGB, an image or an array; the filter widens where it shrinks unless told not to.

    ``box`` is the (left, top, right, bottom) of the part that is resized, px; ``None`` is all of it.
    """
    check_filter(name)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(np.ascontiguousarray(image))
    if antialias:
        return image.resize(size_hw[::-1], RESAMPLE[name], box=box)
    left, top, right, bottom = box or (0, 0, image.width, image.height)
    rows = _sampled(np.asarray(image), name, 0, (top, bottom), size_hw[0])
    resized = _sampled(rows, name, 1, (left, right), size_hw[1])
    return Image.fromarray(np.rint(resized).clip(0, 255).astype(np.uint8))


def _sampled(array: np.ndarray, name: str, axis: int, span: tuple[float, float], length: int) -> np.ndarray:
    """Sample one axis at the middles of ``length`` equal parts of ``span``; the result is float32."""
    reach, weight = _TAPS[name]
    places = span[0] + (np.arange(length) + 0.5) * (span[1] - span[0]) / length - 0.5
    first = np.floor(places).astype(np.int64)
    taps = range(1 - reach, reach + 1)
    weights = np.stack([weight(np.abs(places - first - tap)) for tap in taps])
    weights /= weights.sum(axis=0)
    shape = [-1 if place == axis else 1 for place in range(3)]
    return sum(
        array.take(np.clip(first + tap, 0, array.shape[axis] - 1), axis) * part.astype(np.float32).reshape(shape)
        for tap, part in zip(taps, weights, strict=True)
    )


def cut_canvas(
    image: Any, canvas: Canvas, plan: SlicePlan, settings: PixelSettings, resize: Callable[..., Any] = resize
) -> list[np.ndarray]:
    """Make the views of one canvas of an upright RGB image, or of an array of one; they may share memory."""
    name, antialias = settings.resample or plan.resample, plan.antialias
    if canvas.source is not None:  # first, so that the filter sees nothing outside
        top, left, bottom, right = canvas.source
        array = isinstance(image, np.ndarray)
        image = image[top:bottom, left:right] if array else image.crop((left, top, right, bottom))
    if canvas.first_hw is not None:
        image = resize(image, canvas.first_hw, name, antialias)
    if is_long_crop(canvas):
        # an elongated image would be resized to gigabytes of which one view is kept: make only what is seen; Pillow
        # may then take its two passes in another order, which moves single pixels by up to 22 levels on noise
        whole = np.asarray(resize(image, canvas.size_hw, name, antialias, box=_seen(image, canvas)))
    else:
        whole = _placed(np.asarray(resize(image, canvas.content_hw, name, antialias)), canvas)
    if canvas.view_filter is not None:
        name, antialias = settings.resample or canvas.view_filter[0], canvas.view_filter[1]
    tiles = [whole[top:bottom, left:right] for top, left, bottom, right in canvas.tiles]
    view_hw = tuple(canvas.view_hw)
    return [
        tile if tile.shape[:2] == view_hw else np.asarray(resize(tile, view_hw, name, antialias)) for tile in tiles
    ]


def _placed(content: np.ndarray, canvas: Canvas) -> np.ndarray:
    """Put resized content in its place on a filled canvas, (h, w, 3) uint8."""
    if canvas.offset == (0, 0) and canvas.size_hw == canvas.content_hw:
        return content
    (top, left), (height, width) = canvas.offset, canvas.size_hw
    whole = np.empty((height, width, 3), np.uint8)
    whole[...] = canvas.fill or (0, 0, 0)
    seen = content[max(-top, 0) : max(height - top, 0), max(-left, 0) : max(width - left, 0)]
    top, left = max(top, 0), max(left, 0)
    whole[top : top + seen.shape[0], left : left + seen.shape[1]] = seen
    return whole


def is_long_crop(canvas: Canvas) -> bool:
    """Return whether the content covers its canvas and is so much larger that only what is seen should be made."""
    return canvas.is_covered and math.prod(canvas.content_hw) > max(MOST_RESIZED, 16 * math.prod(canvas.size_hw))


def _seen(image: Image.Image, canvas: Canvas) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) of the part of the image that a crop shows, px."""
    (top, left), (height, width) = canvas.offset, canvas.size_hw
    scale_h, scale_w = image.height / canvas.content_hw[0], image.width / canvas.content_hw[1]
    right, bottom = min((width - left) * scale_w, image.width), min((height - top) * scale_h, image.height)
    return -left * scale_w, -top * scale_h, right, bottom


def check_plan(plan: SlicePlan, image_hw: tuple[int, int]) -> None:
    """Refuse a plan for another size, and canvases that are not whole: Pillow would paint black what is missing."""
    if image_hw != tuple(plan.image_hw):
        raise ValueError(
            f"the plan is for an image of {plan.image_hw[0]}x{plan.image_hw[1]} px (height x width), this one has "
            f"{image_hw[0]}x{image_hw[1]} px: plan it by image_size_hw(image), which knows the EXIF orientation"
        )
    for canvas in plan.canvases:
        if min(*canvas.content_hw, *canvas.size_hw, *canvas.view_hw, *(canvas.first_hw or ())) < 1:
            raise ValueError(f"every side of a canvas must be at least 1 px, got {canvas}")
        if canvas.source is not None and not within(canvas.source, image_hw):
            raise ValueError(f"the source {tuple(canvas.source)} of a canvas lies outside the image of {image_hw} px")
        for box in canvas.tiles:
            if not within(box, canvas.size_hw):
                raise ValueError(f"the tile {tuple(box)} lies outside its canvas of {canvas.size_hw} px")
        if not canvas.is_covered and canvas.fill is None:
            raise ValueError(
                f"content of {canvas.content_hw} px at {canvas.offset} does not cover its canvas of {canvas.size_hw} "
                "px: give the canvas a fill"
            )
