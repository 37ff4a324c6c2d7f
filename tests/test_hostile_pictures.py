"""What attacks a reader of pictures: files that cost far more than they weigh, odd arrays, and what is no file."""

import io
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import encoded, exif, noise, picture, png_chunk, refuses
from uhd.cli import main
from uhd.hf import UHDImageProcessor, UHDVideoProcessor
from uhd.loading import image_sizes_hw
from uhd.pixels import MAX_PIXELS, PixelSettings, image_size_hw, load_image
from uhd.pixels.source import FORMATS, most_bytes, read_whole
from uhd.pixels.views import load_picture
from uhd.slicing.plan import MAX_SIDE

FAST = PixelSettings(backend="fast")
READERS = {
    "exact": load_image,
    "fast": lambda source: load_picture(source, settings=FAST),
    "size": image_size_hw,
}
every_reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


def with_chunk(kind: bytes, data: bytes) -> bytes:
    png = encoded(picture(20, 30))
    return png[:33] + png_chunk(kind, data) + png[33:]


def tiff(tags: list[tuple], data: bytes = b"\1") -> bytes:
    """Data from place 8 on, and a table of (tag, type, number of values, value or place)."""
    table = b"".join(struct.pack("<HHLL", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<L", 8 + len(data)) + data + struct.pack("<H", len(tags)) + table + bytes(4)


def heavy(entries: int = 4000, size: int = 50_000) -> bytes:
    """Tags that all hold the same bytes: 200 MB out of 100 KB."""
    return tiff([(40_000 + number, 1, size, 8) for number in range(entries)], bytes(size))


def gray_tiff(size_hw: tuple[int, int], *tags: tuple, data: bytes = b"\1") -> bytes:
    height, width = size_hw
    first = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    return tiff([*first, *tags], data)


def in_segments(block: bytes, head: bytes, marker: int) -> bytes:
    parts = [head + block[start : start + 60_000] for start in range(0, len(block), 60_000)]
    segments = b"".join(struct.pack(">HH", marker, len(part) + 2) + part for part in parts)
    jpeg = encoded(picture(20, 30), "JPEG")
    return jpeg[:2] + segments + jpeg[2:]


# --- what is read --------------------------------------------------------------------------------

OTHERS = {
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 20\n%%EndComments\nshowpage\n",
    "PDF": encoded(picture(20, 30), "PDF"),
    "PSD": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 20, 30, 8, 3) + bytes(14),
    **{kind: encoded(picture(20, 30), kind) for kind in ("ICO", "TGA", "PCX", "SGI", "DDS")},
}


@every_reader
@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_are_refused_whatever_their_name(kind, read, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    path = tmp_path / "photo.jpg"
    path.write_bytes(OTHERS[kind])
    for source in (OTHERS[kind], path, io.BytesIO(OTHERS[kind]), {"bytes": OTHERS[kind]}):
        refuses(r"not an image in a format that is read here \(PNG, JPEG.*PIL\.Image\.open", read, source)


def test_the_way_to_ask_for_another_format():
    with Image.open(io.BytesIO(OTHERS["PCX"])) as opened:
        assert np.array_equal(np.asarray(load_image(opened)), noise(20, 30))


def test_a_plug_in_of_a_listed_format_is_read(monkeypatch):
    """HEIC comes by a plug-in; here one that reads a few bytes of our own."""
    monkeypatch.setattr(Image, "ID", [*Image.ID])
    monkeypatch.setattr(Image, "OPEN", {**Image.OPEN})
    for name in ("HEIF", "OTHER"):
        Image.register_open(
            name, lambda *_: picture(20, 30), lambda prefix, name=name: prefix.startswith(name.encode())
        )
    assert np.array_equal(np.asarray(load_image(b"HEIF and so on")), noise(20, 30))
    refuses("not an image", load_image, b"OTHER and so on")
    assert "HEIF" in FORMATS


# --- what a file may cost ------------------------------------------------------------------------

BOMBS = {
    "a PNG of 64 million pixels": (encoded(Image.new("1", (8000, 8000))), "64000000 pixels, over max_pixels=50331648"),
    "a side": (b"P4 1000001 2 " + bytes(250_002), "no side may be over 1000000 px"),
    "one tile": (
        gray_tiff((16, 16), (322, 4, 1, 16384), (323, 4, 1, 16384), (324, 4, 1, 8), (325, 4, 1, 1)),
        "in its tiles",
    ),
    "padded tiles": (
        gray_tiff(
            (32_000, 16),
            *[(322, 4, 1, 65_536), (323, 4, 1, 16), (324, 4, 2000, 8), (325, 4, 2000, 8)],
            data=struct.pack("<L", 8) * 4000,
        ),
        "in its tiles",
    ),
    "tags": (
        gray_tiff((20, 30), *[(40_000 + n, 1, 9_000, 8) for n in range(2000)], data=bytes(9_000)),
        "its tags are",
    ),
    "tables": (
        b"II*\0" + struct.pack("<L", 8) + b"".join(struct.pack("<HL", 0, 14 + 6 * n) for n in range(70_000)),
        "its tags are",
    ),
}


@every_reader
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_they_are_decoded(name, read):
    file, words = BOMBS[name]
    assert len(file) < 450_000
    refuses(f"this file of {len(file)} bytes.*{words}", read, file)


@pytest.mark.parametrize("read", [READERS["exact"], READERS["fast"]], ids=["exact", "fast"])
def test_a_jpeg_of_very_many_scans_is_refused(read):
    jpeg = encoded(Image.new("RGB", (2000, 1500)), "JPEG", progressive=True)
    last = jpeg.rindex(b"\xff\xda")
    file = jpeg[:-2] + jpeg[last:-2] * 400 + jpeg[-2:]
    for source in (file, Image.open(io.BytesIO(file))):
        refuses("pixels to decode in its scans", read, source)
        refuses("pixels to decode in its scans", image_size_hw, Image.open(io.BytesIO(file)))
    assert read(jpeg).height == 1500


def test_scans_are_those_of_the_frame_that_is_decoded():
    """Not what stands behind it, such as a phone's film, in which the marker of a scan is two bytes of many."""
    few = PixelSettings(max_pixels=1 << 20)
    frame = picture(900, 1100)
    with_film = encoded(frame, "JPEG", progressive=True) + b"\xff\xda" * 400
    assert load_image(with_film, settings=few).size == (1100, 900)
    file = encoded(frame, "MPO", save_all=True, append_images=[frame], progressive=True)
    assert [load_image(file, settings=few, frame=number).size for number in (None, 1)] == [(1100, 900)] * 2
    last, end = file.rindex(b"\xff\xda"), file.rindex(b"\xff\xd9")
    hidden = b"\xff\xfe\0\4\xff\xd9"  # a comment that holds the marker of an end
    longer = file[:end] + hidden + file[last:end] * 20 + file[end:]
    assert load_image(longer, settings=few, frame=0).size == (1100, 900)
    refuses("pixels to decode in its scans", load_image, longer, settings=few, frame=1)


def test_every_frame_has_the_limit():
    file = encoded(Image.new("L", (8, 8)), "TIFF", save_all=True, append_images=[Image.new("L", (90, 80))])
    assert load_image(file, frame=1, settings=PixelSettings(max_pixels=7200)).size == (90, 80)
    refuses("80x90 px .* over max_pixels=7199", load_image, file, frame=1, settings=PixelSettings(max_pixels=7199))


@every_reader
def test_tags_may_hold_what_the_file_holds(read):
    """Layers of an image program, and stacks of a microscope: much, but nothing of it twice."""
    strip = [(273, 4, 1, 8), (279, 4, 1, 600)]
    layers = gray_tiff((20, 30), *strip, (37_724, 1, 17 << 20, 608), data=bytes(600 + (17 << 20)))
    stack = gray_tiff((20, 30), *strip, data=bytes(600))[:-4]
    for _ in range(70):
        page = b"".join(struct.pack("<HHLL", 256 + number, 4, 1, 1) for number in range(1000))
        stack += struct.pack("<LH", len(stack) + 4, 1000) + page
    for file in (layers, stack + bytes(4)):
        result = read(file)
        assert result == (20, 30) if isinstance(result, tuple) else (result.height, result.width) == (20, 30)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_late_frames_of_large_animations_are_refused(kind):
    frames = [Image.new("L", (40, 30), 5 * level) for level in range(50)]
    file = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    few = PixelSettings(max_pixels=1200)  # four times a million pixels are allowed in any case
    assert load_image(file, frame=49, settings=few).size == (40, 30)
    large = [Image.new("L", (1000, 900), 40 * level) for level in range(6)]
    file = encoded(large[0], kind, save_all=True, append_images=large[1:])
    refuses("pixels to decode up to frame 5", load_image, file, frame=5, settings=PixelSettings(max_pixels=900_000))
    assert load_image(file, frame=3, settings=PixelSettings(max_pixels=900_000)).size == (1000, 900)


@every_reader
@pytest.mark.parametrize(
    "file",
    [
        with_chunk(b"eXIf", heavy()),
        with_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 5\n" + heavy().hex().encode())),
        in_segments(heavy(), b"Exif\0\0", 0xFFE1),
        in_segments(heavy(2000, 30_000), b"MPF\0", 0xFFE2),
    ],
    ids=["PNG", "PNG profile", "JPEG", "MPF"],
)
def test_heavy_tags_are_not_read(file, read, monkeypatch):
    """They are metadata, so the picture is not refused for them."""
    found = []
    monkeypatch.setattr("PIL.TiffImagePlugin.ImageFileDirectory_v2.load", lambda self, file: found.append(self))
    result = read(file)
    assert found == []
    assert result == (20, 30) if isinstance(result, tuple) else (result.height, result.width) == (20, 30)


COST = """
import sys
import uhd.pixels
from tests.memory import peak_mib
from uhd.pixels.views import load_picture
settings = uhd.pixels.PixelSettings(backend=sys.argv[1])
load_picture(open(sys.argv[3], "rb"), settings=settings)
before = peak_mib(anew=True)
load_picture(sys.argv[2], settings=settings)
print(peak_mib() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pillow", "fast"])
@pytest.mark.parametrize("kind", ["PNG RGBA", "PNG LA", "WEBP RGBA", "AVIF RGBA", "TIFF F", "JPEG RGB", "GIF P"])
def test_the_largest_picture_by_default_costs_less_than_promised(kind, backend, tmp_path):
    kind, mode = kind.split()
    options = {
        "WEBP": {"lossless": True},
        "TIFF": {"compression": "tiff_adobe_deflate"},
        "JPEG": {"progressive": True},
    }
    small, large = tmp_path / "small", tmp_path / "large"
    for path, size in ((small, (30, 20)), (large, (7094, 7094))):
        Image.new(mode, size).save(path, kind, **options.get(kind, {}))
    assert large.stat().st_size < 420_000
    told = subprocess.run([sys.executable, "-c", COST, backend, large, small], capture_output=True, check=True)
    assert 0 < float(told.stdout) < 1024


# --- what is no file -----------------------------------------------------------------------------


@every_reader
def test_what_may_wait_or_never_end_is_refused_by_path(read, tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.png"))
        for path, what in (
            (tmp_path / "fifo.png", "a FIFO"),
            ("/dev/zero", "a device"),
            (tmp_path / "socket.png", "a socket"),
        ):
            refuses(f"{path}' is {what}.* pass the file object or its bytes", read, path)
    refuses("is a folder: give an image file", read, tmp_path, error=IsADirectoryError)
    refuses("is no path", read, "a\0b.png")
    refuses("is no path", read, "\ud800.png")


class Endless(io.RawIOBase):
    def read(self, size=-1):
        return bytes(min(size, 1 << 22)) if size >= 0 else pytest.fail("asked for all of it")


@every_reader
def test_file_objects_that_are_none(read):
    refuses(r"has more than 218103808 bytes, over what max_pixels=50331648 allows", read, Endless())
    refuses("gives str: open it as bytes", read, io.StringIO("a.png"))
    closed = io.BytesIO(encoded(picture(20, 30)))
    closed.close()
    refuses("BytesIO.* cannot be read.*closed file", read, closed)


def test_few_pixels_allow_for_few_bytes():
    allowed = PixelSettings(max_pixels=600)
    assert len(read_whole(io.BytesIO(bytes(16_000_000)), allowed)) == 16_000_000
    refuses("max_pixels=600", read_whole, io.BytesIO(bytes(17_000_000)), allowed)
    refuses(
        "has 178.* bytes, over what max_pixels=600",
        load_image,
        encoded(picture(20, 30)) + bytes(17 << 20),
        settings=allowed,
    )


@pytest.mark.parametrize("command", ["plan", "layout", "show", "compare", "encode", "demo"])
def test_a_pipe_is_a_picture_in_every_command(command, tmp_path, capsys):
    """As from a shell's ``<(...)``: its bytes come once."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=[encoded(picture(60, 90))], daemon=True)
    writer.start()
    output = {"show": "-o a.png", "compare": "--strategies llava-1.5 --html a.html", "encode": "-o a.safetensors"}
    rest = (output | {"demo": "-o a.png"}).get(command, "").split()
    rest = [str(tmp_path / word) if word.startswith("a.") else word for word in rest]
    assert main([command, str(pipe), *rest]) == 0
    writer.join(10)
    assert not writer.is_alive()
    assert re.search("90x60|visual tokens", capsys.readouterr().out)


def test_a_command_raises_the_limit(tmp_path, capsys):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture(20, 30)))
    assert main(["--max-pixels", "599", "plan", str(path)]) == 1
    assert "uhd --max-pixels N" in capsys.readouterr().out
    assert main(["--max-pixels", "600", "plan", str(path)]) == 0
    assert main(["--max-pixels", "599", "layout", str(path)]) == 1
    assert capsys.readouterr().err.startswith(f"uhd layout: '{path}' is 20x30 px")


