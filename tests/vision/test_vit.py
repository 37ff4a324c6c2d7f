"""The packed ViT by itself: packing, positions, truncation, training. Equality with other models: test_weights.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.vision import parts
from tests.vision.parts import assert_near, random_patches
from uhd.vision import ViT, ViTConfig, patchify, unpatchify

CONFIG = dataclasses.replace(parts.CONFIG, depth=3, pre_norm=True, image_size=8, position_grid_hw=(4, 4))
GRIDS = [(2, 3), (3, 2), (4, 4), (1, 6), (2, 3), (5, 1)]


def make(config: ViTConfig = CONFIG, **kwargs) -> ViT:
    return parts.make(config, **kwargs)


@pytest.mark.parametrize("layer", [0, 1, 2, 3, -1, -2, -3, -4])
def test_a_truncated_model_gives_the_hidden_state(layer: int) -> None:
    full = make(dataclasses.replace(CONFIG, final_norm=False))
    short = ViT(dataclasses.replace(full.config, select_layer=layer)).eval()
    left_out = short.load_state_dict(full.state_dict(), strict=False)
    assert not left_out.missing_keys
    assert len(short.blocks) == layer % 4
    patches = random_patches(GRIDS)
    with torch.no_grad():
        features, states = full(patches, GRIDS, hidden_states=True)
        assert len(states) == 4
        assert torch.equal(features, states[-1])
        assert_near(short(patches, GRIDS), states[layer])


def test_gradient_checkpointing_runs_blocks_twice_and_changes_nothing() -> None:
    gradients, runs = [], []
    for recompute in (False, True):
        vit = make().train()
        vit.gradient_checkpointing = recompute
        runs.append([])
        vit.blocks[1].mlp.register_forward_hook(lambda *_: runs[-1].append(1))
        vit(random_patches(GRIDS), GRIDS).square().mean().backward()
        gradients.append({name: p.grad for name, p in vit.named_parameters()})
    assert [len(run) for run in runs] == [1, 2]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stem", [nn.Linear(12, 16), nn.Sequential(nn.Linear(12, 16))], ids=["linear", "sequential"])
def test_a_given_stem_keeps_its_weights(stem) -> None:
    weight = next(stem.parameters()).detach().clone()
    vit = ViT(CONFIG, stem=stem)
    vit.reset_parameters()
    assert torch.equal(next(vit.stem.parameters()), weight)


def test_interpolation_settings_decide_the_positions() -> None:
    settings_of = [
        {},
        {"interpolation": "bilinear"},
        {"antialias": True},
        {"interpolation": "bilinear", "antialias": True},
        {"interpolation": "nearest"},
    ]
    tables = [make(dataclasses.replace(CONFIG, **s)).position_embedding((3, 2)).detach() for s in settings_of]
    for i, table in enumerate(tables):
        assert table.shape == (6, 16)
        assert all((table - other).abs().max() > 1e-4 for other in tables[:i])
    native = make().position_embedding((4, 4))
    assert torch.equal(native, make().positions[1:])


def test_bucket_rules_pick_rows() -> None:
    side, grid = 14, (49, 2)
    config = dataclasses.replace(CONFIG, position_grid_hw=(side, side), interpolation="nearest")
    exact, remote = (make(dataclasses.replace(config, bucket_rule=rule)) for rule in ("integer", "remote"))
    moved = (exact.position_embedding(grid) != remote.position_embedding(grid)).any(dim=1).view(grid)
    assert moved.all(dim=1).nonzero().flatten().tolist() == [7, 14, 35, 42]


def test_a_stem_of_ones_own() -> None:
    stem = nn.Sequential(nn.Linear(CONFIG.patch_dim, 8), nn.GELU(), nn.Linear(8, CONFIG.width))
    vit = make(stem=stem).train()
    vit(random_patches(GRIDS), GRIDS).sum().backward()
    assert stem[0].weight.grad.abs().max() > 0
    bad = make(stem=nn.Linear(CONFIG.patch_dim, 8))
    with pytest.raises(ValueError, match=r"stem must return \(N, D\) = \(6, 16\); got \(6, 8\)"):
        bad(random_patches([(2, 3)]), [(2, 3)])


def test_the_stem_is_a_flattened_convolution() -> None:
    conv = nn.Conv2d(3, 16, kernel_size=2, stride=2)
    vit = make()
    images = torch.randn(2, 3, 6, 8)
    vit.stem.load_state_dict({"weight": conv.weight.flatten(1), "bias": conv.bias})
    assert_near(vit.stem(patchify(images, 2)), conv(images).flatten(2).transpose(1, 2).flatten(0, 1))


@given(views=st.integers(1, 3), rows=st.integers(1, 4), columns=st.integers(1, 4), p=st.integers(1, 4))
@settings(max_examples=20)
def test_patchify_and_unpatchify_are_inverses(views: int, rows: int, columns: int, p: int) -> None:
    images = torch.randn(views, 3, rows * p, columns * p)
    patches = patchify(images, p)
    assert patches.shape == (views * rows * columns, 3 * p * p)
    assert torch.equal(patches[columns - 1].view(3, p, p), images[0, :, :p, (columns - 1) * p :])
    assert torch.equal(unpatchify(patches, (rows, columns), p), images)


def test_a_model_without_positions_or_prefix() -> None:
    config = ViTConfig(patch_size=2, width=16, depth=1, heads=2, mlp_width=24)
    vit = make(config)
    with torch.no_grad():
        assert torch.equal(vit(random_patches([(2, 3)]), [(2, 3)]), vit(random_patches([(2, 3)]), [(3, 2)]))
    with pytest.raises(ValueError, match="no position embedding"):
        vit.position_embedding((2, 3))


def test_what_an_encoder_asks_of_it() -> None:
    vit = make()
    assert (vit.patch_size, vit.stride, vit.image_size, vit.out_dim, vit.in_channels) == (2, 2, 8, 16, 3)
    assert vit.output_grids(torch.tensor(GRIDS)) == tuple(GRIDS)


def test_half_precision_weights_take_float32_patches() -> None:
    vit = make().bfloat16()
    with torch.no_grad():
        features = vit(random_patches(GRIDS), GRIDS)
        assert features.dtype == torch.bfloat16
        assert (features.float() - make()(random_patches(GRIDS), GRIDS)).abs().mean() < 0.05


@pytest.mark.parametrize(
    "patches, grids, error, words",
    [
        (torch.zeros(7, 12), [(2, 3)], ValueError, "1 grids hold 6 patches in all; got 7 patches"),
        (torch.zeros(6, 27), [(2, 3)], ValueError, r"P = C\*p\*p = 12; got \(6, 27\)"),
        (torch.zeros(6, 12, dtype=torch.uint8), [(2, 3)], TypeError, "floating point and normalised; got torch.uint8"),
        (torch.zeros(6, 12), [(2, 3), (0, 3)], ValueError, r"grids\[1\] must be at least \(1, 1\)"),
        (torch.zeros(6, 12), [6], TypeError, r"grids\[0\] must be two integers"),
        (torch.zeros(6, 12), torch.zeros(1, 2, device="meta"), TypeError, "grids must be on the host"),
    ],
)
def test_bad_input_raises(patches: torch.Tensor, grids: list, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()(patches, grids)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"heads": 3}, "width must be a multiple of heads; got 16 and 3"),
        ({"depth": 0}, "depth must be at least 1; got 0"),
        ({"activation": "relu"}, "activation must be .*, got 'relu'"),
        ({"interpolation": "area"}, "interpolation must be 'bicubic'"),
        ({"interpolation": "nearest", "antialias": True}, "antialias needs"),
        ({"bucket_rule": "remote"}, "needs interpolation='nearest'"),
        ({"bucket_rule": "remote", "interpolation": "nearest", "position_grid_hw": (2, 3)}, "square position table"),
        ({"position_prefix": 4}, "position_prefix counts"),
        ({"position_grid_hw": None}, "position_prefix counts"),
        ({"select_layer": 4}, r"select_layer must lie in \[-4, 3\] for 3 blocks; got 4"),
        ({"select_layer": -5}, "select_layer must lie in"),
    ],
)
def test_configurations_that_do_not_fit_raise(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **fields)
