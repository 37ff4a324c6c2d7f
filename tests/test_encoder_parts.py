"""What holds for an encoder of any parts and strategy: counts, batches, gradients, save and load."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import uhd
from tests.resampler.parts import MODULES
from tests.tiny import IMAGES, PIXELS, assert_same_images, noise, perceiver, silent, stirred, tiny_encoder, vit
from uhd.resampler import (
    MergeProjector,
    MLPProjector,
    PerceiverConfig,
    PerceiverResampler,
    PixelShuffleProjector,
    PoolProjector,
    PyramidConfig,
    RewriteConfig,
    SpatialConfig,
    folded,
)
from uhd.slicing import SlicingConfig, find
from uhd.vision import compress_vit

SIZES = {"width": 24, "vision_width": 32, "num_heads": 2, "num_latents": 9}
FAMILY = {
    "spatial": SpatialConfig(**SIZES),
    "spatial, as released": SpatialConfig(**SIZES, aligned=False),
    "rewrite": RewriteConfig(**SIZES, table_side=5, separators=True),
    "pyramid": PyramidConfig(**SIZES, upsample=True),
}


def adaptive(compressor, **settings):
    """Under the adaptive planner, with another release's schema."""
    slicing = SlicingConfig(image_size=56, patch_size=14, max_slices=4, **settings)
    return tiny_encoder(compressor, slicing=slicing, schema="minicpm-v-2.5")


def under(name, compressor=None):
    slicing = find(name).for_vision(image_size=56, patch_size=14)
    return tiny_encoder(compressor or MLPProjector(32, 24), slicing=slicing)


def fine_vit():
    return vit(patch_size=7, depth=3, position_grid_hw=(8, 8))


def compressed(kind):
    """16 patches a token: 4 inside the ViT, 4 behind it."""
    slicing = SlicingConfig.preset("minicpm-v-4.6").for_vision(image_size=56, patch_size=7)
    vision = compress_vit(fine_vit(), 2, compressor=kind)
    return tiny_encoder(MergeProjector(32, 24), vision=vision, slicing=slicing, schema="minicpm-v-4.6")


def behind_a_compressed_vit():
    slicing = SlicingConfig.preset("llava-uhd", merge=2).for_vision(image_size=56, patch_size=7)
    compressor = MODULES[SpatialConfig](FAMILY["spatial"])
    return tiny_encoder(compressor, vision=compress_vit(fine_vit(), 1), slicing=slicing)


ENCODERS = {
    "default": tiny_encoder,
    "deep perceiver": lambda: adaptive(perceiver(num_latents=9, depth=2, ffn_ratio=2)),
    "mlp": lambda: adaptive(MLPProjector(32, 24)),
    "pixel shuffle": lambda: adaptive(PixelShuffleProjector(32, 24, factor=2), merge=2),
    **{name: lambda config=config: tiny_encoder(MODULES[type(config)](config)) for name, config in FAMILY.items()},
    **{f"{kind} in the ViT": lambda kind=kind: compressed(kind) for kind in ("window", "average", "adaptive")},
    "spatial behind a compressed ViT": behind_a_compressed_vit,
    "llava-next": lambda: under("llava-next"),
    "llava-next, perceiver": lambda: under("llava-next", perceiver()),
    "llava-onevision": lambda: under("llava-onevision"),
    "deepseek-vl2": lambda: under("deepseek-vl2", PoolProjector(32, 24, factor=2)),
    "internvl": lambda: under("internvl", PixelShuffleProjector(32, 24, factor=2)),
    "molmo2": lambda: under("molmo2"),
    "ovis2": lambda: under("ovis2", PoolProjector(32, 24, factor=2)),
}


def made(name):
    torch.manual_seed(0)
    return stirred(ENCODERS[name]())


every_encoder = pytest.mark.parametrize("name", ENCODERS)


