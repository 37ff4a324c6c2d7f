"""The fast backend keeps within two levels of Pillow; the patch embedding takes its patches as they are."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

import uhd
from tests.files import png_chunk
from tests.tiny import encoded, exif, refuses
from uhd.batch import SliceBatch
from uhd.pixels import PixelSettings, fast, fold_into, load_image, patchify, render, unpatchify
from uhd.pixels.fast import Picture
from uhd.pixels.normalize import fold_pixels, normalize
from uhd.pixels.views import load_picture
from uhd.resampler import PerceiverConfig, PerceiverResampler
from uhd.slicing import plan
from uhd.slicing.plan import Box, Canvas, SlicePlan
from uhd.vision import ViT, ViTConfig

FAST = PixelSettings(backend="fast")
COATED = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
# stretched, letterboxed, cropped, resized twice, overlapping, by three filters, with and without antialiasing
RULES = ["llava-uhd", "minicpm-v-4.6", "llava-1.5", "clip", "idefics3", "gemma3-pan-and-scan", "molmo2", "muse"]
RULES += ["monkey", "phi-4-multimodal", "openai-high-detail-overlap", "ovis2", "fuyu"]


def jpeg(pixels: np.ndarray, **options) -> bytes:
    return encoded(pixels, "JPEG", **{"quality": 90, **options})


def farthest(source, planned: SlicePlan, **changes) -> int:
    """Levels between the backends, at the worst pixel of all views."""
    exact = render(source, planned, settings=PixelSettings(**changes))
    found = render(source, planned, settings=PixelSettings(backend="fast", **changes))
    assert [view.shape for view in found] == [view.shape for view in exact]
    assert all(view.dtype == np.uint8 and view.flags.writeable for view in found)
    return max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(exact, found, strict=True))


def stripes(size_hw: tuple[int, int], seed: int) -> np.ndarray:
    """Black and white noise: every resize overshoots, and every rounding shows."""
    return np.random.default_rng(seed).integers(0, 2, (*size_hw, 3), dtype=np.uint8) * np.uint8(255)


def one_canvas(image_hw, content_hw, **changes) -> SlicePlan:
    whole = {"size_hw": content_hw, "view_hw": content_hw, "tiles": (Box(0, 0, *content_hw),), "grid": (1, 1)}
    rule = {name: changes.pop(name) for name in ("resample", "antialias") if name in changes}
    canvas = Canvas("overview", content_hw, tokens_per_view=1, **{**whole, **changes})
    return SlicePlan(image_hw, 1, (canvas,), None, 1, 0, "test", **rule)


# --- two levels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("tall", [False, True])
def test_photos_keep_within_two_levels(name, tall):
    photo = skimage.data.chelsea()
    photo = photo.transpose(1, 0, 2)[:, :200] if tall else photo  # tall ones are where Pillow turns its passes around
    assert farthest(jpeg(photo), uhd.strategy(name)(photo.shape[:2])) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(uhd.strategies()))
def test_every_rule_on_every_photo(name):
    refused = 0
    photos = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.rocket(), stripes((900, 400), 0)]
    for photo in photos:
        try:
            planned = uhd.strategy(name)(photo.shape[:2])
        except ValueError:
            refused += 1
            continue
        assert farthest(jpeg(photo), planned) <= 2
    assert refused < len(photos)


EXTREME = [((2000, 3), (10, 300)), ((3, 2000), (300, 10)), ((900, 700), (14, 1000)), ((700, 900), (660, 40))]
EXTREME += [((1, 1), (56, 70))]
sides = st.integers(1, 90)


@given(sides, sides, sides, sides, st.sampled_from(["bicubic", "bilinear", "lanczos"]), st.integers(0, 99))
@settings(max_examples=300)
def test_noise_keeps_within_two_levels(height, width, new_height, new_width, name, seed):
    pixels = stripes((height, width), seed)
    planned = one_canvas((height, width), (new_height, new_width), resample=name)
    assert farthest(Image.fromarray(pixels), planned) <= 2


@pytest.mark.parametrize("name", ["bicubic", "bilinear", "lanczos"])
def test_extreme_shapes_keep_within_two_levels(name):
    for size_hw, new_hw in EXTREME:
        assert farthest(Image.fromarray(stripes(size_hw, 1)), one_canvas(size_hw, new_hw), resample=name) <= 2


WHOLE = {"content_hw": (80, 90), "size_hw": (80, 90)}
CANVASES = {
    "letterbox": {"size_hw": (60, 50), "offset": (7, 5), "fill": (9, 80, 200), "view_hw": (60, 50)},
    "crop": {"size_hw": (20, 30), "offset": (-11, -4), "view_hw": (20, 30)},
    "crop and letterbox": {"size_hw": (50, 20), "offset": (4, -9), "fill": (1, 2, 3), "view_hw": (50, 20)},
    "source": {"source": Box(5, 11, 60, 71)},
    "overlap": {"tiles": (Box(0, 0, 30, 30), Box(10, 9, 40, 39)), "grid": (2, 1), "view_hw": (30, 30)},
    "twice": {"first_hw": (61, 47)},
    "tiles resized": {"tiles": (Box(0, 0, 20, 30), Box(20, 10, 40, 40)), "grid": (2, 1), "view_hw": (33, 27)},
    "another filter for tiles": {"view_hw": (33, 27), "view_filter": ("bilinear", True)},
    "tiles sampled": {"view_hw": (33, 27), "view_filter": ("bicubic", False)},
    "tiles of the image itself": {"tiles": (Box(3, 2, 50, 77),), "view_hw": (22, 31), **WHOLE},
    "sampled": {"antialias": False},
}


@pytest.mark.parametrize("case", CANVASES)
@pytest.mark.parametrize("name", ["bicubic", "lanczos"])
def test_geometry(case, name):
    changes = dict(CANVASES[case])
    content_hw = changes.pop("content_hw", (40, 41))
    if "size_hw" in changes and "tiles" not in changes:
        changes["tiles"] = (Box(0, 0, *changes["size_hw"]),)
    planned = one_canvas((80, 90), content_hw, resample=name, **changes)
    assert farthest(Image.fromarray(stripes((80, 90), 2)), planned) <= 2


def test_what_is_resized_twice_is_pillows(monkeypatch):
    """Errors of two resizes add up, so the second backend must not be asked."""
    monkeypatch.setattr(fast, "_resized", lambda *args: pytest.fail("resized by PyTorch"))
    image = Image.fromarray(stripes((80, 90), 3))
    for case in ("twice", "tiles resized", "another filter for tiles", "sampled"):
        assert farthest(image, one_canvas((80, 90), (40, 41), **CANVASES[case])) == 0


@pytest.mark.parametrize("order", ["fixed", "by shrinkage"])
def test_the_order_of_passes_is_the_installed_pillows(order, monkeypatch):
    """Noise tells the two orders apart, so the probe does; by the filter that every PyTorch has."""
    planned = one_canvas((400, 30), (20, 200), resample="bicubic")
    found = fast._pass_orders("bicubic")
    monkeypatch.setattr(fast, "_pass_orders", lambda name: order)
    assert (farthest(Image.fromarray(stripes((400, 30), 4)), planned) <= 2) == (order == found)


def test_a_filter_that_pytorch_lacks_is_pillows(monkeypatch):
    monkeypatch.setattr(fast, "_pass_orders", lambda name: None)
    assert farthest(Image.fromarray(stripes((80, 90), 5)), one_canvas((80, 90), (40, 41))) == 0


# --- what comes in -------------------------------------------------------------------------------


def loaded(source, **changes) -> np.ndarray:
    picture = load_picture(source, settings=PixelSettings(backend="fast", **changes))
    assert isinstance(picture, Picture)
    assert (picture.height, picture.width) == picture.pixels.shape[:2]
    return picture.pixels


def exactly(source, **changes) -> np.ndarray:
    return np.asarray(load_image(source, settings=PixelSettings(**changes)))


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}])
def test_jpegs_decode_to_pillows_bytes(options, tmp_path):
    data = jpeg(skimage.data.chelsea()[:151, :203], **options)
    (tmp_path / "a.jpg").write_bytes(data)
    for source in (data, tmp_path / "a.jpg", str(tmp_path / "a.jpg"), Image.open(io.BytesIO(data))):
        assert np.array_equal(loaded(source), exactly(data))


@pytest.mark.parametrize("orientation", range(10))
def test_orientation(orientation):
    data = jpeg(skimage.data.chelsea()[:80, :120], exif=exif(orientation))
    assert np.array_equal(loaded(data), exactly(data))
    assert loaded(data).shape == ((120, 80, 3) if orientation in (5, 6, 7, 8) else (80, 120, 3))


def test_modes_and_arrays():
    photo = Image.fromarray(skimage.data.chelsea()[:40, :60])
    alpha = photo.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    deep = Image.fromarray(np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 27)
    array = np.asarray(photo)
    sources = [encoded(photo), encoded(alpha), encoded(deep), deep, photo.quantize(17)]
    sources += [encoded(photo.convert(mode), "JPEG") for mode in ("L", "CMYK")]
    sources += [array, array[:, :, 0], array / 255, torch.tensor(array).permute(2, 0, 1)]
    for source in sources:
        assert np.array_equal(loaded(source), exactly(source))
    blue = {"background": (0, 0, 255)}
    assert np.array_equal(loaded(alpha, **blue), exactly(alpha, **blue))


def test_three_rows_of_a_file_are_not_channels():
    data = jpeg(skimage.data.chelsea()[:3, :50])
    assert farthest(data, plan((3, 50))) <= 2


def test_errors_are_those_of_the_exact_backend():
    data = jpeg(skimage.data.chelsea()[:100, :150])
    broken = [data[:-1], data[:-40], data[: len(data) // 2], data[:30], b"", b"hello", data[:700] + data[900:]]
    for source in [*broken, np.zeros((3, 5, 3), np.uint8), np.full((4, 5, 3), 2.0), 7, "http://a/b.jpg"]:
        messages = []
        for chosen in (PixelSettings(), FAST):
            try:
                load_picture(source, settings=chosen)
            except (ValueError, TypeError) as error:
                messages.append((type(error), str(error)))
        assert len(messages) in (0, 2)
        assert len(set(messages)) <= 1
    refuses("over max_pixels=99", load_picture, data, settings=PixelSettings(backend="fast", max_pixels=99))
    refuses("the plan is for an image of 100x151", render, data, plan((100, 151)), settings=FAST)
    with pytest.raises(FileNotFoundError):
        load_picture("no such file.jpg", settings=FAST)


def test_without_torchvision_pillow_decodes(monkeypatch):
    data = jpeg(skimage.data.chelsea()[:100, :150])
    monkeypatch.setattr(fast, "jpeg_decoder", lambda: None)
    assert np.array_equal(loaded(data), exactly(data))


def some_files() -> dict[str, bytes]:
    """By what is special."""
    photo = Image.fromarray(skimage.data.chelsea()[:40, :61])
    alpha = photo.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    turned = PngInfo()
    turned.add_itxt("XML:com.adobe.xmp", 'tiff:Orientation="6"')
    deep = np.arange(40 * 61 * 3, dtype=np.uint16).reshape(40, 61, 3) * 7
    plain = encoded(photo)
    end = plain.index(b"IDAT") - 4
    gamma = png_chunk(b"gAMA", (20_000).to_bytes(4, "big"))
    return {
        "plain": plain,
        "alpha": encoded(alpha),
        "gamma": plain[:end] + gamma + plain[end:],
        "palette": encoded(photo.quantize(17)),
        "gray": encoded(photo.convert("L")),
        "gray and alpha": encoded(alpha.convert("LA")),
        "deep gray": encoded(Image.fromarray(deep[..., 0])),
        "deep colour": deep_png(deep),
        "one transparent colour": encoded(photo, transparency=(10, 20, 30)),
        "turned": encoded(photo, pnginfo=turned),
        "late": plain[:-12] + png_chunk(b"tEXt", b"Comment\0behind the pixels") + plain[-12:],
        "WebP": encoded(photo, "WEBP"),
        "WebP and alpha": encoded(alpha, "WEBP"),
        "WebP, lossless": encoded(alpha, "WEBP", lossless=True),
        "WebP, turned": encoded(photo, "WEBP", exif=exif(6)),
        "WebP, animated": encoded(photo, "WEBP", save_all=True, append_images=[photo.rotate(180)]),
        "animated": encoded(photo, save_all=True, append_images=[photo.rotate(180)]),
    }


def deep_png(pixels: np.ndarray) -> bytes:
    """(h, w, 3) uint16, which Pillow reads and does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    chunks = {b"IHDR": head, b"IDAT": zlib.compress(rows), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(png_chunk, chunks, chunks.values()))


