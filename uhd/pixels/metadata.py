"""PNG, JPEG, WebP and TIFF files without what only describes their pixels."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT"}
_JPEG = b"\xff\xd8"
_START_OF_SCAN = 0xDA
_WEBP_PIXELS = {b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF"}
_TIFF_ORDER = {b"II*\0": "<", b"MM\0*": ">"}
_TIFF_PIXELS = {*range(254, 260), 262, 266, 273, 274, *range(277, 280), 284, 292, 293, 317, *range(320, 326)}
_TIFF_PIXELS |= {330, 332, *range(338, 342), 347, *range(529, 533)}


def without_metadata(file: bytes) -> bytes | None:
    """Leave out text, colour profiles, EXIF with a wrong checksum, and whatever else says nothing about pixels.

    Returns:
        The file without them; ``None`` where it is of another kind, or its parts cannot be told apart.
    """
    try:
        if file.startswith(_PNG):
            return _PNG + b"".join(_png_chunks(file))
        if file.startswith(_JPEG):
            return _JPEG + b"".join(_jpeg_segments(file))
        if file.startswith(b"RIFF") and file[8:12] == b"WEBP":
            return _webp(file)
        return _tiff(file, _TIFF_ORDER[file[:4]]) if file[:4] in _TIFF_ORDER else None
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


def _webp(file: bytes) -> bytes:
    """Whole EXIF stays, for the orientation; the flags of VP8X may tell of parts that are gone, no decoder minds."""
    chunks, place = [], 12
    while place + 8 <= len(file):
        kind, length = struct.unpack_from("<4sI", file, place)
        end = place + 8 + length + length % 2
        if kind in _WEBP_PIXELS or (kind == b"EXIF" and end <= len(file)):
            chunks.append(file[place:end])
        place = end
    body = b"WEBP" + b"".join(chunks)
    return struct.pack("<4sI", b"RIFF", len(body)) + body


def _tiff(file: bytes, order: str) -> bytes:
    """The tables of tags in place, each without the others' entries: what these point to is never read."""
    found, seen = bytearray(file), set()
    place = struct.unpack_from(order + "I", file, 4)[0]
    while place and place not in seen:
        seen.add(place)
        count = struct.unpack_from(order + "H", file, place)[0]
        entries = [file[at : at + 12] for at in range(place + 2, place + 2 + 12 * count, 12)]
        kept = [entry for entry in entries if struct.unpack(order + "H", entry[:2])[0] in _TIFF_PIXELS]
        (following,) = struct.unpack_from(order + "I", file, place + 2 + 12 * count)
        table = struct.pack(order + "H", len(kept)) + b"".join(kept) + struct.pack(order + "I", following)
        found[place : place + len(table)] = table
        place = following
    return bytes(found)
