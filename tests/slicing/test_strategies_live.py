"""The installed transformers' processors as oracles: the same views pixel by pixel, filters and padding included."""

import importlib

import numpy as np
import pytest
from einops import rearrange
from PIL import Image

from tests.tiny import noise
from uhd.pixels import render
from uhd.slicing import find, plan

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SIZES = [(120, 200), (500, 310), (700, 1300), (1800, 300), (20, 180)]
NEXT = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def square(side):
    return {"height": side, "width": side}


def class_of(model, *, pillow=False):
    """A model's image processor; on Pillow, or on torchvision."""
    name = f"transformers.models.{model}.image_processing_{'pil_' * pillow}{model}"
    try:
        found = vars(importlib.import_module(name))
    except ModuleNotFoundError:
        pytest.skip(f"this transformers has no {name}")
    ending = "ImageProcessor" + "Pil" * pillow
    return next(kind for key, kind in found.items() if key.endswith(ending) and kind.__module__ == name)


SWITCHES = {"pillow": False, "normalize": False}


def process(model, images, **settings):
    """What the processor returns for uint8 pixels; neither rescaled nor normalised unless the switch says so."""
    pillow, normalize = SWITCHES["pillow"], SWITCHES["normalize"]
    processor = class_of(model, pillow=pillow)(do_normalize=normalize, do_rescale=normalize, **settings)
    found = processor(images, return_tensors="pt")
    if not normalize:
        return found
    mean, std = (np.broadcast_to(values, 3) for values in (processor.image_mean, processor.image_std))
    for key, value in found.items():
        if torch.is_tensor(value) and value.ndim >= 4 and value.shape[-3] == 3:  # pictures, (..., 3, h, w)
            center, scale = (torch.tensor(part.copy(), dtype=torch.float32)[:, None, None] for part in (mean, std))
            found[key] = (value.float() * scale + center) * 255
    return found


def channels_last(pixels):
    """(..., 3, h, w) to a list of (h, w, 3) float arrays."""
    array = torch.as_tensor(pixels).float().numpy()
    return [view.transpose(1, 2, 0) for view in array.reshape(-1, *array.shape[-3:])]


def simple(key="pixel_values", **settings):
    return lambda model, image: channels_last(process(model, image, **settings)[key])


def several_images(model, image):
    return channels_last(process(model, [[image, image]], image_mean=[0.5] * 3).pixel_values)[:1]


def tiles_before_overview(model, image):
    found = process(model, image)
    local = [view for tile in found.get("pixel_values_local", []) for view in channels_last(tile)]
    return local + channels_last(found["pixel_values"])


def phi4(model, image):
    found = process(model, image)
    overview, *slices = channels_last(found.image_pixel_values)
    return [*slices, overview]


MERGED = "(r c a b) (k t y x) -> (r a y) (c b x) k t"
ROWS = "(r c) (k t y x) -> (r y) (c x) k t"
FRAMES_FIRST = "(r c) (t k y x) -> (r y) (c x) k t"
LAST = "(r c) (y x k t) -> (r y) (c x) k t"