# --- arrays, tensors, memory ---------------------------------------------------------------------


def odd_sources():
    tensor = torch.zeros(3, 6, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototypes, says torch
        yield "nested", torch.nested.nested_tensor([tensor, tensor]), "nested"
        yield "quantized", torch.quantize_per_tensor(tensor, 0.1, 0, torch.quint8), "dequantize"
        yield "rows", tensor[0].to_sparse_csr(), "to_dense"
    yield "meta", tensor.to("meta"), r"this tensor of shape \(3, 6, 9\).* has no values"
    yield "sparse", tensor.to_sparse(), "to_dense"
    yield "large tensor", torch.zeros(1).expand(3, 8000, 8000), "over max_pixels"
    yield "large array", np.broadcast_to(np.float32(0), (8000, 8000, 3)), "over max_pixels"
    yield "nothing", np.zeros((0, 0), np.uint8), r"this array of shape \(0, 0\).* not empty"
    yield "no rows", np.zeros((0, 9, 3)), "not empty"
    yield "masked", np.ma.masked_array(np.zeros((6, 9, 3)), mask=True), "filled"
    yield "no pixel", Image.new("RGB", (0, 5)), "5x0 px"
    yield "other bytes", memoryview(bytes(182))[::2], "this file of 91 bytes .*not an image"
    released = memoryview(b"abc")
    released.release()
    yield "released", released, "this memoryview cannot be read"
    yield "palette", without_palette(), "this file of 72 bytes cannot be decoded.*AssertionError"


def without_palette() -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 30, 20, 8, 3, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(620))) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("source, words", [pytest.param(*rest, id=name) for name, *rest in odd_sources()])
def test_odd_sources_are_refused_in_a_sentence(source, words):
    for name, read in READERS.items():
        if (name, words[-5:]) != ("size", "Error"):  # a size needs no palette
            refuses(words, read, source)


