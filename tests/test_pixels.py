"""Pictures in every shape become upright RGB; plans become views; views become patches."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import subprocess
import sys
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import skimage.data
import torch
from PIL import Image

from tests.tiny import encoded, exif, noise, png_chunk, refuses
from uhd.pixels import PixelSettings, image_size_hw, load_image, patchify, render, unpatchify
from uhd.slicing import plan
from uhd.slicing.plan import Box, Canvas, SlicePlan

GOLDEN = json.loads((Path(__file__).parent / "golden" / "pixels.json").read_text())
RNG = np.random.default_rng(7)
COLOURS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)  # rectangular, every pixel its own


def pixels(source, **options) -> np.ndarray:
    return np.asarray(load_image(source, **options))


def png(header: tuple, rows: list[bytes], *extra: tuple[bytes, bytes], late: tuple = ()) -> bytes:
    parts = [(b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0)), *extra]
    parts += [(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), *late, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)


def coordinate_image(height: int, width: int) -> Image.Image:
    """Every pixel spells its own (y, x): low bytes in red and green, high nibbles in blue."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([y % 256, x % 256, y // 256 * 16 + x // 256], axis=-1).astype(np.uint8))


def places(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    red, green, blue = np.moveaxis(rgb.astype(int), -1, 0)
    return red + blue // 16 * 256, green + blue % 16 * 256


# --- goldens -------------------------------------------------------------------------------------


def golden_image(record: dict) -> np.ndarray:
    y, x = np.mgrid[: record["h"], : record["w"]]
    seed = record["seed"]
    channels = [(7 * x + 3 * y + seed), (x * x // 11 + 5 * y), ((x ^ y) * 9 + 13 * seed)]
    return np.stack([channel % 256 for channel in channels], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("record", GOLDEN["records"], ids=lambda r: f"{r['h']}x{r['w']}")
def test_views_equal_the_reference(record):
    image = golden_image(record)
    assert hashlib.sha256(image.tobytes()).hexdigest() == record["input_sha256"]
    views = render(Image.fromarray(image), plan((record["h"], record["w"]), "llava-uhd"))
    assert [[v.shape[1], v.shape[0]] for v in views] == [golden["size"] for golden in record["views"]]
    for view, golden in zip(views, record["views"], strict=True):
        assert view.dtype == np.uint8
        assert view.flags.writeable
        np.testing.assert_allclose(view.mean(axis=(0, 1)), golden["mean"], atol=0.1)
        corners = np.concatenate([view[0, 0], view[-1, -1]]).astype(int)
        assert np.abs(corners - golden["corner"]).max() <= 1
        if PIL.__version__ == GOLDEN["pillow"]:
            assert hashlib.sha256(view.tobytes()).hexdigest() == golden["sha256"]


# --- from a plan to views ------------------------------------------------------------------------


def test_every_patch_of_every_slice_knows_where_it_came_from():
    """1008 x 672 px is its own canvas (3 x 2 slices of 336 px), so slices hold source pixels untouched."""
    found = plan((1008, 672), "llava-uhd")
    views = render(coordinate_image(1008, 672), found)
    assert len(views) == found.num_views == 7
    for view, array in zip(found.views, views, strict=True):
        if view.kind == "overview":
            continue
        patches = patchify(array, 14)
        for place, patch in enumerate(patches):
            row, col = divmod(place, view.patches_hw[1])
            y, x = places(unpatchify(patch[None], (1, 1), 14))
            top, left = view.box.top + 14 * row, view.box.left + 14 * col
            assert (y == np.arange(top, top + 14)[:, None]).all()
            assert (x == np.arange(left, left + 14)).all()


def test_the_overview_is_the_whole_image_upright():
    """A ramp stays a ramp under any resize: each view pixel says which source place it shows."""
    height, width = 1200, 500
    y, x = np.mgrid[:height, :width]
    ramp = np.stack([y * 255 / height, x * 255 / width, 0 * x], axis=-1).round().astype(np.uint8)
    found = plan((height, width), "llava-uhd")
    view = render(ramp, found)[-1].astype(float)
    h, w = found.overview_hw
    np.testing.assert_allclose(
        view[..., 0], np.broadcast_to((np.arange(h) + 0.5)[:, None] * 255 / h, (h, w)), atol=1.6
    )
    np.testing.assert_allclose(view[..., 1], np.broadcast_to((np.arange(w) + 0.5) * 255 / w, (h, w)), atol=1.6)


@pytest.mark.parametrize("name", ["astronaut", "page", "text", "coffee"])
def test_photos_are_resized_as_a_whole_and_then_cut(name):
    photo = getattr(skimage.data, name)()
    found = plan(photo.shape[:2], "llava-uhd")
    views = render(photo, found)
    rgb = Image.fromarray(photo).convert("RGB")
    for canvas in range(len(found.canvases)):
        size_hw = found.canvases[canvas].size_hw
        whole = np.zeros((*size_hw, 3), np.uint8)
        for view, array in zip(found.views, views, strict=True):
            if view.canvas == canvas:
                whole[view.box.top : view.box.bottom, view.box.left : view.box.right] = array
        assert (whole == np.asarray(rgb.resize(size_hw[::-1], Image.Resampling.BICUBIC))).all()


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 40), (40, 1), (3, 2000)])
def test_tiny_and_thin_images_render(size_hw):
    image = Image.new("RGB", size_hw[::-1], (10, 200, 30))
    found = plan(size_hw)
    views = render(image, found)
    assert [v.shape for v in views] == [(*v.size_hw, 3) for v in found.views]
    assert all((view == (10, 200, 30)).all() for view in views)


def test_an_image_of_another_size_than_its_plan_raises():
    refuses(r"300x400 px .* 400x300 px", render, Image.new("RGB", (300, 400)), plan((300, 400)))


def one_canvas(image_hw, **changes) -> SlicePlan:
    canvas = Canvas("slice", image_hw, image_hw, (1, 1), (Box(0, 0, *image_hw),), image_hw, 4)
    return SlicePlan(image_hw, 2, (replace(canvas, **changes),), (1, 1), 4, 0, "test")


def test_canvas_letterbox_with_fill_and_overlapping_tiles():
    tiles = (Box(0, 0, 8, 6), Box(0, 4, 8, 10))
    found = one_canvas(
        (6, 9), size_hw=(8, 10), offset=(1, 1), fill=(1, 2, 3), tiles=tiles, view_hw=(8, 6), grid=(1, 2)
    )
    expected = np.full((8, 10, 3), (1, 2, 3), np.uint8)
    expected[1:7, 1:10] = COLOURS
    left, right = render(COLOURS, found)
    assert (left == expected[:, :6]).all()
    assert (right == expected[:, 4:]).all()
    left[:] = 0  # views own their memory, also where tiles overlap
    assert (right == expected[:, 4:]).all()


def test_canvas_negative_offset_crops():
    found = one_canvas((6, 9), size_hw=(4, 4), offset=(-1, -3), tiles=(Box(0, 0, 4, 4),), view_hw=(4, 4))
    assert (render(COLOURS, found)[0] == COLOURS[1:5, 3:7]).all()


def test_canvas_source_box_hides_what_lies_outside():
    found = one_canvas((6, 9), source=Box(1, 2, 5, 8), content_hw=(8, 18), size_hw=(8, 18), tiles=(Box(0, 0, 8, 18),))
    found = replace(found, canvases=(replace(found.canvases[0], view_hw=(8, 18)),))
    expected = Image.fromarray(COLOURS[1:5, 2:8]).resize((18, 8), Image.Resampling.BICUBIC)
    assert (render(COLOURS, found)[0] == np.asarray(expected)).all()


def one_view(size_hw, view_hw, **changes):
    """A canvas of ``size_hw`` px, all of it one view; ``plan`` changes go to the plan."""
    found = changes.pop("plan", {})
    canvas = Canvas("overview", size_hw, size_hw, (1, 1), (Box(0, 0, *size_hw),), view_hw, 1, **changes)
    return SlicePlan(COLOURS.shape[:2], 1, (canvas,), None, 1, 0, "one", **found)


@pytest.mark.parametrize("resample", ["bicubic", "lanczos", "bilinear"])
def test_the_filter_is_the_plans_unless_the_settings_name_one(resample):
    shrunk = np.asarray(Image.fromarray(COLOURS).resize((4, 5), Image.Resampling[resample.upper()]))
    found = one_view((5, 4), (5, 4), plan={"resample": resample})
    assert (render(COLOURS, found)[0] == shrunk).all()
    assert (render(COLOURS, found, settings=PixelSettings(MEAN, STD))[0] == shrunk).all()
    other = replace(found, resample="lanczos" if resample == "bilinear" else "bilinear")
    assert (render(COLOURS, other)[0] != shrunk).any()
    assert (render(COLOURS, other, settings=PixelSettings(resample=resample))[0] == shrunk).all()


def sampled(image, size_hw, mode):
    """PyTorch's resize without antialiasing, in 8 bits."""
    channels = torch.from_numpy(np.array(image)).float().permute(2, 0, 1)[None]
    found = torch.nn.functional.interpolate(channels, size_hw, mode=mode, align_corners=False)
    return found[0].permute(1, 2, 0).round().clamp(0, 255).numpy()


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size_hw", [(2, 5), (3, 4), (5, 20), (13, 3), (6, 9)])
def test_without_antialiasing_pixels_are_sampled_as_in_torch(mode, size_hw):
    found = one_view(size_hw, size_hw, plan={"resample": mode, "antialias": False})
    assert np.abs(render(COLOURS, found)[0] - sampled(COLOURS, size_hw, mode)).max() <= 1
    if min(size_hw) < 6:
        widened = render(COLOURS, replace(found, antialias=True))[0]
        assert np.abs(widened - sampled(COLOURS, size_hw, mode)).max() > 10


def test_lanczos_without_antialiasing_enlarges_as_pillow_does():
    found = one_view((12, 18), (12, 18), plan={"resample": "lanczos", "antialias": False})
    image = COLOURS // 2 + 64  # so that nothing is clipped between Pillow's two passes
    widened = render(image, replace(found, antialias=True))[0].astype(int)
    inner = np.s_[5:7, 5:13]  # nearer to the rim Pillow leaves taps out, this repeats the edge
    assert np.abs(render(image, found)[0].astype(int) - widened)[inner].max() <= 2


def test_a_view_may_have_a_filter_of_its_own():
    found = one_view((5, 4), (2, 3), view_filter=("bicubic", False), plan={"resample": "bilinear"})
    whole = Image.fromarray(COLOURS).resize((4, 5), Image.Resampling.BILINEAR)
    assert np.abs(render(COLOURS, found)[0] - sampled(whole, (2, 3), "bicubic")).max() <= 1
    whole = Image.fromarray(COLOURS).resize((4, 5), Image.Resampling.BICUBIC)
    given_one = render(COLOURS, found, settings=PixelSettings(resample="bilinear"))[0]
    assert (given_one != render(COLOURS, found)[0]).any()


def test_a_canvas_may_be_resized_twice():
    found = one_view((5, 4), (5, 4), first_hw=(3, 7))
    bicubic = Image.Resampling.BICUBIC
    twice = Image.fromarray(COLOURS).resize((7, 3), bicubic).resize((4, 5), bicubic)
    assert (render(COLOURS, found)[0] == np.asarray(twice)).all()
    part = one_view((5, 4), (5, 4), first_hw=(3, 7), source=Box(1, 2, 6, 9))
    twice = Image.fromarray(COLOURS[1:6, 2:9]).resize((7, 3), bicubic).resize((4, 5), bicubic)
    assert (render(COLOURS, part)[0] == np.asarray(twice)).all()
    refuses("every side of a canvas must be at least 1 px", render, COLOURS, one_view((5, 4), (5, 4), first_hw=(0, 4)))


def test_a_plan_with_an_unknown_filter_raises():
    with pytest.raises(ValueError, match="resample must be 'bicubic', 'lanczos' or 'bilinear', got 'nearest'"):
        render(COLOURS, one_view((5, 4), (5, 4), plan={"resample": "nearest"}))


@pytest.mark.parametrize("resample", ["bicubic", "lanczos", "bilinear"])
def test_a_tile_of_another_size_is_resized_once_more(resample):
    found = one_canvas((6, 9), tiles=(Box(0, 1, 6, 9),), view_hw=(4, 10))
    method = Image.Resampling[resample.upper()]
    expected = np.asarray(Image.fromarray(COLOURS[:, 1:9]).resize((10, 4), method))
    assert (render(COLOURS, found, settings=PixelSettings(resample=resample))[0] == expected).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"source": Box(0, 0, 7, 9)}, "outside the image"),
        ({"tiles": (Box(0, -1, 6, 8),)}, "outside its canvas"),
        ({"tiles": (Box(2, 0, 2, 9),)}, "outside its canvas"),
        ({"size_hw": (8, 9)}, "does not cover"),
        ({"offset": (1, 0)}, "does not cover"),
        ({"offset": (0, -1)}, "does not cover"),
        ({"content_hw": (0, 9)}, "at least 1 px"),
    ],
)
def test_a_canvas_with_holes_raises(changes, message):
    refuses(message, render, COLOURS, one_canvas((6, 9), **changes))


