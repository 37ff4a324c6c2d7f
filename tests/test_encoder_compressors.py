"""A VisualEncoder with each compressor of the family: planned, encoded, saved, loaded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import uhd
from tests.tiny import noise, stirred
from uhd.pixels import PixelSettings
from uhd.resampler import (
    MergeProjector,
    PyramidConfig,
    PyramidResampler,
    RewriteConfig,
    RewriteResampler,
    SpatialConfig,
    SpatialResampler,
)
from uhd.vision import ViT, ViTConfig, compress_vit

PIXELS = PixelSettings(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
SIZES = {"width": 16, "vision_width": 24, "num_heads": 2, "num_latents": 9}
LATENTS = {
    "spatial": lambda: SpatialResampler(SpatialConfig(**SIZES)),
    "spatial, as released": lambda: SpatialResampler(SpatialConfig(**SIZES, aligned=False)),
    "rewrite": lambda: RewriteResampler(RewriteConfig(**SIZES, table_side=5, separators=True)),
    "pyramid": lambda: PyramidResampler(PyramidConfig(**SIZES, upsample=True)),
}
IMAGES = [noise(60, 150), noise(40, 30, 1), noise(200, 90, 2)]


def vit() -> ViT:
    return ViT(
        ViTConfig(patch_size=7, width=24, depth=3, heads=2, mlp_width=24, image_size=56, position_grid_hw=(8, 8))
    )


def check(encoder: uhd.VisualEncoder, folder) -> None:
    encoder.save_pretrained(folder)
    again = uhd.VisualEncoder.from_pretrained(folder)
    assert type(again.vision) is type(encoder.vision)
    assert type(again.compressor) is type(encoder.compressor)
    assert (again.slicing, again.vision.config) == (encoder.slicing, encoder.vision.config)
    with torch.no_grad():
        together = encoder(IMAGES)
        for image, ours, theirs in zip(IMAGES, together, again(IMAGES), strict=True):
            assert ours.plan == theirs.plan
            assert torch.equal(ours.tokens, theirs.tokens)
            assert ours.tokens.shape == (ours.plan.num_visual_tokens, 16)
            torch.testing.assert_close(encoder([image])[0].tokens, ours.tokens, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LATENTS)
def test_resamplers(name, tmp_path):
    encoder = stirred(uhd.VisualEncoder(vit(), LATENTS[name](), pixels=PIXELS))
    assert encoder.slicing.tokens_per_view == 9
    assert {view.patches_hw[0] < view.patches_hw[1] for view in encoder.plan((60, 150)).views} == {True, False}
    check(encoder, tmp_path)


@pytest.mark.parametrize("kind", ["window", "average", "adaptive"])
def test_compression_inside_the_vit(kind, tmp_path):
    slicing = uhd.SlicingConfig.preset("minicpm-v-4.6").for_vision(image_size=56, patch_size=7)
    parts = compress_vit(vit(), 2, compressor=kind), MergeProjector(24, 16)
    encoder = uhd.VisualEncoder(*parts, slicing=slicing, schema="minicpm-v-4.6", pixels=PIXELS)
    encoder = stirred(encoder)
    assert [view.num_tokens * 16 for view in encoder.plan((60, 150)).views] == [
        view.num_patches for view in encoder.plan((60, 150)).views
    ]
    check(encoder, tmp_path)


def test_a_resampler_behind_a_compressed_vit(tmp_path):
    slicing = uhd.SlicingConfig.preset("llava-uhd", merge=2).for_vision(image_size=56, patch_size=7)
    encoder = uhd.VisualEncoder(compress_vit(vit(), 1), LATENTS["spatial"](), slicing=slicing, pixels=PIXELS)
    check(stirred(encoder), tmp_path)


def test_a_plan_that_the_vit_cannot_halve_is_refused_with_advice():
    encoder = uhd.VisualEncoder(compress_vit(vit(), 1), LATENTS["spatial"](), pixels=PIXELS)
    with pytest.raises(ValueError, match="both sides must be multiples of 2: .* plan with merge=2"):
        encoder([np.zeros((35, 49, 3), dtype=np.uint8)])