@every_encoder
@torch.no_grad()
def test_a_batch_equals_its_images_alone(name):
    encoder = made(name)
    batch = encoder.prepare(IMAGES)
    together, prepared, normalized = encoder(IMAGES), encoder(batch), encoder(batch.normalized(PIXELS))
    for place, item in enumerate(together):
        assert item.plan == encoder.plan(IMAGES[place].shape[:2])
        assert item.layout.num_tokens == item.plan.num_tokens
        assert item.tokens.shape == (item.layout.num_visual_tokens, 24)
        torch.testing.assert_close(encoder(IMAGES[place : place + 1])[0].tokens, item.tokens, atol=1e-5, rtol=1e-5)
        assert torch.equal(item.tokens, prepared[place].tokens)
        assert torch.equal(item.tokens, normalized[place].tokens)


@every_encoder
def test_gradients_reach_every_part(name):
    encoder = made(name).train()
    torch.cat([item.tokens for item in encoder(IMAGES)]).square().sum().backward()
    assert [key for key in silent(encoder) if "sep_embeddings" not in key] == []  # held, not used


@every_encoder
def test_save_and_load(name, tmp_path):
    encoder = made(name)
    encoder.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"uhd_encoder.json", "model.safetensors"}
    again = uhd.VisualEncoder.from_pretrained(tmp_path)
    for part in ("vision", "compressor", "packer"):
        assert type(getattr(again, part)) is type(getattr(encoder, part))
    assert again.vision.config == encoder.vision.config
    assert (again.slicing, again.schema, again.pixels) == (encoder.slicing, encoder.schema, encoder.pixels)
    assert again.note == ""
    assert set(again.state_dict()) == set(encoder.state_dict())
    with torch.no_grad():
        assert_same_images(encoder(IMAGES), again(IMAGES))


def test_a_resampler_decides_how_many_tokens_a_view_has():
    encoder = ENCODERS["spatial"]()
    assert encoder.slicing.tokens_per_view == 9
    assert {view.patches_hw[0] < view.patches_hw[1] for view in encoder.plan((60, 150)).views} == {True, False}


def test_compression_inside_and_behind_the_vit_multiply():
    views = ENCODERS["window in the ViT"]().plan((60, 150)).views
    assert [view.num_tokens * 16 for view in views] == [view.num_patches for view in views]


def test_a_plan_that_the_vit_cannot_halve_is_refused_with_advice():
    encoder = tiny_encoder(MODULES[SpatialConfig](FAMILY["spatial"]), vision=compress_vit(fine_vit(), 1))
    with pytest.raises(ValueError, match="both sides must be multiples of 2: .* plan with merge=2"):
        encoder([np.zeros((35, 49, 3), dtype=np.uint8)])


def test_the_way_of_a_resampler_does_not_depend_on_other_views(monkeypatch):
    """Each way rounds otherwise: alone, an image would have other tokens than in a batch."""
    for width in (64, 256, 1024, 4096):
        with torch.device("meta"):
            resampler = PerceiverResampler(PerceiverConfig(width=width, vision_width=256, num_heads=4)).eval()
        monkeypatch.setattr(resampler, "_foldable", lambda features: folded.PATHS)
        paths = {resampler.inference_path(grids) for grids in ([(1, 1)], [(24, 30)], [(24, 30)] * 40)}
        assert len(paths) == 1, width


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_neighbours_change_no_more_than_the_last_bits(dtype):
    """The bound that `VisualEncoder.forward` states, in every dtype, at sizes where a resampler has several ways."""
    compressor = perceiver(width=256, vision_width=128, num_latents=16)
    encoder = tiny_encoder(compressor, vision=vit(width=128, heads=4)).to(dtype)
    images = [*IMAGES, noise(300, 200, 4)]
    together = encoder(images)
    largest = max(item.tokens.abs().max().item() for item in together)
    for image, item in zip(images, together, strict=True):
        off = (encoder([image])[0].tokens - item.tokens).abs().max().item()
        assert off <= 4 * torch.finfo(dtype).eps * largest