@pytest.mark.parametrize("kind", some_files())
def test_pngs_and_webps_decode_to_pillows_bytes(kind, monkeypatch):
    data, seen = some_files()[kind], []
    decode = fast.decoder("WEBP" if "WebP" in kind else "PNG")
    if decode:
        monkeypatch.setattr(fast, "decoder", lambda kind: lambda file: seen.append(file) or decode(file))
    assert np.array_equal(loaded(data), exactly(data))
    blue = {"background": (0, 0, 255)}
    assert np.array_equal(loaded(data, **blue), exactly(data, **blue))
    plain = kind in ("plain", "alpha", "gamma", "WebP", "WebP and alpha", "WebP, lossless")
    assert bool(seen) == (plain and decode is not None)
    monkeypatch.setattr(fast, "decoder", lambda kind: None)
    assert np.array_equal(loaded(data), exactly(data))


def test_damaged_pngs_are_refused_in_the_same_words():
    data = encoded(Image.fromarray(skimage.data.chelsea()[:90, :61]))
    start = data.index(b"IDAT") + 4
    pixels, draw = zlib.decompress(data[start : data.index(b"IEND") - 8]), np.random.default_rng(0)
    refused = 0
    for place in draw.integers(0, len(data) - start - 16, 60):
        packed = bytearray(zlib.compress(pixels))
        packed[place % len(packed)] ^= 1 << draw.integers(8)
        wrong = data[: start - 8] + png_chunk(b"IDAT", bytes(packed)) + data[-12:]
        messages = set()
        for chosen in (PixelSettings(), FAST):
            try:
                load_picture(wrong, settings=chosen)
            except ValueError as error:
                messages.add(str(error))
            else:
                messages.add("read")
        assert len(messages) == 1, messages
        refused += messages != {"read"}
    assert refused > 40  # else it reads what has lost its lower rows