# --- patches -------------------------------------------------------------------------------------


def test_patch_order_is_that_of_unfold_and_of_a_convolution():
    """384 px and patch 14 as in SigLIP: 27 patches a side, and the last 6 px are never seen."""
    p, view = 14, RNG.integers(0, 256, (384, 142, 3), dtype=np.uint8)
    patches = torch.from_numpy(patchify(view, p)).double()
    assert patches.shape == (27 * 10, 588)
    images = torch.from_numpy(view).permute(2, 0, 1)[None].double()
    assert torch.equal(patches, torch.nn.functional.unfold(images, p, stride=p)[0].T)
    conv = torch.nn.Conv2d(3, 5, p, stride=p).double()
    by_linear = patches @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(by_linear, conv(images)[0].flatten(1).T)


def test_patch_errors_name_sizes():
    refuses(r"one patch of 14 px, got \(13, 28, 3\)", patchify, np.zeros((13, 28, 3), np.uint8), 14)
    refuses(r"\(6, channels \* 4\), got \(5, 12\)", unpatchify, np.zeros((5, 12), np.uint8), (2, 3), 2)


# --- arrays and tensors --------------------------------------------------------------------------


def test_array_layouts():
    assert (pixels(COLOURS) == COLOURS).all()
    assert (pixels(COLOURS.transpose(2, 0, 1)) == COLOURS).all()
    gray = COLOURS[..., 0]
    for array in (gray, gray[..., None], gray[None]):
        assert (pixels(array) == gray[..., None]).all()
        assert image_size_hw(array) == (6, 9)
    assert image_size_hw(COLOURS.transpose(2, 0, 1)) == (6, 9)


