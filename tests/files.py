"""Small pictures, as arrays, Pillow images and files, and the parts of these."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def noise(height, width, seed=0):
    """(h, w, 3) uint8: every px of misplacement, and every other filter, gives other views of it."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def picture(height, width, seed=0):
    """The same as a Pillow image, which no size makes ambiguous."""
    return Image.fromarray(noise(height, width, seed))


def encoded(image, kind="PNG", **options):
    """A Pillow image or an array as the bytes of a file."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def png_chunk(kind, data, checksum=None):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum or zlib.crc32(kind + data))


def exif(orientation):
    found = Image.Exif()
    found[0x0112] = orientation
    return found
