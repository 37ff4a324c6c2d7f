"""The family's other compressors, a ViT that compresses inside, and loaded releases: attached, saved and loaded."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import uhd
from tests.hf.tiny import IMAGES, TEXTS, WIDTH, attach, language_model
from tests.pretrained import released
from tests.tiny import PIXELS, noise, stirred
from uhd.hf import UHDForConditionalGeneration, UHDVisionConfig
from uhd.resampler import (
    MergeProjector,
    MLPProjector,
    PixelShuffleProjector,
    PyramidConfig,
    PyramidResampler,
    RewriteConfig,
    RewriteResampler,
    SpatialConfig,
    SpatialResampler,
)
from uhd.vision import CompressedViT, CompressedViTConfig, ViT, ViTConfig

SIZES = {"width": WIDTH, "vision_width": 32, "num_heads": 2, "num_latents": 4}
COMPRESSORS = {
    "spatial": lambda: SpatialResampler(SpatialConfig(**SIZES, aligned=False)),
    "rewrite": lambda: RewriteResampler(RewriteConfig(**SIZES, table_side=4, separators=True)),
    "pyramid": lambda: PyramidResampler(PyramidConfig(**SIZES, levels=(1, 2), upsample=True)),
    "merge": lambda: MergeProjector(32, WIDTH),
    "mlp": lambda: MLPProjector(32, WIDTH, bias=False, activation="gelu_tanh"),
    "pixel_shuffle": lambda: PixelShuffleProjector(32, WIDTH, factor=2),
}
VIT = {"image_size": 56, "patch_size": 14, "width": 32, "depth": 2, "heads": 2, "mlp_width": 64}
VIT |= {"position_grid_hw": (4, 4)}


def eyes(kind, compressor, after):
    torch.manual_seed(1)
    vision = ViT(ViTConfig(**VIT))
    if after:
        vision = CompressedViT(CompressedViTConfig(**VIT, compress_after=after, compressor=kind))
    part = COMPRESSORS[compressor]()
    merge = 2 ** (len(after) + getattr(part, "rounds", 0)) * getattr(part, "factor", 1)
    slicing = uhd.SlicingConfig.preset("llava-uhd", image_size=56, tokens_per_view=None, merge=merge)
    return stirred(uhd.VisualEncoder(vision, part, slicing=slicing, pixels=PIXELS), 0.1)


def attached(encoder):
    lm = language_model("llama", max_position_embeddings=2048)
    return attach(encoder, lm)


def assert_same(found, again, texts, images):
    assert again.state_dict().keys() == found.state_dict().keys()
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in found.state_dict().items())
    batch = found.processor(text=texts, images=images)
    with torch.no_grad():
        logits = found(**batch).logits
        assert torch.equal(again(**again.processor(text=texts, images=images)).logits, logits)
    assert torch.isfinite(logits).all()


PAIRS = [("window", name, ()) for name in COMPRESSORS]
PAIRS += [("window", "merge", (1,)), ("average", "spatial", (2,)), ("adaptive", "mlp", (1, 2))]


@pytest.mark.parametrize("kind, compressor, after", PAIRS)
def test_attached_saved_and_loaded(kind, compressor, after, tmp_path):
    encoder = eyes(kind, compressor, after)
    found = attached(encoder)
    encoder.note = "untrained"
    found.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(again.visual.vision) is type(encoder.vision)
    assert again.visual.vision.config == encoder.vision.config
    assert again.config.resampler_config.kind == compressor
    assert type(again.visual.compressor) is type(encoder.compressor)
    assert (again.visual.slicing, again.visual.note) == (encoder.slicing, "untrained")
    assert_same(found, again, TEXTS, IMAGES)


@pytest.mark.parametrize("kind, compressor, after", PAIRS)
def test_a_model_of_its_config_alone_is_initialised(kind, compressor, after):
    """New weights, none of them left as the memory had it."""
    config = attached(eyes(kind, compressor, after)).config
    model = UHDForConditionalGeneration(config).eval()
    for name, tensor in model.visual.state_dict().items():
        assert torch.isfinite(tensor).all(), name
        assert tensor.abs().max() < 10, name
    assert (model.visual.vision.blocks[0].attn.qkv.weight.std() - 0.02).abs() < 0.005
    if hasattr(model.visual.compressor, "query"):
        assert (model.visual.compressor.query.std() / model.visual.compressor.query.shape[-1] ** -0.5) < 1.5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compressor", ["spatial", "rewrite", "pyramid"])
def test_a_compressor_that_was_not_saved_starts_as_a_new_one(compressor, tmp_path):
    """Not as the memory had it: its latents are no layer's, so transformers does not know how they start."""
    found = attached(eyes("window", compressor, ()))
    found.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    prefix = "visual.compressor."
    kept = {name: x for name, x in tensors.items() if not name.startswith(prefix)}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).visual.compressor
    fresh = COMPRESSORS[compressor]()
    for name, tensor in again.state_dict().items():
        expected = fresh.state_dict()[name]
        assert torch.isfinite(tensor).all(), name
        assert 0.7 * expected.std() - 1e-6 <= tensor.std() <= 1.4 * expected.std() + 1e-6 or tensor.numel() < 300, name
    latents = "query_1" if compressor == "pyramid" else "query"
    assert again.get_parameter(latents).std() > 0.01
    if compressor != "rewrite":
        assert torch.equal(again.pos_embed, fresh.pos_embed)


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_onevision", "minicpmv4_6"])
def test_a_loaded_release_becomes_a_model_of_its_own(kind, tmp_path):
    """From its folder to ours: the same answers without the release's code or files."""
    model, images = released.make(kind)
    encoder = uhd.pretrained.load(released.save(model, images, tmp_path / "release"))
    lm = released.language_model(model)
    found = UHDForConditionalGeneration.from_vision_and_lm(encoder, lm, released.tokenizer(), match_scale=False)
    found.save_pretrained(tmp_path / "ours")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours").eval()
    token = found.config.image_token
    pictures = [noise(*size) for size in released.SIZES[:2]]
    assert_same(found, again, [f"a{token}b", f"c{token}"], pictures)
    again.visual.save_pretrained(tmp_path / "encoder")
    alone = uhd.VisualEncoder.from_pretrained(tmp_path / "encoder")
    with torch.no_grad():
        assert torch.equal(alone(pictures)[1].tokens, encoder(pictures)[1].tokens)


def test_vision_configs_have_every_field():
    for config_class, more in (
        (ViTConfig, {}),
        (CompressedViTConfig, {"compress_after": (1,), "compressor": "average"}),
    ):
        config = config_class(**VIT, **more)
        described = UHDVisionConfig.from_vit(config)
        assert described.to_vit() == config
        assert UHDVisionConfig(**described.to_dict()).to_vit() == config
        assert {field.name for field in dataclasses.fields(config_class)} <= set(vars(UHDVisionConfig()))
    assert UHDVisionConfig().to_vit().num_blocks == 23
    with pytest.raises(ValueError, match="of kind 'custom': only its maker can build it"):
        UHDVisionConfig(kind="custom").to_vit()