def test_ambiguous_layouts_and_other_shapes_raise():
    for shape in ((3, 9, 3), (1, 9, 3), (4, 9, 1), (3, 3, 3)):
        refuses(r"can be \(h, w, c\) or \(c, h, w\)", load_image, np.zeros(shape, np.uint8))
        refuses("can be", image_size_hw, torch.zeros(shape))
    for shape in ((9,), (2, 6, 9, 3), (0, 9, 3), (6, 9, 2), (6, 9, 5)):
        refuses("an image array", load_image, np.zeros(shape, np.uint8))


def test_array_depths():
    assert (pixels(COLOURS.astype(np.uint16) * 257) == COLOURS).all()
    assert (pixels(COLOURS.astype(">u2") * 257) == COLOURS).all()
    for dtype in (np.float16, np.float32, np.float64):
        assert (pixels(COLOURS.astype(dtype) / dtype(255)) == COLOURS).all()
    assert (pixels(COLOURS[..., 0] > 100)[..., 1] == np.where(COLOURS[..., 0] > 100, 255, 0)).all()
    scale = np.array([[0, 128, 129, 65535]], np.uint16)  # half a level is 128.5
    assert pixels(scale)[0, :, 0].tolist() == [0, 0, 1, 255]


def test_floats_outside_0_to_1_and_other_dtypes_raise():
    for bad in (-0.01, 1.001, 255.0, np.nan, np.inf):
        array = np.full((6, 9, 3), 0.5)
        array[2, 3, 1] = bad
        refuses(r"must lie in 0\.\.1", load_image, array)
    for dtype in (np.int64, np.int8, np.uint32, np.complex64):
        refuses(np.dtype(dtype).name, load_image, np.zeros((6, 9, 3), dtype))