def test_values_that_only_the_pixels_tell():
    for bad in (torch.zeros(3, 6, 9, dtype=torch.complex64).conj(), np.zeros((6, 9), object), np.zeros((6, 9), "U3")):
        refuses(r"this (array|tensor) of shape .*pixels must be uint8", load_image, bad)
    refuses(r"got 0\.\.1\.00020003: .* clip", load_image, np.linspace(0, 1.0002, 54, dtype=np.float32).reshape(6, 9))


def test_odd_sources_that_are_pictures():
    half = np.full((6, 9), np.nextafter(np.float16(1), np.float16(2)))
    for ones in (
        np.nextafter(np.float32(1), np.float32(2)) * np.ones((6, 9), np.float32),
        half,
        half - half - 1e-9 + 1,
    ):
        assert (np.asarray(load_image(ones)) == 255).all()
    negated = torch.full((6, 9), -1j).conj().imag
    assert negated.is_neg() or negated.is_conj()
    assert (np.asarray(load_image(negated)) == 255).all()
    file = encoded(picture(20, 30))
    for view in (
        memoryview(b"".join(bytes([byte, 0]) for byte in file))[::2],
        memoryview(file).cast("B"),
        bytearray(file),
    ):
        assert np.array_equal(np.asarray(load_image(view)), noise(20, 30))


