"""The installed transformers' processors as oracles: the same views pixel by pixel, filters and padding included."""

import importlib

import numpy as np
import pytest
from einops import rearrange
from PIL import Image

from uhd.pixels import render
from uhd.slicing import find, plan

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SIZES = [(120, 200), (500, 310), (700, 1300), (1800, 300), (20, 180)]
NEXT = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def square(side):
    return {"height": side, "width": side}


def class_of(model, cls, *, pillow=False):
    """A processor's class by its model; on Pillow, or on torchvision."""
    name = f"transformers.models.{model}.image_processing_{'pil_' * pillow}{model}"
    try:
        return getattr(importlib.import_module(name), cls + "Pil" * pillow)
    except ModuleNotFoundError:
        pytest.skip(f"this transformers has no {name}")


SWITCHES = {"pillow": False, "normalize": False}


def process(model, cls, images, **settings):
    """What the processor returns for uint8 pixels; neither rescaled nor normalised unless the switch says so."""
    pillow, normalize = SWITCHES["pillow"], SWITCHES["normalize"]
    processor = class_of(model, cls, pillow=pillow)(do_normalize=normalize, do_rescale=normalize, **settings)
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


def simple(model, cls, key="pixel_values", **settings):
    return lambda image: channels_last(process(model, cls, image, **settings)[key])


def several_images(image):
    found = process("llava_onevision", "LlavaOnevisionImageProcessor", [[image, image]], image_mean=[0.5] * 3)
    return channels_last(found.pixel_values)[:1]


def tiles_before_overview(model, cls):
    def views(image):
        found = process(model, cls, image)
        local = [view for tile in found.get("pixel_values_local", []) for view in channels_last(tile)]
        return local + channels_last(found["pixel_values"])

    return views


def phi4(image):
    found = process("phi4_multimodal", "Phi4MultimodalImageProcessor", image)
    overview, *slices = channels_last(found.image_pixel_values)
    return [*slices, overview]


MERGED = "(r c a b) (k t y x) -> (r a y) (c b x) k t"
ROWS = "(r c) (k t y x) -> (r y) (c x) k t"
FRAMES_FIRST = "(r c) (t k y x) -> (r y) (c x) k t"
LAST = "(r c) (y x k t) -> (r y) (c x) k t"


