"""Any picture, in any mode, as an upright RGB Pillow image of 8 bits a channel."""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from traceback import walk_tb
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import Image

from .arrays import array_errors, array_name, as_pixels, checked_layout, eight_bit
from .metadata import heavy_tags, without_metadata
from .settings import DEFAULT, PixelSettings
from .source import (
    PictureError,
    check_frame,
    check_pixels,
    check_scans,
    most_bytes,
    name_of,
    open_file,
    opened,
    plain_source,
    refuse_frame,
)

Result = TypeVar("Result")

ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_BAND = 1 << 20
"""Pixels that are laid on the background at a time: a picture and its copies of four channels are large."""

_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=[\"']|>)([1-8])")


def load_image(source: Any, *, settings: PixelSettings = DEFAULT, frame: int | None = None) -> Image.Image:
    """Load any picture as an upright RGB Pillow image of 8 bits a channel.

    >>> gray = np.array([[0, 128, 255], [64, 64, 64]], dtype=np.uint8)
    >>> load_image(gray).getpixel((1, 0))  # x = 1, y = 0
    (128, 128, 128)

    * Files, bytes and Pillow images: the EXIF orientation is applied (a value outside 1..8 is upright). Transparency
      is composited on ``settings.background``. 16-bit gray (and Pillow's mode ``I``) is scaled from 0..65535; mode
      ``F`` is read as a float array is. Embedded ICC profiles are ignored, CMYK included, as in the reference.
    * Arrays and tensors: (h, w) is gray; (h, w, c) or (c, h, w) with c = 1 gray, 3 RGB or 4 RGBA. The axis of such a
      length is the channels; where both ends have one, as in (3, h, 3) or (1, w, 3), the shape is refused. uint8 as it
      is, bool as 0 and 255, uint16 scaled from 0..65535, floats from 0..1, each to the nearest level.

    Loading the result again changes nothing: it carries no metadata. A Pillow image that is upright RGB without any is
    returned itself.

    Files are read in the formats that ``uhd.pixels.source.FORMATS`` names; a Pillow image that you opened may be of
    any other. SECURITY.md says what is refused before it is decoded, and what a file may cost at most.

    Args:
        source: Pillow image, path, ``bytes``, file object, ``data:`` URI, base64 text, a dataset's row
            ``{"bytes": ..., "path": ...}``, NumPy array or torch tensor.
        settings: Background and pixel limit.
        frame: Of an animation or a multi-page file, from 0. ``None``: the first, or where a Pillow image stands.

    Raises:
        FileNotFoundError: No such file (or another ``OSError`` of opening it).
        ValueError: Not an image of these formats, damaged, too large, no regular file, no such frame, an ambiguous
            shape or a range that is not stated above. It names the picture.
        TypeError: ``source`` is none of the accepted types.
    """
    source = plain_source(source, settings)
    name = array_name(source)
    if name is not None:
        with array_errors(name):
            refuse_frame(frame, 1, name)
            return rgb(image_of(as_pixels(source, settings, name)), settings)
    return _despite_metadata(_loaded, source, settings, frame)


def image_of(pixels: np.ndarray) -> Image.Image:
    """(h, w) or (h, w, 3 | 4) uint8 as a Pillow image."""
    return Image.fromarray(np.ascontiguousarray(pixels))


def _loaded(source: Any, settings: PixelSettings, frame: int | None) -> Image.Image:
    name = name_of(source)
    with opened(source, name, settings) as image:
        return rgb(upright_frame(image, frame, settings, name), settings)


def image_size_hw(source: Any, *, settings: PixelSettings = DEFAULT) -> tuple[int, int]:
    """Return (height, width) in px of what :func:`load_image` would return, without decoding a file's pixels.

    Arguments and errors are those of :func:`load_image`, but for what only the pixels tell.

    >>> image_size_hw(np.zeros((480, 640, 3), dtype=np.uint8))
    (480, 640)
    """
    source = plain_source(source, settings)
    name = array_name(source)
    if name is not None:
        with array_errors(name):
            return checked_layout(source, settings, name)[0]
    return _despite_metadata(_size_hw, source, settings)


def _size_hw(source: Any, settings: PixelSettings) -> tuple[int, int]:
    name = name_of(source)
    with opened(source, name, settings) as image:
        if image is source:
            check_scans(image, settings, name)
            decode(image)  # it will be anyway, and only then do all formats agree on size and orientation
        if image is not source and image.format == "TIFF":
            # newer Pillow turns a TIFF's size on opening, older on loading: the tags are what the file says
            width, height = image.tag_v2[256], image.tag_v2[257]
        else:
            width, height = image.size
        orientation = orientation_of(image, header_only=image is not source)
    return (width, height) if orientation in _SIDEWAYS else (height, width)


def _despite_metadata(read: Callable[..., Result], source: Any, settings: PixelSettings, *how: Any) -> Result:
    """Read a picture; where that fails, and it may be for damaged metadata, read it without any."""
    try:
        return read(source, settings, *how)
    except PictureError as problem:
        if isinstance(source, Image.Image) or problem.__cause__ is None:  # no file, or not Pillow's complaint
            raise
        with open_file(source, name_of(source)) as opened_again:
            file = opened_again.read(most_bytes(settings) + 1)
        clean = without_metadata(file) if len(file) <= most_bytes(settings) else None
        if clean is None or clean == file:
            raise
        with suppress(PictureError):
            return read(clean, settings, *how)
        raise