def test_wide_types_are_converted_a_band_at_a_time():
    values = np.random.default_rng(0).integers(0, 65536, (700, 800, 3), dtype=np.uint16)
    assert np.array_equal(np.asarray(load_image(values)), np.rint(values / 257).astype(np.uint8))
    floats = np.random.default_rng(0).random((800, 700, 3))
    assert np.array_equal(np.asarray(load_image(floats)), np.rint(floats.astype(np.float64) * 255).astype(np.uint8))


def test_transparency_is_composited_a_band_at_a_time():
    pixels = np.random.default_rng(0).integers(0, 256, (1300, 900, 4), dtype=np.uint8)
    image, below = Image.fromarray(pixels), Image.new("RGBA", (900, 1300), (9, 80, 200, 255))
    found = load_image(image, settings=PixelSettings(background=(9, 80, 200)))
    assert np.array_equal(np.asarray(found), np.asarray(Image.alpha_composite(below, image).convert("RGB")))


# --- names, and no metadata ----------------------------------------------------------------------


def test_pictures_in_lists_are_told_by_their_number(tmp_path):
    cut = encoded(picture(20, 30))[:-40]
    processor, videos = UHDImageProcessor(), UHDVideoProcessor()
    refuses("^image 1: this file of .* bytes cannot be decoded", processor, [picture(20, 30), cut])
    refuses("^sample 1: image 0: this file of .* bytes", processor, [[picture(20, 30)], [cut]])
    refuses("^video 1, frame 2: this file of .* bytes", videos, [[picture(20, 30)], [picture(20, 30)] * 2 + [cut]])
    refuses("^item 1: this file of .* bytes", image_sizes_hw, [picture(20, 30), b"no picture"])
    sizes = image_sizes_hw([picture(20, 30)], settings=PixelSettings(max_pixels=600))
    assert sizes.tolist() == [[20, 30]]
    refuses("over max_pixels=599", image_sizes_hw, [picture(20, 30)], settings=PixelSettings(max_pixels=599))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("block", [exif(6).tobytes(), b"Exif\0\0" + bytes(40), b"Exif\0\0II*\0\x08\0\0\0\5\0\x12\1"])
def test_loading_the_result_again_changes_nothing(kind, block):
    own = {"tiffinfo": {270: "words"}} if kind == "TIFF" else {"exif": block}
    file = encoded(picture(20, 30), kind, **own)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(file)) as opened:
            for source in (file, opened, opened.copy()):
                found = load_image(source)
                assert (type(found), found.info, dict(found.getexif())) == (Image.Image, {}, {})
                assert load_image(found) is found


def test_the_page_states_the_limits_of_the_code():
    page = (Path(__file__).parents[1] / "SECURITY.md").read_text()
    assert f"more than {MAX_PIXELS:,} pixels" in page
    assert f"more than {MAX_SIDE:,} px" in page
    assert most_bytes(PixelSettings()) == 4 * MAX_PIXELS + (16 << 20)
    named = {"JPEG": "JPEG", "WEBP": "WebP", "PPM": "PNM", "HEIF": "HEIC"}
    assert all(named.get(name, name) in page for name in FORMATS)
    for place in re.findall(r"`(tests/[a-z_/]+\.py)`", page):
        assert (Path(__file__).parents[1] / place).is_file()
