from __future__ import annotations

import pytest
import torch

from uhd.resampler import MLPProjector, PerceiverConfig, PerceiverResampler, PixelShuffleProjector

GRIDS = [(4, 6), (2, 2), (6, 4)]
FEATURES = torch.randn(52, 8, generator=torch.Generator().manual_seed(0))


def compressors():
    torch.manual_seed(0)
    return [
        MLPProjector(8, 12),
        PixelShuffleProjector(8, 12, factor=2),
        PerceiverResampler(PerceiverConfig(width=12, vision_width=8, num_heads=2, num_latents=9)),
    ]


@pytest.mark.parametrize("index", range(3))
def test_protocol(index):
    """One loop of an encoder serves them all: widths, lengths, views alone and together."""
    compressor = compressors()[index]
    assert (compressor.in_dim, compressor.out_dim) == (8, 12)
    lengths = compressor.output_lengths(GRIDS)
    assert lengths == [[24, 4, 24], [6, 1, 6], [9, 9, 9]][index]
    out = compressor(FEATURES, GRIDS)
    assert out.shape == ((sum(lengths), 12) if compressor.tokens_per_view is None else (3, 9, 12))
    tokens = out.reshape(-1, 12).split(lengths)
    for own, x, grid in zip(tokens, FEATURES.split([24, 4, 24]), GRIDS, strict=True):
        torch.testing.assert_close(own, compressor(x, [grid]).reshape(-1, 12))
    assert compressor(FEATURES[:0], []).numel() == 0
    with pytest.raises(ValueError, match="features have 51 rows, but the 3 grids add up to 52"):
        compressor(FEATURES[:-1], GRIDS)
    with pytest.raises(ValueError, match=r"expected \(N, 8\)"):
        compressor(FEATURES[:, :7], GRIDS)
    with pytest.raises(TypeError, match=r"features are torch.float64 and the weights torch.float32"):
        compressor(FEATURES.double(), GRIDS)


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
    with pytest.raises(ValueError, match="factor=0"):
        PixelShuffleProjector(8, 12, factor=0)


def test_mlp_is_per_patch_with_its_own_hidden_width():
    projector = MLPProjector(8, 12, hidden_dim=5)
    assert projector.mlp[0].out_features == 5
    out = projector(FEATURES, GRIDS)
    torch.testing.assert_close(out[30:31], projector(FEATURES[30:31], [(1, 1)]))