def orientation_of(image: Image.Image, *, header_only: bool = False) -> int:
    """How a picture has to be turned: 1 to 8 by EXIF, the TIFF tag or XMP; anything else, or damaged, is upright.

    ``header_only`` does not decode the pixels, but where a PNG has metadata behind them (exiftool writes it there).
    """
    found = None
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")  # Pillow's, about damaged tags
        if image.format == "PNG" and not (header_only and not _png_late_metadata(image.fp)):
            decode(image)
        if not heavy_tags(io.BytesIO(_exif_block(image))):
            found = Image.Image.getexif(image).get(ORIENTATION)  # PNG's own decodes the pixels first
    if found is None:
        xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
        match = _XMP_ORIENTATION.search(xmp if isinstance(xmp, bytes) else str(xmp).encode())
        found = int(match[1]) if match else 1
    return found if found in UPRIGHT else 1


def _exif_block(image: Image.Image) -> bytes:
    """What Pillow would read tags from; a TIFF's own were looked at when it was opened."""
    block = image.info.get("exif")
    if block is None and "Raw profile type exif" in image.info:
        block = bytes.fromhex("".join(image.info["Raw profile type exif"].split("\n")[3:]))
    return block or b""


def decode(image: Image.Image) -> None:
    """Decode a picture's pixels, whatever stands behind them in its file."""
    try:
        image.load()
    except Exception as problem:
        places = {frame.f_code.co_name for frame, _ in walk_tb(problem.__traceback__)}
        if getattr(image, "tile", None) != [] or "load_end" not in places:
            raise
        image.load()  # the pixels are whole: it was metadata


def upright_frame(image: Image.Image, frame: int | None, settings: PixelSettings, name: str) -> Image.Image:
    """Decode the asked frame and apply its EXIF orientation. A caller's image is left at its own frame."""
    try:
        stands = image.tell()
    except AttributeError:  # it was copied or unpickled: it has its pixels, but no file any more
        stands = 0
    check_frame(image, frame, settings, name)
    if frame is None or frame == stands:
        check_scans(image, settings, name)
        decode(image)
        picture = image
    else:
        try:
            image.seek(frame)
            check_pixels(image, settings, name)  # frames may differ in size
            check_scans(image, settings, name)
            picture = image.copy()
        finally:
            image.seek(stands)
    method = UPRIGHT.get(orientation_of(picture))
    if method is None:
        return picture
    turned = picture.transpose(method)
    # the copied tag would turn it a second time
    turned.info = {key: value for key, value in turned.info.items() if key == "transparency"}
    return turned


def _png_late_metadata(file: BinaryIO) -> bool:
    """Return whether text or EXIF chunks follow the pixel data. The position in the file is kept."""
    position = file.tell()
    kinds = png_chunks(file)
    late = b"IDAT" in kinds and not {b"eXIf", b"iTXt", b"tEXt", b"zTXt"}.isdisjoint(kinds)
    file.seek(position)
    return late


def png_chunks(file: BinaryIO) -> Iterator[bytes]:
    """The kinds of a PNG's chunks, in order."""
    file.seek(8)
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        yield kind
        file.seek(length + 4, io.SEEK_CUR)


def rgb(image: Image.Image, settings: PixelSettings) -> Image.Image:
    """Convert an image of any mode to eight-bit RGB without metadata; one that is that already is returned itself."""
    if type(image) is Image.Image and image.mode == "RGB" and not image.info:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bit_gray(image)
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:
        raise PictureError(
            "the transparent colour of a 16-bit RGB PNG is lost in 8 bits: save it with an alpha channel"
        )
    image = _on_background(image, settings) if image.has_transparency_data else image.convert("RGB")
    image.info = {}
    return image


def _on_background(image: Image.Image, settings: PixelSettings) -> Image.Image:
    """Composite a transparent image, a band of rows at a time."""
    found = Image.new("RGB", image.size)
    rows = max(_BAND // image.width, 1)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        band = (band.convert("LA") if band.mode == "La" else band).convert("RGBA")
        below = Image.new("RGBA", band.size, (*settings.background, 255))
        found.paste(Image.alpha_composite(below, band).convert("RGB"), (0, top))
    return found


def _eight_bit_gray(image: Image.Image) -> Image.Image:
    """Convert deep modes, which Pillow would clip at 255, to L, or to LA where one gray level means transparent."""
    array = np.asarray(image)
    key = image.info.get("transparency")
    if image.mode == "I":
        if array.min() < 0 or array.max() > 65535:
            raise PictureError(f"a gray image of mode I is 0..65535, got {array.min()}..{array.max()}: scale it first")
        array = array.astype(np.uint16)
    gray = Image.fromarray(eight_bit(array))
    if isinstance(key, int):
        gray.putalpha(Image.fromarray(np.where(array == key, 0, 255).astype(np.uint8)))
    return gray