def patched(name, model, cls, order, *, merge=1, **settings):
    """Views from packed patches, (n, ...) or (V, n, ...) padded; the first frame where the image is repeated."""

    def views(image):
        planned = plan((image.height, image.width), name)
        patches = torch.as_tensor(process(model, cls, image, **settings).pixel_values).float().numpy()
        parts = patches if len(planned.views) > 1 or patches.shape[0] == 1 else patches[None]
        result = []
        for view, part in zip(planned.views, parts, strict=True):
            rows, cols = view.patches_hw
            axes = {"y": planned.patch_size, "k": 3, "x": planned.patch_size, "r": rows // merge, "c": cols // merge}
            axes |= {"a": merge, "b": merge} if order == MERGED else {}
            result.append(rearrange(part[: rows * cols].reshape(rows * cols, -1), order, **axes)[..., 0])
        return result

    return views


def molmo2(image):
    patches = process("molmo2", "Molmo2ImageProcessor", image).pixel_values.float().numpy()
    return list(patches.reshape(-1, 27, 27, 14, 14, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 378, 378, 3))


def kimi(image):
    found = process("kimi_k25", "Kimi_K25ImageProcessor", image)
    _, rows, cols = found.image_grid_thw[0].tolist()
    patches = found.pixel_values.float().numpy().reshape(rows, cols, 3, 14, 14)
    return [patches.transpose(0, 3, 1, 4, 2).reshape(rows * 14, cols * 14, 3)]


def mllama(image):
    found = process("mllama", "MllamaImageProcessor", image, size=square(560), max_image_tiles=4)
    return channels_last(found.pixel_values)[: int(found.num_tiles[0][0])]


ORACLES = {
    "siglip": simple("siglip", "SiglipImageProcessor", size=square(384)),
    "clip": simple("clip", "CLIPImageProcessor", size={"shortest_edge": 336}, crop_size=square(336)),
    "llava-1.5": simple(
        "llava", "LlavaImageProcessor", size={"shortest_edge": 336}, crop_size=square(336), do_pad=True
    ),
    "llava-next": simple(
        "llava_next",
        "LlavaNextImageProcessor",
        size={"shortest_edge": 336},
        crop_size=square(336),
        image_grid_pinpoints=NEXT,
    ),
    "llava-onevision": simple("llava_onevision", "LlavaOnevisionImageProcessor"),
    "llava-onevision-multi-image": several_images,
    "internvl": simple("got_ocr2", "GotOcr2ImageProcessor", size=square(448), crop_to_patches=True, max_patches=12),
    "cohere2": simple(
        "cohere2_vision", "Cohere2VisionImageProcessor", size=square(512), crop_to_patches=True, max_patches=12
    ),
    "llama4": simple("llama4", "Llama4ImageProcessor"),
    "mllama": mllama,
    "idefics3": simple("idefics3", "Idefics3ImageProcessor"),
    "idefics2": simple("idefics2", "Idefics2ImageProcessor"),
    "idefics2-split": simple("idefics2", "Idefics2ImageProcessor", do_image_splitting=True),
    "phi4": phi4,
    "gemma3-pan-and-scan": simple(
        "gemma3",
        "Gemma3ImageProcessor",
        size=square(896),
        do_pan_and_scan=True,
        pan_and_scan_min_crop_size=256,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
    ),
    "ovis2-448-max9-covering": simple(
        "ovis2", "Ovis2ImageProcessor", size=square(448), crop_to_patches=True, max_patches=9
    ),
    "aria-980": simple("aria", "AriaImageProcessor"),
    "aria-980-split": simple("aria", "AriaImageProcessor", split_image=True),
    "aria-490-split": simple("aria", "AriaImageProcessor", split_image=True, max_image_size=490),
    "molmo2": molmo2,
    "perception-lm": lambda image: channels_last(
        process("perception_lm", "PerceptionLMImageProcessor", image).pixel_values[0]
    ),
    "deepseek-ocr2": tiles_before_overview("deepseek_ocr2", "DeepseekOcr2ImageProcessor"),
    "unlimited-ocr": tiles_before_overview("unlimited_ocr", "UnlimitedOcrImageProcessor"),
    "step3": tiles_before_overview("step3p7", "Step3p7ImageProcessor"),
    "fuyu": simple("fuyu", "FuyuImageProcessor", key="images"),
    "pixtral": simple("pixtral", "PixtralImageProcessor"),
    "kimi": kimi,
    "gemma3": simple("gemma3", "Gemma3ImageProcessor", size=square(896)),
    "smolvlm": simple(
        "smolvlm", "SmolVLMImageProcessor", size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}
    ),
    "qwen2-vl-classdefault": patched("qwen2-vl-classdefault", "qwen2_vl", "Qwen2VLImageProcessor", MERGED, merge=2),
    "glm46v": patched("glm46v", "glm46v", "Glm46VImageProcessor", MERGED, merge=2),
    "ernie-4.5-vl": patched("ernie-4.5-vl", "ernie4_5_vl_moe", "Ernie4_5_VLMoeImageProcessor", MERGED, merge=2),
    "hunyuan-vl": patched("hunyuan-vl", "hunyuan_vl", "HunYuanVLImageProcessor", ROWS),
    "paddleocr-vl": patched("paddleocr-vl", "paddleocr_vl", "PaddleOCRVLImageProcessor", ROWS),
    "minimax-m3-vl": patched("minimax-m3-vl", "minimax_m3_vl", "MiniMaxM3VLImageProcessor", MERGED, merge=2),
    "nemotron": patched("nemotron", "nemotron_h_omni", "NemotronH_Omni_Reasoning_V3ImageProcessor", ROWS),
    "muse": patched("muse", "muse_glimmer", "MuseGlimmerImageProcessor", FRAMES_FIRST),
    "siglip2-naflex": patched("siglip2-naflex", "siglip2", "Siglip2ImageProcessor", LAST),
    "gemma4": patched("gemma4", "gemma4", "Gemma4ImageProcessor", LAST),
    "lfm2-vl": patched("lfm2-vl", "lfm2_vl", "Lfm2VlImageProcessor", LAST),
}


def noise(image_hw):
    """Every filter, and every px of misplacement, gives other views of it."""
    return np.random.default_rng(sum(image_hw)).integers(0, 256, (*image_hw, 3), np.uint8)


def differences(name, image_hw):
    """Of every view: its absolute differences from the processor's, (h, w, 3)."""
    image = noise(image_hw)
    mine = render(image, plan(image_hw, name))
    theirs = ORACLES[name](Image.fromarray(image))
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