def test_settings():
    assert PixelSettings.from_dict(FAST.to_dict()) == FAST
    assert FAST.to_dict()["backend"] == "fast"
    refuses("'pillow' or 'fast'", PixelSettings, backend="quick")
    refuses("needs backend='fast'", PixelSettings, draft=True)


def off_by_draft(data: bytes, planned: SlicePlan) -> float:
    """Levels by which a draft changes the first view, on average."""
    plain, drafted = (PixelSettings(backend="fast", draft=draft) for draft in (False, True))
    return np.abs(
        render(data, planned, settings=plain)[0].astype(int) - render(data, planned, settings=drafted)[0]
    ).mean()


def test_draft_decodes_fewer_pixels_where_one_resize_follows():
    photo = np.asarray(Image.fromarray(skimage.data.chelsea()).resize((1600, 1200), Image.Resampling.BICUBIC))
    assert 0 < off_by_draft(jpeg(photo), one_canvas((1200, 1600), (240, 320))) < 1
    for whole in ({"source": Box(0, 0, 1200, 800)}, {"first_hw": (600, 800)}, {"antialias": False}):
        assert off_by_draft(jpeg(photo), one_canvas((1200, 1600), (240, 320), **whole)) == 0


def test_draft_leaves_sides_that_do_not_divide():
    assert off_by_draft(jpeg(stripes((1200, 1600), 0)), one_canvas((1200, 1600), (240, 320))) > 0
    assert off_by_draft(jpeg(stripes((1201, 1600), 0)), one_canvas((1201, 1600), (240, 320))) == 0


