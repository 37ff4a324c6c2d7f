"""The installed transformers' processors as oracles: the same views, pixel by pixel, up to the resize filter."""

import importlib

import numpy as np
import pytest
from PIL import Image

from uhd.pixels import render
from uhd.slicing import plan

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SIZES = [(120, 200), (500, 310), (700, 1300), (1800, 300), (20, 180)]
NEXT = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def square(side):
    return {"height": side, "width": side}


def process(model, cls, images, **settings):
    """What the processor returns for uint8 pixels that are neither rescaled nor normalised."""
    module = importlib.import_module(f"transformers.models.{model}.image_processing_{model}")
    processor = getattr(module, cls)(do_normalize=False, do_rescale=False, **settings)
    return processor(images, return_tensors="pt")


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
}


def photo(image_hw):
    """Smooth in both axes and different in every channel, so that filters agree and misplaced pixels do not."""
    rows, cols = (np.linspace(0, 1, length)[:, None] for length in image_hw)
    cols = cols.T
    waves = (np.sin(5 * rows + 1) + 0 * cols, np.sin(5 * cols) + 0 * rows, np.sin(4 * (rows + cols)))
    return (127 + 100 * np.stack(waves, axis=-1)).round().astype(np.uint8)


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("image_hw", SIZES)
def test_views_equal_the_processors(name, image_hw):
    image = photo(image_hw)
    mine = render(image, plan(image_hw, name))
    theirs = ORACLES[name](Image.fromarray(image))
    assert len(mine) == len(theirs)
    for number, (ours, oracle) in enumerate(zip(mine, theirs, strict=True)):
        # views that a batch pads to one size begin at the top left
        assert np.abs(ours - oracle[: ours.shape[0], : ours.shape[1]]).mean() < 1, number
