"""What a picture comes in (path, bytes, file object, Pillow image), opened within limits; and how it is refused."""

from __future__ import annotations

import io
import os
import re
import stat
from base64 import b64decode
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, BinaryIO
from urllib.parse import unquote_to_bytes

from PIL import Image, UnidentifiedImageError

from uhd.slicing.plan import MAX_SIDE

from .metadata import START_OF_SCAN, heavy_tags
from .settings import DEFAULT, PixelSettings

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF", "HEIF")
"""Names, in Pillow, of the formats that are read where they are installed; PPM is all of PNM."""

_ASIDE = 1 << 24
"""Bytes of a file that need not be pixels."""

_ALONE = ("TIFF", "MPO")
"""Formats whose frames need no earlier ones."""

_SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
"""A marker of a JPEG that a length follows, or the one of its end."""

_END = 0xD9

_KINDS = {
    stat.S_IFIFO: "a FIFO (named pipe)",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class PictureError(ValueError):
    """A picture is refused. Whatever the libraries that read it raise becomes this, with its name."""


@contextmanager
def picture_errors(
    name: str,
    what: str = "cannot be decoded, it is truncated or damaged",
    hint: str = "get it again, or save it anew with an image program",
) -> Iterator[None]:
    """Every error in here becomes a :class:`PictureError` that names the picture; ``what`` and ``hint`` of others'."""
    try:
        yield
    except PictureError as error:
        if name in str(error):
            raise
        raise PictureError(f"{name}: {error}") from error.__cause__
    except MemoryError as error:
        raise PictureError(f"{name} needs more memory than there is: shrink it, or use a larger machine") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(
            f"{name} has more pixels than Pillow's limit ({error}): if you trust it, raise PIL.Image.MAX_IMAGE_PIXELS "
            "and PixelSettings.max_pixels, or shrink it"
        ) from error
    except UnidentifiedImageError as error:
        raise PictureError(
            f"{name} is not an image in a format that is read here ({', '.join(_formats())}): check it, convert it to "
            "PNG, or, if you trust it, pass what PIL.Image.open makes of it"
        ) from error
    except Exception as error:
        told = f"{type(error).__name__}: {error!s:.200}".removesuffix(": ")
        raise PictureError(f"{name} {what} ({told}): {hint}") from error


def plain_source(source: Any, settings: PixelSettings = DEFAULT) -> Any:
    """Take the picture out of what datasets and web services wrap it in; anything else comes back as it is.

    A file object gives all its bytes and stays where it stands; of a dataset's row the bytes are taken, else the path.

    >>> plain_source("data:image/png;base64,iVBORw0KGgo=")
    b'\\x89PNG\\r\\n\\x1a\\n'
    """
    row = isinstance(source, Mapping) and bool(source.keys() & {"bytes", "path"})
    if row:
        source = source.get("bytes") if source.get("bytes") is not None else source.get("path")
        if source is None:
            raise PictureError(
                "this row of a dataset has neither bytes nor a path: leave it out, or give it a picture"
            )
    if isinstance(source, (bytearray, memoryview)):
        with picture_errors(f"this {type(source).__name__}", *_UNREAD):
            return bytes(source) if isinstance(source, bytearray) else source.tobytes()
    if hasattr(source, "read") and not isinstance(source, os.PathLike):
        with picture_errors(f"this file object ({type(source).__name__})", *_UNREAD):
            return _whole_file(source, settings)
    if row or not isinstance(source, str):
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


def _whole_file(file: Any, settings: PixelSettings) -> bytes:
    if not (hasattr(file, "seekable") and file.seekable()):
        return read_whole(file, settings)
    position = file.tell()
    file.seek(0)  # as Pillow does, so that a file which was just written is read whole
    found = read_whole(file, settings)
    file.seek(position)
    return found


def read_whole(file: Any, settings: PixelSettings = DEFAULT) -> bytes:
    """Read a file object to its end, or refuse it where that is farther than any picture within the limits needs."""
    most = most_bytes(settings)
    parts, left = [], most + 1
    while left:
        part = file.read(min(left, _ASIDE))
        if not isinstance(part, (bytes, bytearray, memoryview)):
            raise PictureError(f'its read() gives {type(part).__name__}: open it as bytes, with mode "rb"')
        if not part:
            break
        parts.append(part)
        left -= len(part)
    if not left:
        raise PictureError(f"it has more than {most} bytes, {_RAISE.format(settings.max_pixels)}")
    return b"".join(parts)


_HOW = "raise PixelSettings.max_pixels (of a command: uhd --max-pixels N ...) if you trust it, or shrink it"
_RAISE = "over what max_pixels={} allows for: " + _HOW
_UNREAD = ("cannot be read", "open it again, as bytes")


def most_bytes(settings: PixelSettings) -> int:
    """Bytes that a file of one picture may have: four a pixel, and some for what is no pixel."""
    return 4 * settings.max_pixels + _ASIDE


def command_source(argument: str, settings: PixelSettings = DEFAULT) -> str | bytes:
    """What a command reads for one of its arguments: a path; or all of a FIFO, such as a shell's ``<(...)``.

    A FIFO gives its bytes once, and a command may look at a picture more often.
    """
    try:
        pipe = stat.S_ISFIFO(os.stat(argument).st_mode)
    except (OSError, ValueError):  # whoever opens the path says what is wrong
        return argument
    if not pipe:
        return argument
    with picture_errors(f"{argument!r:.200}"), open(argument, "rb") as file:
        return read_whole(file, settings)


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
        name = os.fsdecode(source)
        if re.match("data:", name, re.IGNORECASE):
            raise PictureError(f"{name!r:.200} is a data: URI whose base64 cannot be decoded: send it whole")
        if re.match("https?://", name, re.IGNORECASE):
            raise PictureError(f"{name!r:.200} is not a path, and nothing is downloaded: fetch it and pass its bytes")
        return f"{name!r:.200}"
    if isinstance(source, bytes):
        return f"this file of {len(source)} bytes"
    raise TypeError(f"an image is a Pillow image, path, bytes, NumPy array or tensor, got {type(source).__name__}")


@contextmanager
def opened(source: Any, name: str, settings: PixelSettings) -> Iterator[Image.Image]:
    """Open ``source`` as a Pillow image within the limits, and close again what was opened here.

    Errors in the body are the picture's, see :func:`picture_errors`.
    """
    if isinstance(source, Image.Image):
        with picture_errors(name):
            check_pixels(source, settings, name)
            yield source
        return
    with open_file(source, name) as file, picture_errors(name):
        if heavy_tags(file):
            raise ValueError("its tags are too many, or point to the same bytes again and again")
        with Image.open(file, formats=_formats()) as image:
            check_pixels(image, settings, name)
            if (size := file.seek(0, io.SEEK_END)) > most_bytes(settings):
                raise PictureError(f"{name} has {size} bytes, {_RAISE.format(settings.max_pixels)}")
            yield image


def open_file(source: Any, name: str) -> BinaryIO:
    """The bytes, or the file of a path: a regular one, since a FIFO can wait for ever and a device never end."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    path = os.fsdecode(source)
    try:
        _check_kind(os.stat(path), name)
        with ExitStack() as stack:
            file = stack.enter_context(open(path, "rb", opener=_without_waiting))
            _check_kind(os.fstat(file.fileno()), name)  # it may have been exchanged
            stack.pop_all()
        return file
    except PictureError:
        raise
    except IsADirectoryError:
        raise IsADirectoryError(f"{name} is a folder: give an image file") from None
    except OSError as error:  # which quotes the path, that may be a broken base64 text, at any length
        raise type(error)(error.errno, error.strerror, f"{path:.200}") from None
    except ValueError as error:
        raise PictureError(f"{name} is no path ({error}): give the name of a file") from error


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_kind(status: os.stat_result, name: str) -> None:
    kind = _KINDS.get(stat.S_IFMT(status.st_mode))
    if kind is not None:
        raise PictureError(f"{name} is {kind}, no file: open it yourself, and pass the file object or its bytes")


def _formats() -> tuple[str, ...]:
    """Those of :data:`FORMATS` that Pillow has, a plug-in's included."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def check_pixels(image: Image.Image, settings: PixelSettings, name: str) -> None:
    """Refuse an image with more pixels than the settings allow, or that takes far more work than those."""
    size_hw = image.height, image.width
    check_size(size_hw, settings, name)
    tile = (getattr(image, "tag_v2", None) or {}).get(322), (getattr(image, "tag_v2", None) or {}).get(323)
    if all(isinstance(side, int) for side in tile):  # a tile is decoded whole, however little of it is seen
        down, along = (-(-size // max(side, 1)) * side for size, side in zip(size_hw, tile[::-1], strict=True))
        check_work(down * along, 2, "in its tiles", settings, name)


def check_size(size_hw: tuple[int, int], settings: PixelSettings, name: str) -> None:
    """Refuse a picture without pixels, or with too many of them, by its (height, width)."""
    height, width = size_hw
    what = f"{name} is {height}x{width} px (height x width)"
    if min(size_hw) < 1:
        raise PictureError(f"{what}, which is no pixel at all: an image has at least one")
    if max(size_hw) > MAX_SIDE:
        raise PictureError(f"{what}, and no side may be over {MAX_SIDE} px: cut it")
    if height * width > settings.max_pixels:
        raise PictureError(f"{what}, {height * width} pixels, over max_pixels={settings.max_pixels}: {_HOW}")


def check_work(pixels: int, times: int, where: str, settings: PixelSettings, name: str) -> None:
    """Refuse a picture for which more pixels have to be decoded than so many ``times`` the limit on one."""
    if pixels > times * max(settings.max_pixels, 1 << 20):
        raise PictureError(
            f"{name} has {pixels} pixels to decode {where}, over {times} times max_pixels={settings.max_pixels}: "
            + _HOW
        )


def check_frame(image: Image.Image, frame: int | None, settings: PixelSettings, name: str) -> None:
    """Refuse the number of a frame that is not there, or that comes after too many others."""
    if frame is None:
        return
    if image.format not in _ALONE and type(frame) is int and frame > 0:
        check_work((frame + 1) * image.height * image.width, 4, f"up to frame {frame}", settings, name)
    refuse_frame(frame, getattr(image, "n_frames", 1), name)


def refuse_frame(frame: int | None, frames: int, name: str) -> None:
    """Refuse the number of a frame that is not there."""
    if frame is not None and (type(frame) is not int or not 0 <= frame < frames):
        raise PictureError(f"{name} has {frames} frame{'s' * (frames > 1)}, numbered from 0; got frame={frame!r}")


def check_scans(image: Image.Image, settings: PixelSettings, name: str) -> None:
    """Refuse a JPEG, not decoded yet, whose few bytes go over all its pixels again and again."""
    if image.format in ("JPEG", "MPO") and getattr(image, "fp", None) and image.tile:
        image.fp.seek(image.tile[0][2])  # where this frame begins; decoding seeks its own place
        scans = _count_scans(image.fp.read(most_bytes(settings)))
        check_work(scans * image.height * image.width, 12, "in its scans", settings, name)


def _count_scans(file: bytes) -> int:
    """The scans up to the end of the first JPEG: further frames, or the film of a phone, may stand behind it."""
    scans = place = 0
    while found := _SEGMENT.search(file, place):
        kind, place = file[found.start() + 1], found.end()
        if kind == _END:
            break
        scans += kind == START_OF_SCAN
        place += max(int.from_bytes(file[place : place + 2], "big"), 2)
    return scans
