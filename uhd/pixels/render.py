"""From an image and its plan to uint8 views, and from a view to patches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from einops import rearrange
from PIL import Image

from .load import load_image
from .settings import DEFAULT, RESAMPLE, PixelSettings, check_filter

if TYPE_CHECKING:
    from uhd.slicing.plan import Canvas, SlicePlan

_TAPS: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "bilinear": (1, lambda x: 1 - x),
    "bicubic": (2, lambda x: np.where(x < 1, (1.25 * x - 2.25) * x**2 + 1, ((-0.75 * x + 3.75) * x - 6) * x + 3)),
    "lanczos": (3, lambda x: np.sinc(x) * np.sinc(x / 3)),
}
"""Without widening: pixels to either side that count, and their weight by distance; as PyTorch's, a = -0.75."""

INNER = {"chw": "c py px", "hwc": "py px c"}
"""Orders of the values inside a patch."""

MOST_RESIZED = 1 << 26
"""Pixels up to which an image is resized whole, as the releases do, even if one view of it is kept: 200 MB of RGB."""


def render(image: Any, plan: SlicePlan, *, settings: PixelSettings = DEFAULT) -> list[np.ndarray]:
    """The views of a plan, in the order of ``plan.views``.

    Every canvas is resized from the original image as a whole and then cut, so neighbouring slices share their
    filter's support across the cut. It is resized once, or twice where it has a ``first_hw``; a tile whose size is not
    ``view_hw`` once more.

    Args:
        image: Anything :func:`load_image` takes; its size must be ``plan.image_hw``.
        plan: From :func:`uhd.slicing.plan` or any strategy.
        settings: Its filter, or the plan's where it names none. Whether that antialiases is the plan's.

    Returns:
        One (h, w, 3) uint8 array a view, (h, w) = ``view.size_hw``; each owns its memory.

    Raises:
        ValueError: The image has another size than the plan, or a canvas is not whole: its source or a tile lies
            outside, or a part is neither content nor filled; or there is no such filter.

    Source: one resize and an exact cut as in thunlp/LLaVA-UHD, llava/slice_process.py ``slice_image_minicpm``.
    """
    return [view.copy() for view in cut(image, plan, settings=settings)]


def cut(image: Any, plan: SlicePlan, *, settings: PixelSettings = DEFAULT) -> list[np.ndarray]:
    """As :func:`render`, but the views may share memory with each other or the image: only to be read."""
    if settings.backend == "fast":
        from .fast import cut_fast  # it imports torch

        return cut_fast(image, plan, settings)
    image = load_image(image, settings=settings)
    check_planned((image.height, image.width), plan)
    return [view for canvas in plan.canvases for view in cut_canvas(image, canvas, plan, settings)]


def check_planned(image_hw: tuple[int, int], plan: SlicePlan) -> None:
    if image_hw != tuple(plan.image_hw):
        raise ValueError(
            f"the plan is for an image of {plan.image_hw[0]}x{plan.image_hw[1]} px (height x width), this one has "
            f"{image_hw[0]}x{image_hw[1]} px: plan it by image_size_hw(image), which knows the EXIF orientation"
        )


def cut_canvas(image: Image.Image, canvas: Canvas, plan: SlicePlan, settings: PixelSettings) -> list[np.ndarray]:
    """The views of one canvas of an upright RGB image, by Pillow; they may share memory."""
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


def patchify(view: Any, patch_size: int, *, inner: str = "chw") -> Any:
    """Fold a view into patches.

    Patches are row-major; inside one the order is (channel, py, px), so that a patch Conv2d's weight (D, C, p, p),
    flattened to (D, C*p*p), is the matching linear layer. Rows and columns past the last whole patch are left out, as
    a convolution with stride = kernel never sees them (SigLIP 384 with patch 14: the last 6 px).

    Args:
        view: (h, w, C) array or tensor.
        patch_size: p, px.
        inner: ``"chw"`` as above, or ``"hwc"``: the order inside a patch is (py, px, channel), as pixels lie in
            memory.

    Returns:
        ((h // p) * (w // p), C * p * p), same type and dtype. :func:`unpatchify` is the inverse.

    Raises:
        ValueError: Not three axes, a side is shorter than one patch, or there is no such order.
    """
    if len(view.shape) != 3 or min(view.shape[:2]) < patch_size:
        raise ValueError(
            f"a view is (height, width, channels) with sides of at least one patch of {patch_size} px, "
            f"got {tuple(view.shape)}"
        )
    rows, cols = view.shape[0] // patch_size, view.shape[1] // patch_size
    seen = view[: rows * patch_size, : cols * patch_size]
    return rearrange(seen, f"(h py) (w px) c -> (h w) ({inner_axes(inner)})", py=patch_size, px=patch_size)


