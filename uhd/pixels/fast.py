"""The fast backend: a file is decoded to the array that is resized, and PyTorch resizes its bytes as they lie.

PyTorch's antialiased resize of uint8 channels-last images does Pillow's two passes over Pillow's weights, rounded to
15 bits. So after the first pass a pixel is at most one level off; the second pass weighs those by at most 1.25
(bicubic) or 1.7 (lanczos) in all and rounds: two levels in the end, if the passes come in the same order. Resizing
twice would add up, so canvases that are resized twice, like those without antialiasing, are Pillow's. What installed
versions do is probed once, on small images; where it is not as said here, Pillow does it.
"""

from __future__ import annotations

import importlib
import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .arrays import array_errors, array_name, as_pixels
from .load import image_of, load_image, orientation_of, png_chunks, rgb
from .pillow import check_plan, cut_canvas, is_long_crop
from .settings import RESAMPLE, PixelSettings, check_filter
from .source import check_scans, name_of, opened, plain_source

if TYPE_CHECKING:
    from uhd.slicing.plan import Canvas, SlicePlan


@dataclass(frozen=True, eq=False)
class Picture:
    """An upright RGB image in the layout that is resized."""

    height: int  # px
    width: int
    pixels: np.ndarray | None  # (h, w, 3) uint8; None for a JPEG whose decoding waits for the plan
    file: bytes = b""  # that JPEG
    name: str = "this image"  # in an error


def read_picture(source: Any, settings: PixelSettings) -> Picture:
    """:func:`uhd.pixels.views.load_picture` by this backend."""
    if isinstance(source, Picture):
        return source
    source = plain_source(source, settings)
    name = array_name(source)
    if name is None:
        picture = _read_quickly(source, settings)
        return picture or _picture(np.array(load_image(source, settings=settings)), settings)
    with array_errors(name):
        return _picture(as_pixels(source, settings, name), settings)


def cut_fast(image: Any, plan: SlicePlan, settings: PixelSettings) -> list[np.ndarray]:
    """:func:`uhd.pixels.cut` by this backend."""
    picture = read_picture(image, settings)
    check_plan(plan, (picture.height, picture.width))
    pixels, exact = _decoded(picture, plan, settings), None
    views = []
    for canvas in plan.canvases:
        if _in_one_step(pixels.shape[:2], canvas, plan, settings):
            views += cut_canvas(pixels, canvas, plan, settings, _resized)
        else:
            exact = Image.fromarray(pixels) if exact is None else exact
            views += cut_canvas(exact, canvas, plan, settings)
    return views


def _read_quickly(source: Any, settings: PixelSettings) -> Picture | None:
    """Read a plain upright picture; ``None`` where nothing but Pillow does, or can tell what is wrong."""
    if isinstance(source, Image.Image):
        return None
    name = name_of(source)
    try:
        with opened(source, name, settings) as image:
            decode = decoder(image.format) if image.format in CODECS else None
            if decode and _is_plain(image):
                pixels = decode(_whole(image))
                fits = pixels.dtype == np.uint8 and pixels.shape == (image.height, image.width, len(image.mode))
                return _picture(pixels, settings) if fits else None
            plain = image.format == "JPEG" and image.mode == "RGB" and orientation_of(image) == 1
            if not plain or not (settings.draft or jpeg_decoder()):
                return None
            check_scans(image, settings, name)
            picture = Picture(image.height, image.width, None, _whole(image), name)
            if settings.draft:
                return picture
            pixels = jpeg_decoder()(picture.file)
    except ValueError:
        return None
    return _picture(pixels, settings) if pixels.shape[:2] == (picture.height, picture.width) else None


def _picture(pixels: np.ndarray, settings: PixelSettings) -> Picture:
    """Of (h, w) or (h, w, 3 | 4) uint8."""
    if pixels.shape[2:] != (3,):
        pixels = np.array(rgb(image_of(pixels), settings))
    pixels = np.require(pixels, requirements=["C", "W"])  # torch wants to be allowed to write
    return Picture(*pixels.shape[:2], pixels)


