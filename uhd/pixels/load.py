"""Any picture, in any mode, as an upright RGB Pillow image of 8 bits a channel."""

from __future__ import annotations

import io
import os
import re
import struct
import sys
import warnings
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image, UnidentifiedImageError

from .metadata import without_metadata
from .settings import DEFAULT, PixelSettings

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
_CHANNELS = (1, 3, 4)
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

    Loading the result again changes nothing. A Pillow image that is upright RGB already is returned itself.

    Args:
        source: Pillow image, path, ``bytes``, file object, ``data:`` URI, base64 text, a dataset's row
            ``{"bytes": ..., "path": ...}``, NumPy array or torch tensor.
        settings: Background and pixel limit.
        frame: Of an animation or a multi-page file, from 0. ``None``: the first, or where a Pillow image stands.

    Raises:
        FileNotFoundError: No such file (or another ``OSError`` of opening it).
        ValueError: Not an image, damaged, too many pixels, no such frame, an ambiguous shape or a range that is not
            stated above.
        TypeError: ``source`` is none of the accepted types.
    """
    source = plain_source(source)
    array = as_array(source)
    if array is not None:
        check_frame(frame, 1, "an array")
        pixels = _eight_bit(channels_last(array))
        pixels = pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels
        return rgb(Image.fromarray(np.ascontiguousarray(pixels)), settings)
    return _despite_metadata(_loaded, source, settings, frame)


def _loaded(source: Any, settings: PixelSettings, frame: int | None) -> Image.Image:
    name = name_of(source)
    with opened(source, name) as image:
        check_pixels(image, settings, name)
        result = rgb(upright_frame(image, frame, name), settings)
        # a file that was opened here is closed after this: hand out a plain image
        return result.copy() if result is image and image is not source else result


def image_size_hw(source: Any) -> tuple[int, int]:
    """Return (height, width) in px of what :func:`load_image` would return, without decoding a file's pixels.

    Arguments and errors are those of :func:`load_image`.

    >>> image_size_hw(np.zeros((480, 640, 3), dtype=np.uint8))
    (480, 640)
    """
    source = plain_source(source)
    array = as_array(source)
    if array is not None:
        return channels_last(array).shape[:2]
    return _despite_metadata(_size_hw, source)


def _size_hw(source: Any) -> tuple[int, int]:
    name = name_of(source)
    with opened(source, name) as image, pillow_errors(name):
        if image is source:
            decode(image)  # it will be anyway, and only then do all formats agree on size and orientation
        if image is not source and image.format == "TIFF":
            # newer Pillow turns a TIFF's size on opening, older on loading: the tags are what the file says
            width, height = image.tag_v2[256], image.tag_v2[257]
        else:
            width, height = image.size
        orientation = orientation_of(image, header_only=image is not source)
    return (width, height) if orientation in _SIDEWAYS else (height, width)


def _despite_metadata(read: Callable[..., Result], source: Any, *how: Any) -> Result:
    """Read a picture; where that fails, and it may be for damaged metadata, read it without any."""
    try:
        return read(source, *how)
    except ValueError as problem:
        if isinstance(source, Image.Image) or problem.__cause__ is None:  # no file, or not Pillow's complaint
            raise
        file = Path(source).read_bytes() if isinstance(source, (str, os.PathLike)) else bytes(source)
        clean = without_metadata(file)
        if clean is None or clean == file:
            raise
        with suppress(ValueError):
            return read(clean, *how)
        raise


def orientation_of(image: Image.Image, *, header_only: bool = False) -> int:
    """How a picture has to be turned: 1 to 8 by EXIF, the TIFF tag or XMP; anything else, or damaged, is upright.

    ``header_only`` does not decode the pixels, but where a PNG has metadata behind them (exiftool writes it there).
    """
    # PNG's own getexif decodes the pixels first
    early = header_only and image.format == "PNG" and not _png_late_metadata(image.fp)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about damaged tags
        try:
            found = (Image.Image.getexif(image) if early else image.getexif()).get(ORIENTATION)
        except Exception:
            found = None
    if found is None:
        xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
        match = _XMP_ORIENTATION.search(xmp if isinstance(xmp, bytes) else str(xmp).encode())
        found = int(match[1]) if match else 1
    return found if found in UPRIGHT else 1


def plain_source(source: Any) -> Any:
    """Take the picture out of what datasets and web services wrap it in; anything else comes back as it is.

    A file object gives all its bytes and stays where it stands; of a dataset's row the bytes are taken, else the path.

    >>> plain_source("data:image/png;base64,iVBORw0KGgo=")
    b'\\x89PNG\\r\\n\\x1a\\n'
    """
    if isinstance(source, Mapping) and source.keys() & {"bytes", "path"}:
        inner = source.get("bytes") if source.get("bytes") is not None else source.get("path")
        if inner is None:
            raise ValueError("this row of a dataset has neither bytes nor a path: leave it out, or give it a picture")
        return inner
    if hasattr(source, "read") and not isinstance(source, os.PathLike):
        if not (hasattr(source, "seekable") and source.seekable()):
            return source.read()
        position = source.tell()
        source.seek(0)  # as Pillow does, so that a file which was just written is read whole
        file = source.read()
        source.seek(position)
        return file
    if not isinstance(source, str):
        return source
    with suppress(ValueError):
        if source[:5].lower() == "data:":
            head, _, data = source.partition(",")
            file = unquote_to_bytes(data)
            return _from_base64(file.decode()) if head.lower().endswith(";base64") else file
        # the smallest pictures are GIFs, whose first bytes are known
        if (len(source) >= 64 or source.startswith("R0lGOD")) and not os.path.exists(source):
            return _from_base64(source)
    return source


def _from_base64(text: str) -> bytes:
    """Decode base64 of either alphabet, broken into lines or not, with or without padding at its end."""
    text = "".join(text.split())
    plain = text.translate({ord("-"): "+", ord("_"): "/"})
    if plain != text and ("+" in text or "/" in text):
        raise ValueError("letters of both alphabets: it is a path, say")
    return b64decode(plain + "=" * (-len(plain) % 4), validate=True)


def name_of(source: Any) -> str:
    """Say what to call this picture in an error."""
    if isinstance(source, Image.Image):
        filename = getattr(source, "filename", "")
        return f"{str(filename)!r:.200}" if filename else "this Pillow image"
    if isinstance(source, (str, os.PathLike)):
        name = str(source)
        if name[:8].lower().startswith(("http://", "https://", "data:")):
            raise ValueError(f"{name!r:.200} is not a path, and nothing is downloaded: fetch it and pass its bytes")
        return f"{name!r:.200}"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"these {len(source)} bytes"
    raise TypeError(f"an image is a Pillow image, path, bytes, NumPy array or tensor, got {type(source).__name__}")


@contextmanager
def opened(source: Any, name: str) -> Iterator[Image.Image]:
    """Open ``source`` as a Pillow image, and close again what was opened here."""
    if isinstance(source, Image.Image):
        yield source
        return
    with _file(source) if isinstance(source, (str, os.PathLike)) else io.BytesIO(source) as file:
        with pillow_errors(name):
            image = Image.open(file)
        with image:
            yield image


def _file(path: str | os.PathLike[str]) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:  # which quotes the path, that may be a broken base64 text, at any length
        raise type(error)(error.errno, error.strerror, f"{path!s:.200}") from None


@contextmanager
def pillow_errors(name: str) -> Iterator[None]:
    """Turn Pillow's many exceptions about a file into one ``ValueError`` that names it."""
    try:
        yield
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{name} has more pixels than Pillow's limit ({error}): if you trust it, raise PIL.Image.MAX_IMAGE_PIXELS "
            "and PixelSettings.max_pixels, or shrink the file"
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image that Pillow can read: check it, or convert it to PNG") from error
    except Exception as error:
        raise ValueError(
            f"{name} cannot be decoded, it is truncated or damaged ({type(error).__name__}: {error}): "
            "get it again, or save it anew with an image program"
        ) from error


