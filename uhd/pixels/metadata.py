"""PNG, JPEG, WebP and TIFF files without what only describes their pixels."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from PIL.JpegImagePlugin import MARKER

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT"}
_JPEG, _EXIF = b"\xff\xd8", b"Exif\0\0"
START_OF_SCAN = 0xDA
_WEBP_PIXELS = {b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF"}
_TIFF_ORDER = {b"II*\0": "<", b"MM\0*": ">"}
_TIFF_PIXELS = {*range(254, 260), 262, 266, 273, 274, *range(277, 280), 284, 292, 293, 317, *range(320, 326)}
_TIFF_PIXELS |= {330, 332, *range(338, 342), 347, *range(529, 533)}

_MOST_BYTES, _MOST_ENTRIES = 1 << 24, 1 << 16
"""Of all tags of a file, whatever its size: what they point to, and their number."""

_BYTES_OF_TYPE = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
"""Bytes of one value of a TIFF type; those of the others have one."""


def heavy_tags(file: BinaryIO) -> bool:
    """Return whether a TIFF, a JPEG's EXIF and MPF, or a block of EXIF has far too many or too large tags.

    All of them may point to the same bytes, and older Pillow copies these for each as soon as it opens the file.
    """
    file.seek(0)
    start = file.read(len(_EXIF))
    if start.startswith(_JPEG):
        found = any(map(_heavy_block, _jpeg_blocks(file)))
    else:
        found = _heavy_block(io.BytesIO(file.read()) if start == _EXIF else file)
    file.seek(0)
    return found


def _jpeg_blocks(file: BinaryIO) -> Iterator[BinaryIO]:
    """EXIF, which may be in several segments, and MPF, by the markers that Pillow reads."""
    exif = b""
    file.seek(len(_JPEG))
    while byte := file.read(1):
        if byte != b"\xff":
            continue
        while byte == b"\xff":
            byte = file.read(1)
        marker = 0xFF00 + int.from_bytes(byte, "big")
        if marker == 0xFF00 + START_OF_SCAN:
            break
        if marker not in MARKER or MARKER[marker][2] is None:
            continue
        length = max(int.from_bytes(file.read(2), "big") - 2, 0)
        if marker not in (0xFFE1, 0xFFE2):
            file.seek(length, io.SEEK_CUR)
            continue
        data = file.read(length)
        if data.startswith(_EXIF):
            exif += data[len(_EXIF) :]
        elif data.startswith(b"MPF\0"):
            yield io.BytesIO(data[4:])
    yield io.BytesIO(exif)


def _heavy_block(block: BinaryIO) -> bool:
    block.seek(0)
    start = block.read(4)
    order = {b"II": "<", b"MM": ">"}.get(start[:2])
    # Pillow does not read every BigTIFF as one
    return order is not None and (
        (42 in start[2:] and _heavy(block, order, "LHL")) or (43 in start[2:] and _heavy(block, order, "QQQ"))
    )


def _heavy(block: BinaryIO, order: str, forms: str) -> bool:
    """``forms``: how a place in the block, the number of a table's entries, and an entry's number of values look."""
    wide, count_bytes = (struct.calcsize("=" + form) for form in forms[:2])
    entry = struct.Struct(f"{order}HH{forms[2]}{forms[0]}")

    def read_number(length: int) -> int:
        return int.from_bytes(block.read(length), "little" if order == "<" else "big")

    size = block.seek(0, io.SEEK_END)
    block.seek(wide)
    place, seen, entries, claimed = read_number(wide), set(), 0, 0
    while 0 < place < size and place not in seen:
        seen.add(place)
        block.seek(place)
        table = block.read(min(read_number(count_bytes), _MOST_ENTRIES + 1) * entry.size)
        entries += len(table) // entry.size + 1
        for _, kind, number, value in entry.iter_unpack(table[: len(table) // entry.size * entry.size]):
            length = number * _BYTES_OF_TYPE.get(kind, 1)
            claimed += min(length, max(size - value, 0)) if length > wide else 0
        # no more than the file holds is no trick: many pages, or the layers of an image program
        if entries > max(_MOST_ENTRIES, size // entry.size) or claimed > max(_MOST_BYTES, size):
            return True
        place = read_number(wide)
    return False


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
        if file[:4] not in _TIFF_ORDER or heavy_tags(io.BytesIO(file)):
            return None
        return _tiff(file, _TIFF_ORDER[file[:4]])
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
    place, whole_exif = len(_JPEG), not heavy_tags(io.BytesIO(file))
    while file[place + 1] != START_OF_SCAN:
        marker, length = struct.unpack_from(">HH", file, place)
        end = place + 2 + length
        exif = whole_exif and marker == 0xFFE1 and file[place + 4 : place + 8] == b"Exif"
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