def _whole(image: Image.Image) -> bytes:
    image.fp.seek(0)
    return image.fp.read()


def _is_plain(image: Image.Image) -> bool:
    """One upright picture of 8 bits, RGB with or without alpha, with nothing behind its pixels that could say more."""
    still = getattr(image, "n_frames", 1) == 1 and "transparency" not in image.info
    if image.mode not in ("RGB", "RGBA") or not still:
        return False
    if image.format == "PNG":
        image.fp.seek(16)  # its header, if it comes first
        sizes = struct.unpack(">IIB", image.fp.read(9))
        kinds = png_chunks(image.fp)
        ends = b"IDAT" in kinds and next((kind for kind in kinds if kind != b"IDAT"), None) == b"IEND"
        if not ends or sizes != (image.width, image.height, 8):
            return False
    return orientation_of(image, header_only=True) == 1


def decode_whole(picture: Picture, settings: PixelSettings, scale: int = 1) -> np.ndarray:
    """All pixels of a picture, also of a JPEG whose decoding waits for the plan; that at 1 / ``scale``."""
    if picture.pixels is not None:
        return picture.pixels
    with opened(picture.file, picture.name, settings) as image:
        if scale > 1:
            image.draft("RGB", (picture.width // scale, picture.height // scale))
        return np.array(image)


def _decoded(picture: Picture, plan: SlicePlan, settings: PixelSettings) -> np.ndarray:
    """Decode; with ``draft``, at the smallest of 1/2, 1/4 and 1/8 that covers the plan and divides the sides."""
    if picture.pixels is not None:
        return picture.pixels
    height, width = picture.height, picture.width
    whole = all(c.source is None and _in_one_step((height, width), c, plan, settings) for c in plan.canvases)
    most = min(min(height / c.content_hw[0], width / c.content_hw[1]) for c in plan.canvases) if whole else 1
    scale = next((n for n in (8, 4, 2) if n <= most and not height % n and not width % n), 1)
    return decode_whole(picture, settings, scale)


def _in_one_step(size_hw: tuple[int, int], canvas: Canvas, plan: SlicePlan, settings: PixelSettings) -> bool:
    """Return whether the views of a canvas are at most one antialiased resize away from the image."""
    if canvas.source is not None:
        size_hw = canvas.source.size_hw
    sizes = [size for size in (size_hw, canvas.first_hw, canvas.content_hw) if size is not None]
    steps = [(plan.resample, plan.antialias) for old, new in pairwise(sizes) if tuple(old) != tuple(new)]
    if any(box.size_hw != tuple(canvas.view_hw) for box in canvas.tiles):
        steps.append(canvas.view_filter or (plan.resample, plan.antialias))
    if len(steps) > 1 or is_long_crop(canvas):
        return False
    return all(antialias and _pass_orders(settings.resample or name) for name, antialias in steps)


def _resized(pixels: np.ndarray, size_hw: tuple[int, int], name: str, antialias: bool) -> np.ndarray:
    """Resize with antialiasing, which :func:`_in_one_step` sees to."""
    if pixels.shape[:2] == tuple(size_hw):
        return pixels
    tensor = torch.from_numpy(np.ascontiguousarray(pixels)).unsqueeze(0).permute(0, 3, 1, 2)
    if _pass_orders(name) == "by shrinkage" and _rows_shrink_more(pixels.shape[:2], size_hw):
        tensor = _interpolated(tensor, (size_hw[0], pixels.shape[1]), name)
    return _interpolated(tensor, size_hw, name).squeeze(0).permute(1, 2, 0).numpy()


def _interpolated(tensor: Tensor, size_hw: tuple[int, int], name: str) -> Tensor:
    """Resize in two passes, along the rows first."""
    return F.interpolate(tensor, size=tuple(size_hw), mode=name, antialias=True)


def _rows_shrink_more(size_hw: tuple[int, int], new_hw: tuple[int, int]) -> bool:
    """Return whether newer Pillow makes the vertical pass first; older ones never do."""
    fewer_rows, fewer_columns = size_hw[0] - new_hw[0], size_hw[1] - new_hw[1]
    return fewer_rows > 0 and fewer_rows > 2 * fewer_columns


_PROBES = (((40, 40), (11, 37)), ((40, 40), (20, 31)), ((40, 40), (20, 29)), ((40, 12), (36, 18)), ((9, 40), (30, 7)))


@cache
def _pass_orders(name: str) -> str | None:
    """Find how Pillow orders this filter's passes: ``"fixed"``, ``"by shrinkage"``, or ``None`` if PyTorch cannot."""
    check_filter(name)
    noise = np.random.default_rng(0)
    errors: dict[str, list[np.ndarray]] = {"fixed": [], "by shrinkage": []}
    for old, new in _PROBES:
        pixels = noise.integers(0, 2, (*old, 3), dtype=np.uint8) * np.uint8(255)
        wanted = np.asarray(Image.fromarray(pixels).resize(new[::-1], RESAMPLE[name])).astype(int)
        tensor = torch.from_numpy(pixels).unsqueeze(0).permute(0, 3, 1, 2)
        try:
            fixed = _interpolated(tensor, new, name)
            turned = _interpolated(_interpolated(tensor, (new[0], old[1]), name), new, name)
        except (NotImplementedError, RuntimeError, ValueError):  # lanczos is new in PyTorch
            return None
        by_shrinkage = turned if _rows_shrink_more(old, new) else fixed
        for order, result in (("fixed", fixed), ("by shrinkage", by_shrinkage)):
            errors[order].append(np.abs(result.squeeze(0).permute(1, 2, 0).numpy() - wanted))
    best = min(errors, key=lambda order: sum(int(off.sum()) for off in errors[order]))
    return best if max(int(off.max()) for off in errors[best]) <= 2 else None


@cache
def jpeg_decoder() -> Callable[[bytes], np.ndarray] | None:
    """Return torchvision's decoder to (h, w, 3), if it is installed and decodes to the same bytes as Pillow."""
    try:
        import torchvision.io  # noqa: F401, it brings the operator

        operator = torch.ops.image.decode_jpeg  # its wrapper in torchvision.io warns that it will go
    except (ImportError, OSError, AttributeError, RuntimeError):
        return None

    def decode(file: bytes) -> np.ndarray:
        data = torch.frombuffer(bytearray(file), dtype=torch.uint8)
        return operator(data, 3).permute(1, 2, 0).contiguous().numpy()  # 3: as RGB

    kinds = ({"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True})
    return decode if _as_pillow(decode, "JPEG", 3, *kinds) else None


CODECS = {"PNG": "png_decode", "WEBP": "webp_decode"}
"""Formats by their names in Pillow, and what decodes them in imagecodecs."""


@cache
def decoder(kind: str) -> Callable[[bytes], np.ndarray] | None:
    """Return imagecodecs' decoder to (h, w, c) of a format, if it is there and decodes to the same bytes as Pillow."""
    try:
        decode = getattr(importlib.import_module("imagecodecs"), CODECS[kind])
    except (ImportError, OSError, AttributeError):
        return None
    kinds = ({"lossless": True}, {"lossless": False})  # a PNG always is
    return decode if all(_as_pillow(decode, kind, channels, *kinds) for channels in (3, 4)) else None


def _as_pillow(decode: Callable[[bytes], np.ndarray], kind: str, channels: int, *options: dict[str, Any]) -> bool:
    """Whether noise saved with each of the options is decoded as Pillow does."""
    pixels = np.random.default_rng(0).integers(0, 256, (37, 51, channels), dtype=np.uint8)
    for some in options:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind, quality=80, **some)
        try:
            if not np.array_equal(decode(file.getvalue()), np.asarray(Image.open(file))):
                return False
        except (RuntimeError, ValueError, ImportError):  # a build of imagecodecs may lack a codec
            return False
    return True
