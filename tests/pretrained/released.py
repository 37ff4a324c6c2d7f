"""Small models of transformers with random weights, saved as released, and what their own code makes of images."""

import functools
import importlib
import inspect
import json

import pytest
import torch
import transformers
from tokenizers import AddedToken
from transformers import CLIPVisionConfig, LlamaConfig, Qwen2Config, Qwen3Config, SiglipVisionConfig

import uhd
from tests.hf import tiny
from uhd.batch import SliceBatch
from uhd.checkpoint import Checkpoint
from uhd.vision import patchify

TILE, PATCH, WIDTH = 56, 14, 32
SIZES = [(112, 112), (50, 50), (60, 120), (140, 70), (40, 160), (171, 57), (90, 135), (128, 72), (200, 20)]
"""(height, width): squares, 2:1, 1:2, 4:1, 1:3, 3:2, 9:16 and 1:10."""

VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": TILE,
    "patch_size": PATCH,
}
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "eos_token_id": 319,
    "pad_token_id": 318,
}
NEXT_POINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
ONEVISION_POINTS = [[56 * rows, 56 * cols] for rows in range(1, 5) for cols in range(1, 5)]
EXTRA = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}


@functools.cache
def tokenizer():
    """Bytes, and the tokens that MiniCPM-V 4.6 has."""
    core = tiny.tokenizer().backend_tokenizer
    names = {"pad_token": "<pad>", "eos_token": "</s>"}
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens=EXTRA, **names)
    found.add_tokens([AddedToken(token, special=True, normalized=False) for token in EXTRA.values()])
    return found


def randomise(model):
    """No parameter of the visual side at a special value; the language model's logits far apart."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" not in name and "lm_head" not in name:
                parameter.normal_(std=0.2)
    return model.eval()


LLAVA = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}
"""Kinds of transformers' LLaVA, and what the names of their classes begin with."""


def make(kind, **changes):
    """(model, image processor on Pillow) of a kind, with changed settings of the model."""
    torch.manual_seed(0)
    if kind not in LLAVA:
        return make_4_6(**changes)
    square = {"height": TILE, "width": TILE}
    points = {"llava_next": NEXT_POINTS, "llava_onevision": ONEVISION_POINTS}
    points = {"image_grid_pinpoints": points[kind]} if kind in points else {}
    settings = {"size": {"shortest_edge": TILE}, "crop_size": square, **points}
    parts = {"vision_config": CLIPVisionConfig(**VISION), "text_config": LlamaConfig(**TEXT)}
    if kind == "llava_onevision":
        settings = {"size": square, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.5], **points}
        parts = {
            "vision_config": SiglipVisionConfig(**VISION, vision_use_head=False),
            "text_config": Qwen2Config(**TEXT),
        }
        parts |= {"vision_aspect_ratio": "anyres_max_3", "video_token_index": 311}
    config = getattr(transformers, f"{LLAVA[kind]}Config")(**{**parts, "image_token_index": 310, **points, **changes})
    model = getattr(transformers, f"{LLAVA[kind]}ForConditionalGeneration")(config)
    return randomise(model), processor(kind, LLAVA[kind], **settings)


def make_4_6(**changes):
    from transformers.models.minicpmv4_6 import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration

    names = {name.replace("token", "token_id"): tokenizer().convert_tokens_to_ids(EXTRA[name]) for name in EXTRA}
    parts = {"text_config": Qwen3Config(**TEXT, head_dim=12).to_dict(), "insert_layer_id": 1, "patch_size": 4}
    parts |= {"vision_config": {**VISION, "patch_size": 4, "image_size": 24}}
    parts |= {name: names[name] for name in ("image_token_id", "video_token_id")}
    config = MiniCPMV4_6Config(**{**parts, **changes})
    settings = {
        "scale_resolution": 64,
        "patch_size": 4,
        "max_slice_nums": 9,
        "downsample_mode": config.downsample_mode,
    }
    return randomise(MiniCPMV4_6ForConditionalGeneration(config)), processor("minicpmv4_6", "MiniCPMV4_6", **settings)


def make_full(kind):
    """The released geometry (sides of views, patches, grids, bounds, buckets) around a narrow model."""
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind not in LLAVA:
        vision = {**small, "image_size": 980, "patch_size": 14}
        model = make(kind, vision_config=vision, insert_layer_id=0, patch_size=14)[0]
        return model, processor("minicpmv4_6", "MiniCPMV4_6")
    side = 384 if kind == "llava_onevision" else 336
    vision = {**small, "image_size": side, "patch_size": 14}
    changes = {"vision_config": CLIPVisionConfig(**vision)}
    settings = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    if kind == "llava_onevision":
        changes = {"vision_config": SiglipVisionConfig(**vision, vision_use_head=False)}
        changes["vision_aspect_ratio"] = "anyres_max_9"
        settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if kind != "llava":
        points = getattr(transformers, f"{LLAVA[kind]}Config")().image_grid_pinpoints
        changes["image_grid_pinpoints"] = points
    return make(kind, **changes)[0], processor(kind, LLAVA[kind], **settings)


