from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from uhd.resampler import MLPProjector, PixelShuffleProjector, PoolProjector

GRIDS = [(4, 6), (2, 2), (6, 4)]
FEATURES = torch.randn(52, 8, generator=torch.Generator().manual_seed(0))


def test_pixel_shuffle_order():
    """Block (i, j) holds the patches (2i, 2j), (2i, 2j+1), (2i+1, 2j), (2i+1, 2j+1), channels inside."""
    projector = PixelShuffleProjector(2, 5, factor=2)
    seen = []
    projector.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    projector(torch.stack([y.flatten(), x.flatten()], dim=1), [(4, 6)])
    for block in range(6):
        i, j = divmod(block, 3)
        want = [(2 * i, 2 * j), (2 * i, 2 * j + 1), (2 * i + 1, 2 * j), (2 * i + 1, 2 * j + 1)]
        assert seen[0][block].reshape(4, 2).tolist() == [list(map(float, pair)) for pair in want]


def test_pixel_shuffle_refuses_a_grid_it_cannot_divide():
    projector = PixelShuffleProjector(8, 12, factor=2)
    with pytest.raises(
        ValueError, match=r"grids\[1\] is \(3, 4\); both sides must be multiples of 2: plan .* factor=2"
    ):
        projector(torch.zeros(16, 8), [(2, 2), (3, 4)])
    with pytest.raises(ValueError, match="factor must be at least 1; got 0"):
        PixelShuffleProjector(8, 12, factor=0)


def test_mlp_is_per_patch_with_its_own_hidden_width():
    projector = MLPProjector(8, 12, hidden_dim=5)
    assert projector.mlp[0].out_features == 5
    out = projector(FEATURES, GRIDS)
    torch.testing.assert_close(out[30:31], projector(FEATURES[30:31], [(1, 1)]))


@pytest.mark.parametrize("mode", ["average", "bilinear"])
def test_pooling_of_non_square_views(mode):
    """Views of several grids in one call equal PyTorch's own pooling of each, sides rounded up."""
    torch.manual_seed(0)
    pool = PoolProjector(5, 8, factor=2, mode=mode)
    grids = [(5, 3), (4, 6), (5, 3), (1, 1), (27, 27)]
    parts = [torch.randn(h * w, 5) for h, w in grids]
    got = pool(torch.cat(parts), grids).split(pool.output_lengths(grids))
    assert pool.output_lengths(grids) == [6, 6, 6, 1, 196]
    for (h, w), part, tokens in zip(grids, parts, got, strict=True):
        maps = pool.mlp(part).T.reshape(1, 8, h, w)
        if mode == "average":
            want = F.avg_pool2d(maps, 2, ceil_mode=True, count_include_pad=False)
        else:
            want = F.interpolate(maps, ((h + 1) // 2, (w + 1) // 2), mode="bilinear")
        assert torch.allclose(tokens, want[0].flatten(1).T, atol=1e-6)


def test_pooling_settings_are_checked():
    with pytest.raises(ValueError, match="factor must be at least 1; got 0"):
        PoolProjector(4, 4, factor=0)
    with pytest.raises(ValueError, match="'average' or 'bilinear'"):
        PoolProjector(4, 4, mode="max")
