"""The backend that equals the reference's bytes: Pillow resizes every canvas as a whole, then it is cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .load import load_image
from .settings import RESAMPLE, PixelSettings, check_filter

if TYPE_CHECKING:
    from uhd.slicing.plan import Canvas, SlicePlan

_TAPS: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "bilinear": (1, lambda x: 1 - x),
    "bicubic": (2, lambda x: np.where(x < 1, (1.25 * x - 2.25) * x**2 + 1, ((-0.75 * x + 3.75) * x - 6) * x + 3)),
    "lanczos": (3, lambda x: np.sinc(x) * np.sinc(x / 3)),
}
"""Without widening: pixels to either side that count, and their weight by distance; as PyTorch's, a = -0.75."""

MOST_RESIZED = 1 << 26
"""Pixels up to which an image is resized whole, as the releases do, even if one view of it is kept: 200 MB of RGB."""


def cut_pillow(image: Any, plan: SlicePlan, settings: PixelSettings) -> list[np.ndarray]:
    """:func:`uhd.pixels.cut` by this backend."""
    image = load_image(image, settings=settings)
    check_planned((image.height, image.width), plan)
    return [view for canvas in plan.canvases for view in cut_canvas(image, canvas, plan, settings)]


def check_planned(image_hw: tuple[int, int], plan: SlicePlan) -> None:
    """Refuse an image of another size than the plan's."""
    if image_hw != tuple(plan.image_hw):
        raise ValueError(
            f"the plan is for an image of {plan.image_hw[0]}x{plan.image_hw[1]} px (height x width), this one has "
            f"{image_hw[0]}x{image_hw[1]} px: plan it by image_size_hw(image), which knows the EXIF orientation"
        )


def cut_canvas(image: Image.Image, canvas: Canvas, plan: SlicePlan, settings: PixelSettings) -> list[np.ndarray]:
    """Make the views of one canvas of an upright RGB image; they may share memory."""
    check_canvas(canvas, (image.height, image.width))
    whole = render_canvas(image, canvas, Resize(settings.resample or plan.resample, plan.antialias))
    name, antialias = canvas.view_filter or (plan.resample, plan.antialias)
    resize_view = Resize(settings.resample or name, antialias)
    views = []
    for top, left, bottom, right in canvas.tiles:
        tile = whole[top:bottom, left:right]
        if tile.shape[:2] != tuple(canvas.view_hw):
            tile = np.asarray(resize_view(Image.fromarray(np.ascontiguousarray(tile)), canvas.view_hw))
        views.append(tile)
    return views


def _wh(size_hw: tuple[int, int]) -> tuple[int, int]:
    """Pillow's (width, height)."""
    return size_hw[1], size_hw[0]


class Resize:
    """``resize(image, size_hw)``: 8-bit RGB by one filter, which widens where it shrinks unless told not to."""

    def __init__(self, name: str, antialias: bool) -> None:
        check_filter(name)
        self.name, self.antialias = name, antialias

    def __call__(
        self, image: Image.Image, size_hw: tuple[int, int], *, box: tuple[float, float, float, float] | None = None
    ) -> Image.Image:
        """``box``: (left, top, right, bottom) of the part that is resized, px; ``None`` is all of it."""
        left, top, right, bottom = box or (0, 0, image.width, image.height)
        if self.antialias:
            return image.resize(_wh(size_hw), RESAMPLE[self.name], box=box)
        rows = self._sampled(np.asarray(image), 0, (top, bottom), size_hw[0])
        resized = self._sampled(rows, 1, (left, right), size_hw[1])
        return Image.fromarray(np.rint(resized).clip(0, 255).astype(np.uint8))

    def _sampled(self, array: np.ndarray, axis: int, span: tuple[float, float], length: int) -> np.ndarray:
        """Sample one axis at the middles of ``length`` equal parts of ``span``; the result is float32."""
        reach, weight = _TAPS[self.name]
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


def render_canvas(image: Image.Image, canvas: Canvas, resize: Resize) -> np.ndarray:
    """Make a whole canvas, (h, w, 3) uint8."""
    if canvas.source is not None:
        top, left, bottom, right = canvas.source
        image = image.crop((left, top, right, bottom))  # first, so that the filter sees nothing outside
    if canvas.first_hw is not None:
        image = resize(image, canvas.first_hw)
    if is_long_crop(canvas):
        # an elongated image would be resized to gigabytes of which one view is kept: make only what is seen; Pillow
        # may then take its two passes in another order, which moves single pixels by up to 22 levels on noise
        return np.asarray(resize(image, canvas.size_hw, box=_seen(image, canvas)))
    whole = resize(image, canvas.content_hw)
    if canvas.offset != (0, 0) or canvas.size_hw != canvas.content_hw:
        content, whole = whole, Image.new("RGB", _wh(canvas.size_hw), canvas.fill or (0, 0, 0))
        whole.paste(content, _wh(canvas.offset))
    return np.asarray(whole)


def is_long_crop(canvas: Canvas) -> bool:
    """Return whether the content covers its canvas and is so much larger that only what is seen should be made."""
    return _covers(canvas) and math.prod(canvas.content_hw) > max(MOST_RESIZED, 16 * math.prod(canvas.size_hw))


def _covers(canvas: Canvas) -> bool:
    """Return whether the content reaches every edge of its canvas."""
    sides = zip(canvas.offset, canvas.content_hw, canvas.size_hw, strict=True)
    return all(start <= 0 and start + content >= side for start, content, side in sides)


def _seen(image: Image.Image, canvas: Canvas) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) of the part of the image that a crop shows, px."""
    (top, left), (height, width) = canvas.offset, canvas.size_hw
    scale_h, scale_w = image.height / canvas.content_hw[0], image.width / canvas.content_hw[1]
    right, bottom = min((width - left) * scale_w, image.width), min((height - top) * scale_h, image.height)
    return -left * scale_w, -top * scale_h, right, bottom


def check_canvas(canvas: Canvas, image_hw: tuple[int, int]) -> None:
    """Refuse a canvas that is not whole: Pillow would paint black what is missing."""

    def inside(box: tuple[int, int, int, int], size_hw: tuple[int, int]) -> bool:
        top, left, bottom, right = box
        return 0 <= top < bottom <= size_hw[0] and 0 <= left < right <= size_hw[1]

    if min(*canvas.content_hw, *canvas.size_hw, *canvas.view_hw, *(canvas.first_hw or ())) < 1:
        raise ValueError(f"every side of a canvas must be at least 1 px, got {canvas}")
    if canvas.source is not None and not inside(canvas.source, image_hw):
        raise ValueError(f"the source {tuple(canvas.source)} of a canvas lies outside the image of {image_hw} px")
    for box in canvas.tiles:
        if not inside(box, canvas.size_hw):
            raise ValueError(f"the tile {tuple(box)} lies outside its canvas of {canvas.size_hw} px")
    if not _covers(canvas) and canvas.fill is None:
        raise ValueError(
            f"content of {canvas.content_hw} px at {canvas.offset} does not cover its canvas of {canvas.size_hw} px: "
            "give the canvas a fill"
        )
