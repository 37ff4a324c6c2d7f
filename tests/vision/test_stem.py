"""The window stem: windows as cut by hand, views that do not see each other, and its way through the config."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from uhd.vision import ViT, ViTConfig
from uhd.vision.stem import WindowStem

GRIDS = [(3, 5), (1, 4), (2, 1), (3, 5), (1, 1)]


def patches_of(grids, patch_size, channels=3, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(sum(h * w for h, w in grids), channels * patch_size**2, generator=drawn)


def windows_by_hand(patches, grid_hw, patch_size, border):
    """Put the view together, pad it with zeros, and cut a window around every patch."""
    rows, columns = grid_hw
    image = rearrange(patches, "(r s) (c y x) -> c (r y) (s x)", r=rows, s=columns, y=patch_size, x=patch_size)
    image = F.pad(image, (border,) * 4)
    side = patch_size + 2 * border
    return torch.stack(
        [
            image[:, r * patch_size : r * patch_size + side, s * patch_size : s * patch_size + side].flatten()
            for r in range(rows)
            for s in range(columns)
        ]
    )


@pytest.mark.parametrize("border", [1, 3, 6])
def test_windows_are_those_cut_by_hand_and_views_do_not_see_each_other(border):
    stem = WindowStem(6, border, 8, 12)
    patches = patches_of(GRIDS, 6)
    parts = patches.split([h * w for h, w in GRIDS])
    wanted = torch.cat([windows_by_hand(part, grid, 6, border) for part, grid in zip(parts, GRIDS, strict=True)])
    assert torch.equal(stem.windows(patches, GRIDS), wanted)
    alone = torch.cat([stem(part, [grid]) for part, grid in zip(parts, GRIDS, strict=True)])
    torch.testing.assert_close(stem(patches, GRIDS), alone)


def test_a_grey_stem_sees_the_mean_of_the_channels():
    stem = WindowStem(4, 2, 8, 12, grey=True)
    patches = patches_of([(2, 3)], 4)
    mean = patches.unflatten(1, (3, 16)).mean(1)
    torch.testing.assert_close(stem.windows(patches, [(2, 3)]), windows_by_hand(mean, (2, 3), 4, 2))
    assert stem.up.in_features == 64


@pytest.mark.parametrize("border", [0, 5, -1])
def test_a_border_outside_the_patch_is_refused(border):
    with pytest.raises(ValueError, match=f"border must be 1 to patch_size=4 px; got {border}"):
        WindowStem(4, border, 8, 12)


def make_vit(**changes):
    fields = {"patch_size": 4, "width": 16, "depth": 2, "heads": 2, "mlp_width": 24, "position_grid_hw": (3, 3)}
    torch.manual_seed(0)
    return ViT(ViTConfig(**{**fields, "stem_border": 2, "stem_hidden": 20, "stem_grey": True, **changes}))


def test_the_config_builds_it():
    assert isinstance(make_vit().stem, WindowStem)
    assert isinstance(make_vit(stem_border=0).stem, torch.nn.Linear)
    assert make_vit(stem_hidden=None).stem.up.out_features == 32


def test_gradients_reach_the_neighbours():
    patches = patches_of(GRIDS, 4).requires_grad_()
    features = make_vit().stem(patches, GRIDS)
    features[7].sum().backward()  # the middle of the first 3 x 5 view
    seen = patches.grad.abs().sum(1) > 0
    assert seen.nonzero().flatten().tolist() == [1, 2, 3, 6, 7, 8, 11, 12, 13]