def test_draft_finds_damage_when_it_is_cut():
    data = jpeg(skimage.data.chelsea())
    picture = load_picture(data[:-2000], settings=PixelSettings(backend="fast", draft=True))
    with pytest.raises(ValueError, match="truncated or damaged"):
        render(picture, plan((300, 451)), settings=PixelSettings(backend="fast", draft=True))


# --- patches -------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(0, 5), st.sampled_from(["chw", "hwc"]))
def test_both_orders_fold_and_unfold(rows, cols, p, rest, inner):
    view = stripes((rows * p + min(rest, p - 1), cols * p + min(rest, p - 1)), 0)
    view[: rows * p, : cols * p, 0] = np.arange(cols * p) % 256
    patches = patchify(view, p, inner=inner)
    assert np.array_equal(unpatchify(patches, (rows, cols), p, inner=inner), view[: rows * p, : cols * p])
    assert torch.equal(patchify(torch.from_numpy(view), p, inner=inner), torch.from_numpy(patches))
    out = np.zeros_like(patches)
    fold_into(out, view, p, inner)
    assert np.array_equal(out, patches)


def batches(backend="pillow"):
    photo = skimage.data.chelsea()
    images, plans = [photo, photo[:100, :120]], [plan((300, 451)), plan((100, 120))]
    chosen = PixelSettings(**COATED, backend=backend)
    return [SliceBatch.from_images(images, plans, settings=chosen, inner=inner) for inner in ("chw", "hwc")]