def unpatchify(patches: Any, grid_hw: tuple[int, int], patch_size: int, *, inner: str = "chw") -> Any:
    """(rows * cols, C * p * p) patches back to the (rows * p, cols * p, C) view; the inverse of :func:`patchify`.

    Raises:
        ValueError: The number of patches is not rows * cols, their width not a multiple of p * p, or there is no such
            order.
    """
    rows, cols = grid_hw
    if len(patches.shape) != 2 or patches.shape[0] != rows * cols or patches.shape[1] % patch_size**2:
        raise ValueError(
            f"a {rows}x{cols} grid of {patch_size} px patches is ({rows * cols}, channels * {patch_size**2}), "
            f"got {tuple(patches.shape)}"
        )
    pattern = f"(h w) ({inner_axes(inner)}) -> (h py) (w px) c"
    return rearrange(patches, pattern, h=rows, w=cols, py=patch_size, px=patch_size)


def fold_into(out: np.ndarray, view: np.ndarray, patch_size: int, inner: str) -> None:
    """:func:`patchify` of a (h, w, 3) array, written in one pass to ``out`` (rows * cols, 3 * p * p)."""
    p = patch_size
    rows, cols = view.shape[0] // p, view.shape[1] // p
    seen = view[: rows * p, : cols * p]
    if inner == "hwc":  # a row of a patch is one piece of memory on either side
        out.reshape(rows, cols, p, 3 * p)[...] = seen.reshape(rows, p, cols, 3 * p).swapaxes(1, 2)
    else:
        out.reshape(rows, cols, 3, p, p)[...] = seen.reshape(rows, p, cols, p, 3).transpose(0, 2, 4, 1, 3)


def inner_axes(inner: str) -> str:
    """The axes inside a patch by the name of their order, for einops."""
    if inner not in INNER:
        raise ValueError(f"inner must be one of {', '.join(INNER)}, got {inner!r}")
    return INNER[inner]


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
        found = self._sampled(rows, 1, (left, right), size_hw[1])
        return Image.fromarray(np.rint(found).clip(0, 255).astype(np.uint8))

    def _sampled(self, array: np.ndarray, axis: int, span: tuple[float, float], length: int) -> np.ndarray:
        """float32 with ``length`` samples of one axis, at the middles of as many equal parts of ``span``."""
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
    """(h, w, 3) uint8 of a whole canvas."""
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
    """Whether the content covers its canvas and is so large, and so much larger, that only what is seen is made."""
    sides = list(zip(canvas.offset, canvas.content_hw, canvas.size_hw, strict=True))
    covers = all(start <= 0 and start + content >= side for start, content, side in sides)
    return covers and math.prod(canvas.content_hw) > max(MOST_RESIZED, 16 * math.prod(canvas.size_hw))


def _seen(image: Image.Image, canvas: Canvas) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the part of the image that a crop shows, px."""
    (top, left), (height, width) = canvas.offset, canvas.size_hw
    scale_h, scale_w = image.height / canvas.content_hw[0], image.width / canvas.content_hw[1]
    right, bottom = min((width - left) * scale_w, image.width), min((height - top) * scale_h, image.height)
    return -left * scale_w, -top * scale_h, right, bottom


def check_canvas(canvas: Canvas, image_hw: tuple[int, int]) -> None:
    """Pillow would paint what is missing black: refuse it instead."""

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
    covered = all(
        start <= 0 and start + content >= side
        for start, content, side in zip(canvas.offset, canvas.content_hw, canvas.size_hw, strict=True)
    )
    if not covered and canvas.fill is None:
        raise ValueError(
            f"content of {canvas.content_hw} px at {canvas.offset} does not cover its canvas of {canvas.size_hw} px: "
            "give the canvas a fill"
        )