def patched(name, order, *, merge=1):
    """Views from packed patches, (n, ...) or (V, n, ...) padded; the first frame where the image is repeated."""

    def views(model, image):
        planned = plan((image.height, image.width), name)
        patches = torch.as_tensor(process(model, image).pixel_values).float().numpy()
        parts = patches if len(planned.views) > 1 or patches.shape[0] == 1 else patches[None]
        result = []
        for view, part in zip(planned.views, parts, strict=True):
            rows, cols = view.patches_hw
            axes = {"y": planned.patch_size, "k": 3, "x": planned.patch_size, "r": rows // merge, "c": cols // merge}
            axes |= {"a": merge, "b": merge} if order == MERGED else {}
            result.append(rearrange(part[: rows * cols].reshape(rows * cols, -1), order, **axes)[..., 0])
        return result

    return views


def mllama(model, image):
    found = process(model, image, size=square(560), max_image_tiles=4)
    return channels_last(found.pixel_values)[: int(found.num_tiles[0][0])]


EDGE_336 = {"size": {"shortest_edge": 336}, "crop_size": square(336)}
PAN_AND_SCAN = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 256, "pan_and_scan_max_num_crops": 4}
PAN_AND_SCAN |= {"pan_and_scan_min_ratio_to_activate": 1.2}
ORACLES = {
    "siglip": ("siglip", simple(size=square(384))),
    "clip": ("clip", simple(**EDGE_336)),
    "llava-1.5": ("llava", simple(**EDGE_336, do_pad=True)),
    "llava-next": ("llava_next", simple(**EDGE_336, image_grid_pinpoints=NEXT)),
    "llava-onevision": ("llava_onevision", simple()),
    "llava-onevision-multi-image": ("llava_onevision", several_images),
    "internvl": ("got_ocr2", simple(size=square(448), crop_to_patches=True, max_patches=12)),
    "cohere2": ("cohere2_vision", simple(size=square(512), crop_to_patches=True, max_patches=12)),
    "llama4": ("llama4", simple()),
    "mllama": ("mllama", mllama),
    "idefics3": ("idefics3", simple()),
    "idefics2": ("idefics2", simple()),
    "idefics2-split": ("idefics2", simple(do_image_splitting=True)),
    "phi4": ("phi4_multimodal", phi4),
    "gemma3-pan-and-scan": ("gemma3", simple(size=square(896), **PAN_AND_SCAN)),
    "ovis2-448-max9-covering": ("ovis2", simple(size=square(448), crop_to_patches=True, max_patches=9)),
    "aria-980": ("aria", simple()),
    "aria-980-split": ("aria", simple(split_image=True)),
    "aria-490-split": ("aria", simple(split_image=True, max_image_size=490)),
    "molmo2": ("molmo2", patched("molmo2", LAST)),
    "perception-lm": ("perception_lm", lambda model, image: channels_last(process(model, image).pixel_values[0])),
    "deepseek-ocr2": ("deepseek_ocr2", tiles_before_overview),
    "unlimited-ocr": ("unlimited_ocr", tiles_before_overview),
    "step3": ("step3p7", tiles_before_overview),
    "fuyu": ("fuyu", simple(key="images")),
    "pixtral": ("pixtral", simple()),
    "kimi": ("kimi_k25", patched("kimi", ROWS)),
    "gemma3": ("gemma3", simple(size=square(896))),
    "smolvlm": ("smolvlm", simple(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512})),
    "qwen2-vl-classdefault": ("qwen2_vl", patched("qwen2-vl-classdefault", MERGED, merge=2)),
    "glm46v": ("glm46v", patched("glm46v", MERGED, merge=2)),
    "ernie-4.5-vl": ("ernie4_5_vl_moe", patched("ernie-4.5-vl", MERGED, merge=2)),
    "hunyuan-vl": ("hunyuan_vl", patched("hunyuan-vl", ROWS)),
    "paddleocr-vl": ("paddleocr_vl", patched("paddleocr-vl", ROWS)),
    "minimax-m3-vl": ("minimax_m3_vl", patched("minimax-m3-vl", MERGED, merge=2)),
    "nemotron": ("nemotron_h_omni", patched("nemotron", ROWS)),
    "muse": ("muse_glimmer", patched("muse", FRAMES_FIRST)),
    "siglip2-naflex": ("siglip2", patched("siglip2-naflex", LAST)),
    "gemma4": ("gemma4", patched("gemma4", LAST)),
    "lfm2-vl": ("lfm2_vl", patched("lfm2-vl", LAST)),
}


def differences(name, image_hw):
    """Of every view: its absolute differences from the processor's, (h, w, 3)."""
    image = noise(*image_hw)
    mine = render(image, plan(image_hw, name))
    model, views = ORACLES[name]
    theirs = views(model, Image.fromarray(image))
    assert len(mine) == len(theirs)
    # views that a batch pads to one size begin at the top left; bicubic overshoot that floats keep is clipped
    return [np.abs(a - b[: a.shape[0], : a.shape[1]].clip(0, 255)) for a, b in zip(mine, theirs, strict=True)]


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("image_hw", SIZES)
def test_views_equal_the_processors(name, image_hw):
    """Up to rounding, and the order of two passes, of PyTorch's kernels; any other filter is tens of levels off."""
    if plan(image_hw, name).resample == "lanczos":
        try:
            torch.nn.functional.interpolate(torch.zeros(1, 3, 4, 4), (2, 2), mode="lanczos", antialias=True)
        except (NotImplementedError, ValueError):
            pytest.skip("this PyTorch has no lanczos, so its processors take another filter")
    for number, off in enumerate(differences(name, image_hw)):
        assert off.mean() < 1, number


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("image_hw", SIZES[:3])
def test_views_equal_the_processors_on_pillow_exactly(name, image_hw, monkeypatch):
    monkeypatch.setitem(SWITCHES, "pillow", True)
    for number, off in enumerate(differences(name, image_hw)):
        assert off.max() == 0, number


PADDED = ["llava-1.5", "llava-next", "llava-onevision", "llava-onevision-multi-image", "llama4", "mllama", "phi4"]
PADDED += ["aria-980", "aria-490-split", "deepseek-ocr2", "unlimited-ocr", "step3", "fuyu", "kimi"]


@pytest.mark.parametrize("name", PADDED)
def test_padding_has_the_colour_of_the_release_after_normalisation(name, monkeypatch):
    """Whether a rule pads with black, gray, white or the mean shows only behind the normalisation."""
    image_hw = (20, 180)
    assert any(canvas.fill is not None for canvas in plan(image_hw, name).canvases)
    monkeypatch.setitem(SWITCHES, "normalize", True)
    for number, off in enumerate(differences(name, image_hw)):
        assert np.median(off) < 1.2, number  # more than half of each padded view is padding; bfloat16 in Llama-4
        assert off.mean() < 2, number


MODELS = {name: model for name, (model, _) in ORACLES.items() if name != "phi4"}  # it has two filters
MODELS |= {"blip2": "blip", "ovis2": "ovis2", "aria": "aria", "qwen2-vl": "qwen2_vl"}


@pytest.mark.parametrize("name", MODELS)
def test_every_rule_has_the_filter_of_its_processor(name):
    wanted = Image.Resampling(int(class_of(MODELS[name]).resample)).name.lower()
    assert find(name).resample == wanted == plan((300, 500), name).resample
