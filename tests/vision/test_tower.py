"""Backbones that are not plain ViTs behind the packed protocol."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import timm
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.tiny import stirred
from uhd.vision import VisionTower, ViT, ViTConfig, patchify, unpatchify


def convnext(**fields) -> nn.Module:
    return timm.create_model("convnext_atto", pretrained=False, depths=(1, 1, 1, 1), dims=(4, 6, 8, 10), **fields)


def features() -> nn.Module:
    return convnext(features_only=True)


def swin_timm() -> nn.Module:
    sizes = {"embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4, "img_size": 32}
    return timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, strict_img_size=False, **sizes)


def swin_hf() -> nn.Module:
    sizes = {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
    return transformers.SwinModel(transformers.SwinConfig(**sizes))


def convnext_hf() -> nn.Module:
    return transformers.ConvNextV2Model(transformers.ConvNextV2Config(depths=[1] * 4, hidden_sizes=[4, 6, 8, 10]))


def backbone_hf() -> nn.Module:
    sizes = {"depths": [1] * 4, "hidden_sizes": [4, 6, 8, 10], "out_features": ["stage2", "stage3"]}
    return transformers.ConvNextV2Backbone(transformers.ConvNextV2Config(**sizes))


def vit_hf() -> nn.Module:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **sizes), add_pooling_layer=False)


# name -> (module, the tower's arguments, the map as (V, h*w, D) of images)
TOWERS = {
    "timm convnext": (convnext, {"patch_size": 32, "out_dim": 10}, lambda m, x: m.forward_features(x).flatten(2).mT),
    "timm features": (features, {"patch_size": 32, "out_dim": 10}, lambda m, x: m(x)[-1].flatten(2).mT),
    "timm third stage": (
        features,
        {"patch_size": 32, "out_dim": 8, "stride": 16, "select": lambda maps: maps[2]},
        lambda m, x: m(x)[2].flatten(2).mT,
    ),
    "timm swin": (
        swin_timm,
        {"patch_size": 16, "out_dim": 16, "stride": 8},
        lambda m, x: m.forward_features(x).flatten(1, 2),
    ),
    "HF swin": (swin_hf, {"patch_size": 16, "out_dim": 16, "stride": 8}, lambda m, x: m(x).last_hidden_state),
    "HF convnext": (
        convnext_hf,
        {"patch_size": 16, "out_dim": 10, "stride": 32, "rounding": "floor"},
        lambda m, x: m(x).last_hidden_state.flatten(2).mT,
    ),
    "HF backbone": (
        backbone_hf,
        {"patch_size": 16, "out_dim": 8, "stride": 16},
        lambda m, x: m(x).feature_maps[-1].flatten(2).mT,
    ),
    "HF ViT": (
        vit_hf,
        {"patch_size": 8, "out_dim": 8, "num_prefix_tokens": 1, "kwargs": {"interpolate_pos_encoding": True}},
        lambda m, x: m(x, interpolate_pos_encoding=True).last_hidden_state[:, 1:],
    ),
}
GRIDS = [(2, 3), (4, 2), (3, 3), (2, 3), (2, 5)]


def make(name: str) -> tuple[VisionTower, nn.Module]:
    torch.manual_seed(0)
    module = stirred(TOWERS[name][0]())
    return VisionTower(module, **TOWERS[name][1]).eval(), module


def random_patches(grids: list[tuple[int, int]], patch_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(h * w, 3 * patch_size**2, generator=generator) for h, w in grids]


@pytest.mark.parametrize("name", TOWERS)
def test_packed_equals_the_backbone_one_view_at_a_time(name: str) -> None:
    tower, module = make(name)
    parts = random_patches(GRIDS, tower.patch_size)
    out_grids = tower.output_grids(GRIDS)
    with torch.no_grad():
        packed = tower(torch.cat(parts), GRIDS)
        single = [
            TOWERS[name][2](module, unpatchify(part, grid, tower.patch_size))[0]
            for part, grid in zip(parts, GRIDS, strict=True)
        ]
    assert [len(view) for view in single] == [h * w for h, w in out_grids]
    assert packed.shape == (sum(h * w for h, w in out_grids), tower.out_dim)
    torch.testing.assert_close(packed, torch.cat(single), rtol=1e-5, atol=1e-5)


@given(order=st.permutations(range(len(GRIDS))))
@settings(max_examples=5)
def test_permuting_views_permutes_the_output(order: list[int]) -> None:
    tower, _ = make("HF swin")
    parts = random_patches(GRIDS, 16)
    lengths = [h * w for h, w in tower.output_grids(GRIDS)]
    with torch.no_grad():
        straight = tower(torch.cat(parts), GRIDS).split(lengths)
        permuted = tower(torch.cat([parts[i] for i in order]), [GRIDS[i] for i in order])
    torch.testing.assert_close(permuted, torch.cat([straight[i] for i in order]), rtol=1e-5, atol=1e-5)


def test_gradients_reach_backbone_and_patches() -> None:
    tower, module = make("timm convnext")
    patches = torch.cat(random_patches(GRIDS, 32)).requires_grad_()
    tower(patches, GRIDS).square().mean().backward()
    assert patches.grad.abs().amax(dim=1).min() > 0
    assert module.stem[0].weight.grad.abs().max() > 0


def test_one_protocol_for_tower_and_vit() -> None:
    tower, _ = make("timm swin")
    vit = ViT(ViTConfig(patch_size=16, width=16, depth=1, heads=2, mlp_width=8)).eval()
    for vision in (tower, vit):
        features = vision(torch.cat(random_patches(GRIDS, vision.patch_size)), GRIDS)
        assert features.shape == (sum(h * w for h, w in vision.output_grids(GRIDS)), vision.out_dim)
        assert (vision.patch_size, vision.in_channels, vision.image_size) == (16, 3, None)
        assert vision.output_grids([(2, 3)])[0] == (2 * 16 // vision.stride, 3 * 16 // vision.stride)


def test_views_are_rows_of_patches_in_order() -> None:
    """A backbone that averages every 2x2 px block shows where each feature came from."""
    tower = VisionTower(nn.AvgPool2d(2), patch_size=4, out_dim=3, stride=2)
    images = torch.randn(2, 3, 8, 12)
    features = tower(patchify(images, 4), [(2, 3), (2, 3)])
    expected = nn.functional.avg_pool2d(images, 2).flatten(2).mT.flatten(0, 1)
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize(
    "rounding, grid, expected", [("floor", (3, 5), (1, 2)), ("ceil", (3, 5), (2, 3)), ("exact", (2, 4), (1, 2))]
)
def test_rounding_of_the_output_grid(rounding: str, grid: tuple[int, int], expected: tuple[int, int]) -> None:
    pool = nn.AvgPool2d(32, ceil_mode=rounding == "ceil")
    tower = VisionTower(pool, patch_size=16, out_dim=3, stride=32, rounding=rounding)
    assert tower.output_grids([grid]) == (expected,)
    assert tower(torch.randn(grid[0] * grid[1], 768), [grid]).shape == (expected[0] * expected[1], 3)


def test_no_views_give_no_features() -> None:
    tower, _ = make("timm convnext")
    assert tower(torch.zeros(0, 3072), []).shape == (0, 10)


class Fixed(nn.Module):
    def __init__(self, output) -> None:
        super().__init__()
        self.output = output

    def forward(self, images: Tensor):
        return self.output


@pytest.mark.parametrize(
    "output, fields, error, words",
    [
        (torch.zeros(1, 3, 2, 2), {}, ValueError, r"shape \(1, 3, 2, 2\); expected NCHW \(1, 3, 2, 3\) or NHWC"),
        (torch.zeros(1, 7, 3), {}, ValueError, "Check out_dim, stride, rounding and num_prefix_tokens"),
        (torch.zeros(2, 6, 3), {}, ValueError, "for 1 views of 2x3 features"),
        (torch.zeros(1, 6, 3), {"layout": "NCHW"}, ValueError, r"expected NCHW \(1, 3, 2, 3\) for"),
        (SimpleNamespace(logits=0), {}, TypeError, "returned SimpleNamespace; expected a tensor"),
        ([], {}, TypeError, "returned list"),
    ],
)
def test_unexpected_maps_raise(output, fields: dict, error: type[Exception], words: str) -> None:
    tower = VisionTower(Fixed(output), patch_size=2, out_dim=3, **fields)
    with pytest.raises(error, match=words):
        tower(torch.zeros(6, 12), [(2, 3)])


def test_an_ambiguous_map_needs_its_layout() -> None:
    square = torch.arange(27.0).view(1, 3, 3, 3)
    patches = torch.zeros(9, 12)
    with pytest.raises(ValueError, match="Both fit: pass layout="):
        VisionTower(Fixed(square), patch_size=2, out_dim=3)(patches, [(3, 3)])
    first = VisionTower(Fixed(square), patch_size=2, out_dim=3, layout="NCHW")(patches, [(3, 3)])
    last = VisionTower(Fixed(square), patch_size=2, out_dim=3, layout="NHWC")(patches, [(3, 3)])
    assert first[0].tolist() == [0, 9, 18]
    assert last[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"out_dim": 0}, "sizes must be positive"),
        ({"layout": "LND"}, "layout must be None, 'NCHW', 'NHWC' or 'NLC', got 'LND'"),
        ({"rounding": "up"}, "rounding must be 'exact', 'floor' or 'ceil', got 'up'"),
    ],
)
def test_bad_settings_raise(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VisionTower(nn.Identity(), **{"patch_size": 2, "out_dim": 3, **fields})


def test_bad_input_raises() -> None:
    tower = VisionTower(nn.AvgPool2d(4), patch_size=2, out_dim=3, stride=4)
    with pytest.raises(ValueError, match="a side of 3 patches of 2 px is no multiple of the stride 4"):
        tower(torch.zeros(6, 12), [(2, 3)])
    with pytest.raises(ValueError, match="1 grids hold 8 patches in all; got 6 patches"):
        tower(torch.zeros(6, 12), [(2, 4)])
    with pytest.raises(ValueError, match="P = C"):
        tower(torch.zeros(6, 27), [(2, 3)])
    with pytest.raises(ValueError, match="a side of 2 px is shorter than the stride 4"):
        VisionTower(nn.AvgPool2d(4), patch_size=2, out_dim=3, stride=4, rounding="floor").output_grids([(1, 4)])


@pytest.mark.parametrize("bad", [torch.zeros(1, 3, 5, 6), torch.zeros(3, 4, 6)])
def test_images_that_do_not_divide_raise(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="multiples of the 2 px patch"):
        patchify(bad, 2)


def test_patches_that_do_not_fit_raise() -> None:
    with pytest.raises(ValueError, match=r"patches must be \(V\*2\*3, 3\*2\*2 = 12\); got \(7, 12\)"):
        unpatchify(torch.zeros(7, 12), (2, 3), 2)