def test_orders_of_a_batch():
    plain, turned = batches()
    assert turned.inner == "hwc"
    assert not torch.equal(plain.patches, turned.patches)
    assert torch.equal(turned.ordered("chw").patches, plain.patches)
    assert torch.equal(plain.ordered("hwc").patches, turned.patches)
    assert plain.ordered("chw") is plain
    assert [part.inner for part in turned.split_images()] == ["hwc", "hwc"]
    mixed = SliceBatch.cat([plain.split_images()[0], turned.split_images()[1]])
    assert mixed.inner == "chw"
    assert torch.equal(mixed.patches, plain.patches)
    assert SliceBatch.cat(turned.split_images()).inner == "hwc"
    assert SliceBatch.from_patches(turned.patches, turned.plans, inner="hwc").ordered("chw").inner == "chw"
    assert turned.to("cpu").inner == "hwc"
    normal = turned.normalized(PixelSettings(**COATED))
    expected = plain.normalized(PixelSettings(**COATED)).patches
    torch.testing.assert_close(normal.ordered("chw").patches, expected, rtol=0, atol=2e-6)
    refuses("inner must be 'chw' or 'hwc'", plain.ordered, "cwh")
    refuses("inner must be 'chw' or 'hwc'", normalize, plain.patches, PixelSettings(**COATED), inner="whc")


def tiny_vit(**changes) -> ViT:
    torch.manual_seed(0)
    table = {"image_size": 336, "position_grid_hw": (24, 24)}
    return ViT(ViTConfig(patch_size=14, width=32, depth=2, heads=2, mlp_width=48, **table, **changes)).eval()


RAW = {"inner": "hwc", "mean_std": (COATED["mean"], COATED["std"])}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inner", ["chw", "hwc"])
def test_raw_patches_give_the_features_and_gradients_of_normalised_ones(bias, inner):
    vit = tiny_vit(patch_bias=bias)
    plain, _ = batches()
    batch = plain.ordered(inner)
    weight = torch.randn(len(batch.patches), 32)
    found, grads = [], []
    for patches, how in (
        (plain.normalized(PixelSettings(**COATED)).patches, {}),
        (batch.patches, {"inner": inner, "mean_std": RAW["mean_std"]}),
        (batch.normalized(PixelSettings(**COATED)).patches, {"inner": inner}),
    ):
        vit.zero_grad()
        features = vit(patches, batch.grids, **how)
        (features * weight).sum().backward()
        found.append(features.detach())
        grads.append([p.grad.clone() for p in vit.stem.parameters()])
    for features, grad in zip(found[1:], grads[1:], strict=True):
        assert (features - found[0]).norm() < 1e-5 * found[0].norm()
        for got, wanted in zip(grad, grads[0], strict=True):
            assert (got - wanted).norm() < 1e-5 * wanted.norm()


def test_the_fold_follows_every_change_of_the_weights():
    vit, (plain, turned) = tiny_vit(), batches()
    normal = plain.normalized(PixelSettings(**COATED)).patches

    @torch.no_grad()
    def agree() -> bool:
        found, wanted = vit(turned.patches, turned.grids, **RAW), vit(normal, plain.grids)
        return bool((found - wanted).norm() < 1e-5 * wanted.norm())

    assert agree()
    vit.stem.weight.data.mul_(3)  # leaves no trace, as merging LoRA weights does
    assert agree()
    with torch.no_grad():
        vit.stem.bias.add_(1)
    assert agree()
    vit.stem.weight = nn.Parameter(torch.randn(32, 588))
    assert agree()
    vit.double()
    normal = normal.double()
    assert agree()


