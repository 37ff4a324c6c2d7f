"""PNG and JPEG files without what only describes their pixels."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT"}
_JPEG = b"\xff\xd8"
_START_OF_SCAN = 0xDA


def without_metadata(file: bytes) -> bytes | None:
    """Leave out text, colour profiles, EXIF with a wrong checksum, and whatever else says nothing about pixels.

    Returns:
        The file without them; ``None`` where it is neither a PNG nor a JPEG, or its parts cannot be told apart.
    """
    try:
        if file.startswith(_PNG):
            return _PNG + b"".join(_png_chunks(file))
        return _JPEG + b"".join(_jpeg_segments(file)) if file.startswith(_JPEG) else None
    except (struct.error, IndexError):
        return None


def _png_chunks(file: bytes) -> Iterator[bytes]:
    place = len(_PNG)
    while place < len(file):
        length, kind = struct.unpack_from(">I4s", file, place)
        end = place + length + 12
        sound = zlib.crc32(file[place + 4 : end - 4]) == struct.unpack_from(">I", file, end - 4)[0]
        if kind in _PNG_PIXELS or (kind == b"eXIf" and sound):
            yield file[place:end]
        place = end


def _jpeg_segments(file: bytes) -> Iterator[bytes]:
    place = len(_JPEG)
    while file[place + 1] != _START_OF_SCAN:
        marker, length = struct.unpack_from(">HH", file, place)
        end = place + 2 + length
        exif = marker == 0xFFE1 and file[place + 4 : place + 8] == b"Exif"
        adobe = marker == 0xFFEE and length >= 14  # says how colours are coded
        if not (0xFFE0 <= marker <= 0xFFEF or marker == 0xFFFE) or exif or adobe:
            yield file[place:end]
        place = end
    yield file[place:]