def check_pixels(image: Image.Image, settings: PixelSettings, name: str) -> None:
    """Refuse an image with more pixels than the settings allow."""
    if image.width * image.height > settings.max_pixels:
        raise ValueError(
            f"{name} is {image.height}x{image.width} px (height x width), {image.height * image.width} pixels, over "
            f"max_pixels={settings.max_pixels}: raise PixelSettings.max_pixels if you trust it, or shrink the file"
        )


def check_frame(frame: int | None, frames: int, name: str) -> None:
    """Refuse the number of a frame that is not there."""
    if frame is not None and (type(frame) is not int or not 0 <= frame < frames):
        raise ValueError(f"{name} has {frames} frame{'s' * (frames > 1)}, numbered from 0; got frame={frame!r}")


def decode(image: Image.Image) -> None:
    """Decode a picture's pixels, whatever stands behind them in its file."""
    try:
        image.load()
    except Exception:
        if getattr(image, "tile", None) != []:
            raise
        image.load()  # the pixels are whole: it was metadata


def upright_frame(image: Image.Image, frame: int | None, name: str) -> Image.Image:
    """Decode the asked frame and apply its EXIF orientation. A caller's image is left at its own frame."""
    with pillow_errors(name):
        try:
            stands = image.tell()
        except AttributeError:  # it was copied or unpickled: it has its pixels, but no file any more
            stands = 0
        frames = 1 if frame is None else getattr(image, "n_frames", 1)
    check_frame(frame, frames, name)
    with pillow_errors(name):
        if frame is None or frame == stands:
            decode(image)
            picture = image
        else:
            try:
                image.seek(frame)
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
    file.seek(8)
    pixels_seen = late = False
    while not late and len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        late = pixels_seen and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
        pixels_seen = pixels_seen or kind == b"IDAT"
        file.seek(length + 4, io.SEEK_CUR)
    file.seek(position)
    return late


