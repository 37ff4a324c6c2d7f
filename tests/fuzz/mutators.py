"""Damaged picture files, each by a seed and a number alone, so that any can be made again."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, features

from tests.files import encoded, exif, noise, png_chunk

Rng = np.random.Generator
SIZE = (20, 30)
NUMBERS = (0, 1, 2, 7, 255, 256, 5_000, 0x7FFF, 0xFFFF, 20_000, 1_000_000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@cache
def whole_files() -> tuple[bytes, ...]:
    """Small pictures in the formats, modes, compressions and with the metadata that the readers know."""

    def made(image: Image.Image, kind: str = "PNG", many: int = 0, **options) -> bytes:
        more = [Image.fromarray(noise(*SIZE, seed)) for seed in range(many)]
        # a copy, since Pillow leaves settings of one format on an image that is saved in another
        return encoded(image.copy(), kind, **({"save_all": True, "append_images": more} if many else {}), **options)

    rgb = Image.fromarray(noise(*SIZE))
    smooth = Image.linear_gradient("L").resize(SIZE[::-1]).convert("RGB")
    rgba, gray = smooth.convert("RGBA"), smooth.convert("L")
    rgba.putalpha(gray)
    palette, deep = rgb.quantize(16), Image.fromarray(np.arange(600, dtype=np.uint16).reshape(SIZE) * 109)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    files = [made(image) for image in (rgb, rgba, gray, gray.convert("LA"), palette, deep, gray.convert("1"))]
    files += [made(smooth, exif=exif(6), dpi=(72, 72)), made(palette, transparency=3), made(smooth, many=2)]
    jpegs: list[dict] = [{}, {"progressive": True}, {"subsampling": 0}, {"exif": exif(6)}, {"xmp": xmp}]
    files += [made(smooth, "JPEG", **options) for options in jpegs]
    # one more frame: Pillow 11.2 writes the directory of three over the first
    files += [made(gray, "JPEG"), made(smooth.convert("CMYK"), "JPEG"), made(smooth, "MPO", many=1)]
    files += [made(smooth, "GIF"), made(palette, "GIF", transparency=3), made(smooth, "GIF", many=2)]
    for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        files.append(made(smooth, "TIFF", compression=compression, exif=exif(8)))
    files += [made(gray.convert("1"), "TIFF", compression="group4"), made(deep, "TIFF")]
    files += [made(smooth, "TIFF", tiffinfo={270: "words", 700: xmp}), made(smooth, "TIFF", many=2)]
    files += [made(image, kind) for kind in ("BMP", "PPM") for image in (rgb, gray, gray.convert("1"))]
    files += [made(palette, "BMP"), b"P3 30 20 255 " + b"7 " * 1800]
    for kind in ("WEBP", "AVIF"):
        if features.check(kind.lower()):
            files += [made(smooth, kind), made(rgba, kind), made(smooth, kind, exif=exif(5), xmp=xmp)]
            files.append(made(smooth, kind, many=2))
    return (*files, made(smooth, "WEBP", lossless=True))


def damaged(seed: int, number: int) -> bytes:
    """File ``number`` of a seed: a whole one, damaged one to three times over."""
    rng = np.random.default_rng([seed, number])
    file = rng.choice(np.array(whole_files(), dtype=object))
    for _ in range(rng.integers(1, 4)):
        file = MUTATORS[rng.integers(len(MUTATORS))](rng, file) if file else file
    return file


def _place(rng: Rng, file: bytes) -> int:
    """Anywhere, or, as often, among the first 200 bytes, where most headers are."""
    return int(rng.integers(min(len(file), 200) if rng.random() < 0.5 else len(file)))


def bits(rng: Rng, file: bytes) -> bytes:
    found = bytearray(file)
    for _ in range(rng.integers(1, 9)):
        found[_place(rng, file)] ^= 1 << int(rng.integers(8))
    return bytes(found)


def number(rng: Rng, file: bytes) -> bytes:
    """A size, a length, an offset, a count: whatever stands there becomes a number that is likely wrong."""
    place, wide = _place(rng, file), int(rng.choice([1, 2, 4]))
    value = int(rng.choice(NUMBERS)) % (1 << 8 * wide)
    return file[:place] + value.to_bytes(wide, str(rng.choice(["little", "big"]))) + file[place + wide :]


def truncated(rng: Rng, file: bytes) -> bytes:
    return file[: _place(rng, file)]


def moved(rng: Rng, file: bytes) -> bytes:
    """A span goes, comes twice, or comes again elsewhere."""
    start, length, to = _place(rng, file), int(rng.integers(1, 64)), _place(rng, file)
    without = file[:start] + file[start + length :]
    if rng.random() < 0.4:
        return without
    return without[:to] + file[start : start + length] + (file if rng.random() < 0.5 else without)[to:]


def noisy(rng: Rng, file: bytes) -> bytes:
    place = _place(rng, file)
    return file[:place] + rng.bytes(int(rng.integers(1, 40))) + file[place + int(rng.integers(40)) :]


def joined(rng: Rng, file: bytes) -> bytes:
    """The head of one file, and the tail of another."""
    other = whole_files()[rng.integers(len(whole_files()))]
    return file[: _place(rng, file)] + other[_place(rng, other) :]


def _parts(file: bytes) -> list[bytes] | None:
    """A PNG's chunks or a JPEG's segments, as far as they can be told apart."""
    try:
        if file.startswith(b"\x89PNG"):
            place, parts = 8, [file[:8]]
            while place < len(file):
                end = place + struct.unpack_from(">I", file, place)[0] + 12
                parts.append(file[place:end])
                place = end
            return parts
        if file.startswith(b"\xff\xd8"):
            place, parts = 2, [file[:2]]
            while file[place + 1] != 0xDA:
                end = place + 2 + struct.unpack_from(">H", file, place + 2)[0]
                parts.append(file[place:end])
                place = end
            return [*parts, file[place:]]
    except (struct.error, IndexError):
        pass
    return None


def parts(rng: Rng, file: bytes) -> bytes:
    """Chunks or segments go, come twice, change places, or are damaged under a checksum that holds."""
    found = _parts(file)
    if found is None or len(found) < 3:
        return number(rng, file)
    place, to, way = int(rng.integers(1, len(found))), int(rng.integers(1, len(found))), rng.integers(4)
    part = found[place]
    if way == 0:
        found.pop(place)
    elif way == 1:
        found.insert(to, part)
    elif way == 2:
        found[place], found[to] = found[to], part
    elif file.startswith(b"\x89PNG") and len(part) > 12:
        found[place] = png_chunk(part[4:8], number(rng, part[8:-4]))
    elif len(part) > 4:
        found[place] = part[:4] + number(rng, part[4:])
    return b"".join(found)


def tags(rng: Rng, file: bytes) -> bytes:
    """The picture anew with a block of EXIF made of any tags, types, counts and places."""
    order = str(rng.choice(["<", ">"]))
    table = [
        struct.pack(
            order + "HHII",
            int(rng.choice([0x0112, 0x011A, 0x0128, 0x8769, 0x927C, int(rng.integers(1 << 16))])),
            int(rng.integers(20)),
            int(rng.choice([1, 2, 5, int(rng.choice(NUMBERS))])),
            int(rng.choice([1, 6, 8, 26, int(rng.choice(NUMBERS))])),
        )
        for _ in range(rng.integers(1, 30))
    ]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(table))
    block = b"Exif\0\0" + head + b"".join(table) + rng.bytes(int(rng.integers(60)))
    kind = str(rng.choice(["PNG", "JPEG", "WEBP"]))
    made = _with_exif(kind, block)
    return number(rng, made) if rng.random() < 0.3 else made


def _with_exif(kind: str, block: bytes) -> bytes:
    whole = encoded(Image.fromarray(noise(*SIZE)), kind)
    if kind == "PNG":
        return whole[:33] + png_chunk(b"eXIf", block[6:]) + whole[33:]
    if kind == "JPEG":
        return whole[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + whole[2:]
    file = io.BytesIO()
    Image.fromarray(noise(*SIZE)).save(file, kind, lossless=True, exif=block)
    return file.getvalue()


MUTATORS: tuple[Callable[[Rng, bytes], bytes], ...] = (
    bits,
    number,
    number,
    truncated,
    moved,
    noisy,
    joined,
    parts,
    parts,
    tags,
)