def test_stems_that_must_be_called_are_not_folded():
    _, turned = batches()
    hooked, given = tiny_vit(), ViT(tiny_vit().config, stem=nn.Linear(588, 32))
    hooked.stem.register_forward_hook(lambda module, args, out: out * 2)
    for vit in (hooked, given, tiny_vit(stem_border=2)):
        assert not vit.folds_pixels
        refuses("normalised patches of inner order 'chw' only", vit, turned.patches, turned.grids, **RAW)
    assert tiny_vit().folds_pixels


def test_wrong_dtypes_and_orders_raise():
    vit, (_, turned) = tiny_vit(), batches()
    refuses("must be uint8; got torch.float32", vit, turned.patches.float(), turned.grids, **RAW, error=TypeError)
    refuses("floating point and normalised", vit, turned.patches, turned.grids, inner="hwc", error=TypeError)
    refuses("inner must be 'chw' or 'hwc'", fold_pixels, vit.stem.weight, None, "whc", None)


def test_folding_compiles():
    vit, (_, turned) = tiny_vit(), batches()
    with torch.no_grad():
        compiled = torch.compile(vit, backend="eager", fullgraph=True)
        torch.testing.assert_close(
            compiled(turned.patches, turned.grids, **RAW), vit(turned.patches, turned.grids, **RAW)
        )


# --- the whole way -------------------------------------------------------------------------------


def encoder(vit: ViT, backend: str) -> uhd.VisualEncoder:
    torch.manual_seed(1)
    compressor = PerceiverResampler(PerceiverConfig(width=32, vision_width=32, num_heads=2))
    return uhd.VisualEncoder(vit, compressor, pixels=PixelSettings(**COATED, backend=backend)).eval()


@pytest.mark.parametrize("kind", ["own stem", "given stem", "window stem", "bfloat16"])
def test_the_encoder_sees_the_same(kind):
    vit = tiny_vit(stem_border=2) if kind == "window stem" else tiny_vit()
    vit = ViT(vit.config, stem=nn.Linear(588, 32)) if kind == "given stem" else vit
    exact, quick = encoder(vit, "pillow"), encoder(vit, "fast")
    quick.compressor.load_state_dict(exact.compressor.state_dict())
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    exact, quick = exact.to(dtype), quick.to(dtype)
    data = jpeg(skimage.data.chelsea())
    batch = quick.prepare([data, data])
    assert batch.inner == ("hwc" if kind in ("own stem", "bfloat16") else "chw")
    with torch.no_grad():
        found, wanted = quick(batch), exact([data])[0].tokens
        alone = quick([data])[0].tokens
        turned = quick.encode(batch.ordered("chw"))
    limit = 0.02 if dtype == torch.bfloat16 else 1e-3
    assert (found[0].tokens - wanted).norm() < limit * wanted.norm()
    assert (found[1].tokens - alone).norm() < 0.02 * limit * wanted.norm() + 1e-6
    assert (turned[: len(alone)] - alone).norm() < limit * wanted.norm()


def test_the_backend_is_saved(tmp_path):
    encoder(tiny_vit(), "fast").save_pretrained(tmp_path)
    assert uhd.VisualEncoder.from_pretrained(tmp_path).pixels.backend == "fast"


def test_the_image_processor_takes_the_backend():
    pytest.importorskip("transformers")
    from uhd.hf import UHDImageProcessor

    photo = skimage.data.chelsea()
    chosen = PixelSettings(**COATED, backend="fast")
    quick = UHDImageProcessor.from_settings("llava-uhd-safe", chosen)
    exact = UHDImageProcessor.from_settings("llava-uhd-safe", PixelSettings(**COATED))
    assert quick.to_dict()["pixel_backend"] == "fast"
    raw = {"do_rescale": False, "do_normalize": False}
    found, wanted = quick(photo, **raw)["pixel_values"], exact(photo, **raw)["pixel_values"]
    assert 0 < np.abs(found.numpy().astype(int) - wanted.numpy()).max() <= 2
    again = exact(photo, pixel_backend="fast", **raw)["pixel_values"]
    assert torch.equal(again, found)