def rgb(image: Image.Image, settings: PixelSettings) -> Image.Image:
    """Convert an image of any mode to eight-bit RGB; one that is that already is returned itself."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bit_gray(image)
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:
        raise ValueError("the transparent colour of a 16-bit RGB PNG is lost in 8 bits: save it with an alpha channel")
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*settings.background, 255)), image)
    image = image.convert("RGB")
    image.info = {}
    return image


def _eight_bit_gray(image: Image.Image) -> Image.Image:
    """Convert deep modes, which Pillow would clip at 255, to L, or to LA where one gray level means transparent."""
    array = np.asarray(image)
    key = image.info.get("transparency")
    if image.mode == "I":
        if array.min() < 0 or array.max() > 65535:
            raise ValueError(f"a gray image of mode I is 0..65535, got {array.min()}..{array.max()}: scale it first")
        array = array.astype(np.uint16)
    gray = Image.fromarray(_eight_bit(array))
    if isinstance(key, int):
        gray.putalpha(Image.fromarray(np.where(array == key, 0, 255).astype(np.uint8)))
    return gray


def _eight_bit(array: np.ndarray) -> np.ndarray:
    """Convert bool, uint16 (full range) or floats in 0..1 to the nearest level of uint8."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # in either byte order
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # also catches NaN
            raise ValueError(
                f"float pixels must lie in 0..1, got {array.min():.6g}..{array.max():.6g}: "
                "divide by 255, undo a normalisation, or pass uint8"
            )
        return np.rint(array.astype(np.promote_types(array.dtype, np.float32)) * 255).astype(np.uint8)
    raise ValueError(f"pixels must be uint8, uint16, bool or float in 0..1, got {array.dtype}: convert them first")


def as_array(source: Any) -> np.ndarray | None:
    """Turn a NumPy array or torch tensor into an array; return ``None`` for anything else."""
    torch = sys.modules.get("torch")  # a tensor cannot exist before torch is imported
    if torch is not None and isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        return (source.float() if source.dtype == torch.bfloat16 else source).numpy()
    return source if isinstance(source, np.ndarray) else None


def channels_last(array: np.ndarray) -> np.ndarray:
    """Return (h, w) or (h, w, 1 | 3 | 4) from either layout; :func:`load_image` states the rule."""
    shape = array.shape
    if array.ndim not in (2, 3) or 0 in shape:
        raise ValueError(
            f"an image array is (h, w), (h, w, c) or (c, h, w) and not empty, got {shape}: pass the images of a batch "
            "one by one"
        )
    if array.ndim == 2:
        return array
    first, last = shape[0] in _CHANNELS, shape[2] in _CHANNELS
    if first and last:
        raise ValueError(
            f"an array of shape {shape} can be (h, w, c) or (c, h, w): pass a Pillow image, as from "
            "Image.fromarray(array) for uint8 (h, w, 3)"
        )
    if not first and not last:
        raise ValueError(f"an image array has 1, 3 or 4 channels first or last, got {shape}")
    return array if last else array.transpose(1, 2, 0)