PADDED = [
    "llava-1.5",
    "llava-next",
    "llava-onevision",
    "llava-onevision-multi-image",
    "llama4",
    "mllama",
    "phi4",
    "aria-980",
    "aria-490-split",
    "deepseek-ocr2",
    "unlimited-ocr",
    "step3",
    "fuyu",
    "kimi",
]


@pytest.mark.parametrize("name", PADDED)
def test_padding_has_the_colour_of_the_release_after_normalisation(name, monkeypatch):
    """Whether a rule pads with black, gray, white or the mean shows only behind the normalisation."""
    image_hw = (20, 180)
    assert any(canvas.fill is not None for canvas in plan(image_hw, name).canvases)
    monkeypatch.setitem(SWITCHES, "normalize", True)
    for number, off in enumerate(differences(name, image_hw)):
        assert np.median(off) < 1.2, number  # more than half of each padded view is padding; bfloat16 in Llama-4
        assert off.mean() < 2, number


FILTERS = {
    "siglip": ("siglip", "SiglipImageProcessor"),
    "blip2": ("blip", "BlipImageProcessor"),
    "gemma3": ("gemma3", "Gemma3ImageProcessor"),
    "gemma3-pan-and-scan": ("gemma3", "Gemma3ImageProcessor"),
    "clip": ("clip", "CLIPImageProcessor"),
    "llava-1.5": ("llava", "LlavaImageProcessor"),
    "llava-next": ("llava_next", "LlavaNextImageProcessor"),
    "llava-onevision": ("llava_onevision", "LlavaOnevisionImageProcessor"),
    "internvl": ("got_ocr2", "GotOcr2ImageProcessor"),
    "cohere2": ("cohere2_vision", "Cohere2VisionImageProcessor"),
    "llama4": ("llama4", "Llama4ImageProcessor"),
    "mllama": ("mllama", "MllamaImageProcessor"),
    "idefics2": ("idefics2", "Idefics2ImageProcessor"),
    "idefics3": ("idefics3", "Idefics3ImageProcessor"),
    "smolvlm": ("smolvlm", "SmolVLMImageProcessor"),
    "ovis2": ("ovis2", "Ovis2ImageProcessor"),
    "aria": ("aria", "AriaImageProcessor"),
    "molmo2": ("molmo2", "Molmo2ImageProcessor"),
    "perception-lm": ("perception_lm", "PerceptionLMImageProcessor"),
    "deepseek-ocr2": ("deepseek_ocr2", "DeepseekOcr2ImageProcessor"),
    "unlimited-ocr": ("unlimited_ocr", "UnlimitedOcrImageProcessor"),
    "step3": ("step3p7", "Step3p7ImageProcessor"),
    "lfm2-vl": ("lfm2_vl", "Lfm2VlImageProcessor"),
    "fuyu": ("fuyu", "FuyuImageProcessor"),
    "pixtral": ("pixtral", "PixtralImageProcessor"),
    "kimi": ("kimi_k25", "Kimi_K25ImageProcessor"),
    "qwen2-vl": ("qwen2_vl", "Qwen2VLImageProcessor"),
    "glm46v": ("glm46v", "Glm46VImageProcessor"),
    "paddleocr-vl": ("paddleocr_vl", "PaddleOCRVLImageProcessor"),
    "hunyuan-vl": ("hunyuan_vl", "HunYuanVLImageProcessor"),
    "minimax-m3-vl": ("minimax_m3_vl", "MiniMaxM3VLImageProcessor"),
    "ernie-4.5-vl": ("ernie4_5_vl_moe", "Ernie4_5_VLMoeImageProcessor"),
    "siglip2-naflex": ("siglip2", "Siglip2ImageProcessor"),
    "gemma4": ("gemma4", "Gemma4ImageProcessor"),
    "nemotron": ("nemotron_h_omni", "NemotronH_Omni_Reasoning_V3ImageProcessor"),
    "muse": ("muse_glimmer", "MuseGlimmerImageProcessor"),
}


@pytest.mark.parametrize("name", FILTERS)
def test_every_rule_has_the_filter_of_its_processor(name):
    model, cls = FILTERS[name]
    wanted = Image.Resampling(int(class_of(model, cls).resample)).name.lower()
    assert find(name).resample == wanted == plan((300, 500), name).resample