def test_alpha_in_arrays_is_composited():
    rgba = np.concatenate([COLOURS, np.zeros((6, 9, 1), np.uint8)], axis=-1)
    rgba[2, 3, 3] = 255
    for array in (rgba, rgba.transpose(2, 0, 1), rgba / 255.0):
        result = pixels(array, settings=PixelSettings(background=(9, 8, 7)))
        assert (result[2, 3] == COLOURS[2, 3]).all()
        assert (result[0, 0] == (9, 8, 7)).all()


def test_torch_tensors():
    chw = torch.from_numpy(COLOURS).permute(2, 0, 1)
    for tensor in (chw, torch.from_numpy(COLOURS), chw / 255, (chw.double() / 255).requires_grad_()):
        assert (pixels(tensor) == COLOURS).all()
        assert image_size_hw(tensor) == (6, 9)
    assert (pixels(torch.ones(3, 6, 9, dtype=torch.bfloat16)) == 255).all()


def test_importing_pixels_loads_no_torch():
    code = "import sys, uhd.pixels; uhd.pixels.DEFAULT; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# --- files ---------------------------------------------------------------------------------------


def test_path_bytes_and_pillow_agree(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(COLOURS).save(path)
    data = path.read_bytes()
    for source in (path, str(path), data, bytearray(data), memoryview(data), Image.fromarray(COLOURS)):
        assert (pixels(source) == COLOURS).all()
        assert image_size_hw(source) == (6, 9)
    with Image.open(path) as lazy:
        assert (pixels(lazy) == COLOURS).all()
        assert image_size_hw(lazy) == (6, 9)


def test_a_plain_rgb_image_is_not_copied():
    image = Image.fromarray(COLOURS)
    assert load_image(image) is image


def stored_as(orientation: int, upright: np.ndarray) -> np.ndarray:
    """What a camera stores. EXIF says which visual side the first stored row and the first stored column are."""
    row0, col0 = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }.get(orientation, ("top", "left"))  # an unknown one is upright
    stored = upright if row0 in ("top", "bottom") else upright.swapaxes(0, 1)
    stored = stored[::-1] if row0 in ("bottom", "right") else stored
    return stored[:, ::-1] if col0 in ("bottom", "right") else stored


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "late PNG"])
def test_exif_orientation(kind, orientation):
    stored = Image.fromarray(np.ascontiguousarray(stored_as(orientation, COLOURS)))
    tag = exif(orientation)
    if kind == "late PNG":
        rows = [row.tobytes() for row in np.asarray(stored)]
        data = png((stored.width, stored.height, 8, 2), rows, late=((b"eXIf", tag.tobytes()[6:]),))
    else:
        data = encoded(stored, kind, exif=tag, **({"lossless": True} if kind == "WEBP" else {}))
    assert image_size_hw(data) == (6, 9)
    once = load_image(data)
    assert (np.asarray(once) == COLOURS).all()
    assert (pixels(once) == COLOURS).all()  # not turned a second time
    with Image.open(io.BytesIO(data)) as opened:
        assert image_size_hw(opened) == (6, 9)
        assert (pixels(opened) == COLOURS).all()
        assert image_size_hw(opened) == (6, 9)


