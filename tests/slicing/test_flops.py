"""Formulas of the family's compressors against what they multiply; ViT, perceiver and LM: test_metrics.py."""

from __future__ import annotations

import pytest
import torch

import uhd
from uhd import resampler
from uhd.flop_counter import count_flops
from uhd.slicing.flops import (
    RESAMPLERS,
    VITS,
    MergerShape,
    ResamplerShape,
    ViTShape,
    compressor_flops,
    merge_flops,
    plan_flops,
    resampler_flops,
    vit_flops,
)
from uhd.vision import CompressedViT, CompressedViTConfig

GRIDS = [(8, 12), (16, 4)]
SIZES = {"width": 16, "vision_width": 10, "num_heads": 2, "num_latents": 9}


def counted(module, *inputs) -> int:
    return count_flops(lambda: module.eval()(*inputs))


def features(grid) -> torch.Tensor:
    return torch.randn(grid[0] * grid[1], 10)


@pytest.mark.parametrize("grid", GRIDS)
def test_windows_on_one_level_and_on_several(grid):
    spatial = resampler.SpatialResampler(resampler.SpatialConfig(**SIZES))
    shape = ResamplerShape(9, kind="spatial")
    assert counted(spatial, features(grid), [grid]) == compressor_flops(grid, 10, shape, width=16)
    pyramid = resampler.PyramidResampler(resampler.PyramidConfig(**SIZES, levels=(1, 4), upsample=True))
    shape = ResamplerShape(9, width=16, kind="pyramid", levels=(1, 4))
    assert counted(pyramid, features(grid), [grid]) == compressor_flops(grid, 10, shape, width=7)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_rewrite(grid):
    module = resampler.RewriteResampler(resampler.RewriteConfig(**SIZES))
    patches = grid[0] * grid[1]
    # here positions are projected apart, once for each distinct grid; the formula has them in the keys
    found = counted(module, features(grid), [grid]) - 2 * patches * 16**2
    assert found == resampler_flops(patches, 10, ResamplerShape(9, kind="rewrite"), width=16)


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_merger(grid, rounds):
    found = counted(resampler.MergeProjector(10, 16, rounds=rounds), features(grid), [grid])
    assert found == merge_flops(grid, 10, MergerShape(rounds), width=16)
    assert found == compressor_flops(grid, 10, MergerShape(rounds, width=16), width=7)


@pytest.mark.parametrize("kind", ["window", "average", "adaptive"])
@pytest.mark.parametrize("prefix", [0, 3])
def test_compression_inside_the_vit(kind, prefix):
    sizes = {"depth": 4, "width": 16, "compress_after": (1, 3), "compressor": kind}
    config = CompressedViTConfig(patch_size=2, heads=2, mlp_width=24, num_registers=prefix, **sizes)
    found = counted(CompressedViT(config), torch.randn(160, 12), GRIDS)
    shape = ViTShape(mlp=24, prefix=prefix, **sizes)
    assert found == sum(vit_flops(h * w, shape, patch_size=2) for h, w in GRIDS)
    assert shape.output_hw((8, 12)) == (2, 3)


def test_a_plan_with_each_compressor():
    planned = uhd.plan((1008, 672), uhd.SlicingConfig.preset("minicpm-v-4.6"))
    grids = [view.patches_hw for view in planned.views]
    for name in RESAMPLERS:
        found = plan_flops(planned, vit="siglip-so400m", resampler=name, lm="qwen2.5-7b")
        assert found.compressor == sum(compressor_flops(grid, 1152, name, width=3584) for grid in grids)
    v4 = plan_flops(planned, vit="siglip-so400m-v4", resampler="merge-4", lm="qwen2.5-7b")
    assert v4.encoder == sum(vit_flops(h * w, "siglip-so400m-v4") for h, w in grids)
    assert v4.compressor == sum(merge_flops((h // 2, w // 2), 1152, "merge-4", width=3584) for h, w in grids)
    plain = plan_flops(planned, vit="siglip-so400m", resampler="merge-16", lm="qwen2.5-7b")
    assert v4.encoder < 0.5 * plain.encoder  # the paper saves 55.8 % on its own setting


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="this ViT joins 2 x 2 features, a view has"):
        plan_flops(uhd.plan((1008, 672), "llava-uhd"), vit="siglip-so400m-v4")
    with pytest.raises(ValueError, match=r"this merger joins 4 x 4 features, a view has \(4, 6\)"):
        merge_flops((4, 6), 10, "merge-16", width=7)
    with pytest.raises(ValueError, match=r"kind must be 'perceiver' or 'rewrite', got 'spatial'"):
        resampler_flops(9, 10, "spatial-144", width=16)
    with pytest.raises(ValueError, match="compressor must be 'window', 'adaptive' or 'average', got 'max'"):
        vit_flops(16, ViTShape(2, 8, 8, compress_after=(1,), compressor="max"))
    assert VITS["siglip-so400m-v4"].compress_after == (6,)