def processor(module, name, *, pillow=True, **settings):
    """A processor's class by its names; on Pillow, or on torchvision."""
    found = importlib.import_module(f"transformers.models.{module}.image_processing_{'pil_' * pillow}{module}")
    return getattr(found, f"{name}ImageProcessor{'Pil' * pillow}")(**settings)


def save(model, images, folder):
    model.save_pretrained(folder)
    images.save_pretrained(folder)
    return folder


def change_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(folder, match, error=ValueError, **how):
    """The error of a folder that cannot be loaded."""
    with pytest.raises(error, match=match) as told:
        uhd.pretrained.load(folder, **how)
    return str(told.value)


def assert_same(module, other):
    """The same tensors under the same names."""
    found, expected = module.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


def assert_equal_files(folder, other):
    """The same tensors, and the same settings."""
    first, second = (dict(part.read(part.files)) for part in (Checkpoint(folder), Checkpoint(other)))
    assert first.keys() == second.keys()
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    assert json.loads((folder / "config.json").read_text()) == json.loads((other / "config.json").read_text())


def batch_of(views, plans):
    """(V, 3, h, w) of equal sizes, or a list of V, to a planned batch of ours."""
    side = plans[0].patch_size
    return SliceBatch.from_patches(torch.cat([patchify(view[None], side) for view in views]), plans)


def features(model, images, pixels, **how):
    """What the model makes of a processor's output: its tokens of every image."""
    with torch.no_grad():
        if "target_sizes" in pixels:
            views = view_by_view(model.model.get_image_features, pixels.pixel_values, pixels.target_sizes, **how)
            counts = pixels.num_patches_per_image
            return [torch.cat(part) for part in split_list(views, counts)]
        sizes = {"image_sizes": pixels.image_sizes} if "image_sizes" in pixels else {}
        return list(model.model.get_image_features(pixel_values=pixels.pixel_values, **sizes, **how).pooler_output)


def view_by_view(encode, strip, sizes, **how):
    """MiniCPM's features of every view of a strip, one by one: some releases pack views of one shape only."""
    widths = (sizes.prod(1) * strip.shape[2]).tolist()  # of square patches, one after another
    views = zip(strip.split(widths, dim=3), sizes, strict=True)
    return [encode(view, size[None], **how).pooler_output[0] for view, size in views]


def skip_unless_packed(model):
    """Where MiniCPM's whole forward is asked, with views of several shapes in one call."""
    try:
        model.model.get_image_features(torch.zeros(1, 3, 4, 4 * 48), torch.tensor([[4, 4], [4, 8]]))
    except RuntimeError:
        pytest.skip("the MiniCPM-V 4.6 of this transformers takes views of one shape only")


def skip_unless_sized_for(mode):
    """Where the sizes that MiniCPM's processor chooses are compared."""
    module = importlib.import_module("transformers.models.minicpmv4_6.image_processing_minicpmv4_6")
    known = inspect.signature(module.MiniCPMV4_6ImageProcessor.find_best_resize).parameters
    if mode == "4x" and "downsample_mode" not in known:
        pytest.skip("the MiniCPM-V 4.6 processor of this transformers sizes views for 16x, whatever the mode")


def split_list(items, counts):
    rest = iter(items)
    return [[next(rest) for _ in range(count)] for count in counts]


def our_views(pixels, plans, patch):
    """The processor's pixels as our batch: the views of every image, without those that pad the batch."""
    if "target_sizes" in pixels:
        strip = pixels.pixel_values[0]  # (3, p, all patches * p), patch after patch
        patches = strip.unflatten(2, (-1, patch)).permute(2, 0, 1, 3).flatten(1)
        return SliceBatch.from_patches(patches, plans)
    values = pixels.pixel_values
    if values.ndim == 4:
        return batch_of(values, plans)
    views = [view for image, plan in zip(values, plans, strict=True) for view in image[: plan.num_views]]
    return batch_of(views, plans)


def language_model(model):
    """The causal language model inside, as a model of its own."""
    lm = transformers.AutoModelForCausalLM.from_config(model.config.text_config).eval()
    lm.model.load_state_dict(model.model.language_model.state_dict())
    lm.lm_head.load_state_dict(model.lm_head.state_dict())
    return lm