def test_size_is_read_without_decoding(monkeypatch):
    for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        data = encoded(noise(60, 90), kind, exif=exif(6))
        with monkeypatch.context() as patch:
            patch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
            assert image_size_hw(data) == (90, 60)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP"])
def test_truncated_files_raise(kind, tmp_path):
    data = encoded(noise(64, 96), kind)
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(data[: len(data) * 2 // 3])
    refuses(r"cut\..* (truncated or damaged|not an image)", load_image, path)


@pytest.mark.parametrize("data", [b"", b"hello, this is text", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_files_that_are_no_images_raise(data, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes(data)
    for source, name in ((path, "notes.txt"), (data, f"this file of {len(data)} bytes")):
        for read in (load_image, image_size_hw):
            refuses(f"{name}.*(not an image|truncated or damaged)", read, source)


def test_missing_files_urls_and_other_types_raise(tmp_path):
    refuses(r"none\.png", load_image, tmp_path / "none.png", error=FileNotFoundError)
    refuses("nothing is downloaded", load_image, "https://example.org/cat.png")
    for source in (None, 5, [[0]], object()):
        refuses(type(source).__name__, load_image, source, error=TypeError)


def test_decompression_bombs_raise():
    """A 20,000 x 20,000 PNG needs no real pixels to be refused."""
    refuses(r"400000000 pixels.*max_pixels", load_image, png((20_000, 20_000, 1, 0), []))
    small = encoded(Image.fromarray(COLOURS), "PNG")
    with pytest.raises(ValueError, match=r"6x9 px \(height x width\), 54 pixels, over max_pixels=53"):
        load_image(small, settings=PixelSettings(max_pixels=53))
    assert (pixels(small, settings=PixelSettings(max_pixels=54)) == COLOURS).all()
    raised = PixelSettings(max_pixels=10**8)
    between = png((10_000, 10_000, 1, 0), [])
    refuses("over max_pixels", image_size_hw, png((8_000, 8_000, 1, 0), []))
    with pytest.raises(ValueError, match=r"PIL\.Image\.MAX_IMAGE_PIXELS"):
        image_size_hw(between, settings=raised)  # Pillow only warns here, which this test suite makes an error
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert image_size_hw(between, settings=raised) == (10_000, 10_000)
    assert [w.category for w in caught] == [Image.DecompressionBombWarning]


def frames(kind: str) -> bytes:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    first, *rest = [Image.new("RGB", (9, 6), colour) for colour in colours]
    options = {"lossless": True} if kind == "WEBP" else {}
    return encoded(first, kind, save_all=True, append_images=rest, **options)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_frames_of_animations_and_pages(kind, tmp_path):
    data = frames(kind)
    assert image_size_hw(data) == (6, 9)
    assert (pixels(data) == (200, 0, 0)).all()
    for frame, channel in ((0, 0), (2, 2), (1, 1)):
        picture = load_image(data, frame=frame)
        assert (np.asarray(picture)[..., channel] == 200).all()
        assert (np.asarray(picture).sum(axis=-1) == 200).all()
        assert load_image(picture) is picture
    for frame in (3, -1, 1.0):
        refuses(r"3 frames, numbered from 0; got frame=", load_image, data, frame=frame)
    with Image.open(io.BytesIO(data)) as opened:
        opened.seek(1)
        assert (pixels(opened) == (0, 200, 0)).all()
        assert (pixels(opened, frame=2) == (0, 0, 200)).all()
        assert opened.tell() == 1
        assert (pixels(opened) == (0, 200, 0)).all()


def test_a_still_picture_has_one_frame():
    assert (pixels(COLOURS, frame=0) == COLOURS).all()
    for source in (COLOURS, Image.fromarray(COLOURS), encoded(Image.fromarray(COLOURS), "PNG")):
        refuses(r"1 frame, numbered", load_image, source, frame=1)


# --- modes ---------------------------------------------------------------------------------------

GRAY = COLOURS[..., 0]
RGB = Image.fromarray(COLOURS)


@pytest.mark.parametrize("mode, off", [("CMYK", 0), ("YCbCr", 3), ("HSV", 3), ("LAB", 3), ("RGBX", 0), ("RGBA", 0)])
def test_colour_modes(mode, off):
    """``off`` is what the eight bits of that mode lose, there and back."""
    smooth = np.zeros((6, 9, 3), np.uint8) + np.array([[[120, 90, 60]]], np.uint8)
    smooth[..., 1] += np.arange(9, dtype=np.uint8)
    converted = Image.fromarray(smooth).convert(mode)
    assert converted.mode == mode
    result = load_image(converted)
    assert result.mode == "RGB"
    assert np.abs(np.asarray(result).astype(int) - smooth).max() <= off


def test_gray_and_one_bit_modes():
    assert (pixels(Image.fromarray(GRAY)) == GRAY[..., None]).all()
    bits = Image.fromarray(GRAY > 100)
    assert bits.mode == "1"
    assert (pixels(bits) == np.where(GRAY > 100, 255, 0)[..., None]).all()
    for source in (encoded(bits, "PNG"), encoded(bits, "TIFF")):
        assert (pixels(source) == np.where(GRAY > 100, 255, 0)[..., None]).all()


def test_deep_gray_keeps_its_full_range():
    """Pillow's own conversion clips 16 bits at 255, which turns a microscope picture white."""
    deep = GRAY.astype(np.uint16) * 257
    png16 = encoded(Image.fromarray(deep), "PNG")
    little, big = Image.fromarray(deep), Image.frombytes("I;16B", (9, 6), deep.astype(">u2").tobytes())
    integers, floats = Image.fromarray(deep.astype(np.int32)), Image.fromarray(GRAY.astype(np.float32) / 255)
    assert [i.mode for i in (little, big, integers, floats)] == ["I;16", "I;16B", "I", "F"]
    for source in (png16, encoded(little, "TIFF"), little, big, integers, floats):
        assert (pixels(source) == GRAY[..., None]).all()
    for bad in (np.int32(-1), np.int32(65536)):
        refuses(r"0\.\.65535", load_image, Image.fromarray(np.full((6, 9), bad)))
    refuses(r"must lie in 0\.\.1", load_image, RGB.convert("F"))


def test_transparency_of_every_mode_shows_the_background():
    alpha = Image.fromarray(np.where(GRAY > 100, 255, 0).astype(np.uint8))
    settings = PixelSettings(background=(10, 20, 30))
    opaque = (GRAY > 100)[..., None]
    rgba, la = RGB.copy(), Image.fromarray(GRAY)
    rgba.putalpha(alpha)
    la.putalpha(alpha)
    for image, colours in ((rgba, COLOURS), (rgba.convert("RGBa"), COLOURS), (la, GRAY[..., None])):
        assert (pixels(image, settings=settings) == np.where(opaque, colours, (10, 20, 30))).all()
    assert (pixels(la.convert("La"), settings=settings) == np.where(opaque, GRAY[..., None], (10, 20, 30))).all()
    assert (pixels(rgba)[~opaque[..., 0]] == 255).all()  # white unless told otherwise
    half = Image.new("RGBA", (9, 6), (200, 100, 0, 128))
    np.testing.assert_allclose(pixels(half, settings=settings)[0, 0], [105.4, 60.2, 14.9], atol=1)


def test_transparent_palettes_and_keys():
    palette = Image.new("P", (9, 6), 1)
    palette.putpalette([0, 0, 0, 50, 60, 70, 200, 210, 220])
    palette.putpixel((3, 2), 2)
    assert (pixels(palette)[0, 0] == (50, 60, 70)).all()
    for data in (encoded(palette, "PNG", transparency=1), encoded(palette, "GIF", transparency=1)):
        result = pixels(data, settings=PixelSettings(background=(1, 2, 3)))
        assert (result[0, 0] == (1, 2, 3)).all()
        assert (result[2, 3] == (200, 210, 220)).all()
    levels = encoded(palette, "PNG", transparency=bytes([255, 0, 255]))
    assert (pixels(levels)[0, 0] == 255).all()
    pa = palette.convert("PA")
    assert pa.mode == "PA"
    assert (pixels(pa)[2, 3] == (200, 210, 220)).all()
    keyed = encoded(RGB, "PNG", transparency=tuple(map(int, COLOURS[2, 3])))
    expected = COLOURS.copy()
    expected[2, 3] = 255
    assert (pixels(keyed) == expected).all()


def test_transparent_level_of_deep_pngs():
    gray = np.array([[0, 1000, 65535, 257]], ">u2")
    data = png((4, 1, 16, 0), [gray.tobytes()], (b"tRNS", struct.pack(">H", 1000)))
    assert pixels(data, settings=PixelSettings(background=(9, 9, 9)))[0, :, 0].tolist() == [0, 9, 255, 1]
    data = png((1, 1, 16, 2), [bytes(6)], (b"tRNS", struct.pack(">HHH", 1000, 0, 0)))
    refuses("alpha channel", load_image, data)


def test_rotated_transparent_palette():
    """Turning keeps the transparency of a palette image and drops the tag."""
    palette = Image.fromarray(np.arange(54, dtype=np.uint8).reshape(6, 9)).convert("P")
    data = encoded(palette, transparency=0, exif=exif(6))
    result = load_image(data)
    assert result.size == (6, 9)
    assert result.getpixel((5, 0)) == (255, 255, 255)  # the first stored pixel, now top right
    assert load_image(result) is result


# --- settings ------------------------------------------------------------------------------------

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def test_settings_round_trip():
    settings = PixelSettings(MEAN, STD, resample="lanczos", background=(1, 2, 3), max_pixels=99)
    assert PixelSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    assert PixelSettings.from_dict(json.loads(json.dumps(PixelSettings().to_dict()))) == PixelSettings()
    assert hash(PixelSettings(list(MEAN), np.array(STD))) == hash(PixelSettings(MEAN, STD))
    refuses(r"PixelSettings has no \['men'\]", PixelSettings.from_dict, {"men": 1})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mean": MEAN}, "together"),
        ({"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}, "divide both by 255"),
        ({"mean": MEAN, "std": (0.2, 0.2, 0)}, "std above 0"),
        ({"mean": (0.5, 0.5), "std": STD}, "three finite"),
        ({"mean": 0.5, "std": 0.5}, "three finite"),
        ({"mean": (0.5, 0.5, float("nan")), "std": STD}, "three finite"),
        ({"resample": "nearest"}, "resample"),
        ({"background": (0, 0, 256)}, "background"),
        ({"background": (0, 0)}, "background"),
        ({"max_pixels": 0}, "max_pixels"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_bad_settings_raise(changes, message):
    refuses(message, PixelSettings, **changes)


def test_mean_and_std_are_never_guessed():
    assert PixelSettings(MEAN, STD).mean_std() == (MEAN, STD)
    refuses("from_preprocessor", PixelSettings().mean_std)


def test_settings_from_a_preprocessor(tmp_path):
    config = {"image_mean": list(MEAN), "image_std": list(STD), "rescale_factor": 0.00392156862745098, "resample": 2}
    expected = PixelSettings(MEAN, STD)
    assert PixelSettings.from_preprocessor(config) == expected
    assert PixelSettings.from_preprocessor(config, resample="bilinear") == replace(expected, resample="bilinear")
    assert PixelSettings.from_preprocessor({"image_processor": config, "chat_template": ""}) == expected
    assert PixelSettings.from_preprocessor(SimpleNamespace(to_dict=lambda: config)) == expected
    assert PixelSettings.from_preprocessor({**config, "do_normalize": False}).mean_std() == ((0, 0, 0), (1, 1, 1))
    refuses("no image_mean and image_std in", PixelSettings.from_preprocessor, tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": config}))
    assert PixelSettings.from_preprocessor(str(tmp_path)) == expected
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**config, "image_std": [0.5, 0.5, 0.5]}))
    assert PixelSettings.from_preprocessor(tmp_path).std == (0.5, 0.5, 0.5)
    assert PixelSettings.from_preprocessor(tmp_path / "processor_config.json") == expected


def test_a_preprocessor_without_mean_and_std_or_with_another_scale_raises():
    for config in ({}, {"image_mean": MEAN}, {"size": 336}, 5):
        refuses("no image_mean and image_std", PixelSettings.from_preprocessor, config)
    for changes in ({"rescale_factor": 1 / 127.5}, {"do_rescale": False}):
        refuses("not by 1/255", PixelSettings.from_preprocessor, {"image_mean": MEAN, "image_std": STD, **changes})


def test_settings_from_timm():
    config = {"mean": MEAN, "std": STD, "input_size": (3, 224, 224)}
    for source in (
        config,
        {"architecture": "vit", "pretrained_cfg": config},
        SimpleNamespace(pretrained_cfg=config),
        SimpleNamespace(pretrained_cfg=SimpleNamespace(mean=MEAN, std=STD)),
    ):
        assert PixelSettings.from_timm(source) == PixelSettings(MEAN, STD)
    for bad in ({}, {"mean": MEAN}, SimpleNamespace()):
        refuses("no mean and std", PixelSettings.from_timm, bad)


@pytest.mark.parametrize("image_hw", [(777, 31), (31, 777), (2000, 60)])
def test_a_crop_of_a_long_image_is_that_of_the_whole_resized_image(image_hw):
    """As the release makes it: enlarged or shrunk whole, then cut, whatever the order of Pillow's passes."""
    pixels = noise(*image_hw)
    cut = plan(image_hw, "clip-center-crop-336")
    (canvas,) = cut.canvases
    height, width = canvas.content_hw
    assert height * width > 16 * 336 * 336
    whole = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    top, left = (-start for start in canvas.offset)
    (view,) = render(pixels, cut)
    assert np.array_equal(view, np.asarray(whole)[top : top + 336, left : left + 336])
