"""Windows and their pooled keys: against torchvision's RoI alignment, and by what they must do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uhd.resampler.windows import attend_windows, pool_hw, pool_weights, pool_windows


def test_a_window_is_pooled_to_the_shape_nearest_to_the_maps():
    bins = {(24, 24): (3, 3), (12, 48): (2, 4), (48, 12): (4, 2), (19, 29): (2, 3), (29, 19): (3, 2)}
    bins |= {(7, 5): (4, 3), (16, 20): (3, 4), (20, 16): (4, 3), (1, 5000): (2, 4), (5000, 1): (4, 2)}
    assert {grid: pool_hw(grid) for grid in bins} == bins


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([1, 2, 4, 8, 12]), st.booleans())
def test_pooling_equals_torchvisions_roi_alignment(rows, columns, side, aligned):
    ops = pytest.importorskip("torchvision.ops")
    maps = torch.randn(2, rows, columns, 3, generator=torch.Generator().manual_seed(rows * 61 + columns))
    # the release finds the window's sides from its area, in double precision, and rounds the boxes to float32
    height = math.sqrt(rows * columns / side**2 / (columns / rows))
    width = height * (columns / rows)
    boxes = [[j * width, i * height, j * width + width, i * height + height] for i in range(side) for j in range(side)]
    boxes = [torch.tensor(boxes, dtype=torch.float32)] * 2
    wanted = ops.roi_align(maps.permute(0, 3, 1, 2), boxes, pool_hw((rows, columns)), 1.0, -1, aligned=aligned)
    wanted = wanted.flatten(2).transpose(1, 2).unflatten(0, (2, side**2))
    torch.testing.assert_close(pool_windows(maps, side, aligned=aligned), wanted, atol=2e-6, rtol=0)


@given(length=st.integers(1, 200), windows=st.integers(1, 12), bins=st.integers(2, 4))
def test_aligned_bins_are_means_inside_the_side_and_mirror_each_other(length, windows, bins):
    weights = pool_weights(length, windows, bins, aligned=True)
    assert weights.shape == (windows * bins, length)
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(1), torch.ones(windows * bins), atol=1e-5, rtol=0)
    torch.testing.assert_close(weights.flip(0, 1), weights, atol=2e-4, rtol=0)


def test_the_releases_flaw_on_thin_maps_and_its_repair():
    """Fewer features than windows along a side: the last ones reach outside, where the release counts zeros."""
    maps = torch.ones(1, 6, 5, 1)
    released, aligned = (pool_windows(maps, 12, aligned=flag)[0, ..., 0] for flag in (False, True))
    empty = (released == 0).any(1).view(12, 12)
    assert empty[-1].all()
    assert empty[:, -1].all()
    assert not empty[:10, :10].any()
    torch.testing.assert_close(aligned, torch.ones_like(aligned))


def test_the_releases_shift_is_half_a_feature():
    ramp = torch.arange(24.0).expand(1, 24, 24).unsqueeze(-1)
    shift = pool_windows(ramp, 4, aligned=False) - pool_windows(ramp, 4, aligned=True)
    assert shift[0, :3].mean().item() == pytest.approx(0.5, abs=1e-4)


def test_windows_and_bins_are_row_major():
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(12.0), indexing="ij")
    found = pool_windows(torch.stack([y, x], dim=-1)[None], 2, aligned=True)[0]  # (4 windows, 2 x 3 bins, (y, x))
    window_y, window_x = found.mean(1).unbind(-1)
    assert torch.allclose(window_y, torch.tensor([1.5, 1.5, 5.5, 5.5]))
    assert torch.allclose(window_x, torch.tensor([2.5, 8.5, 2.5, 8.5]))
    assert torch.allclose(found[1, :, 0], torch.tensor([0.5, 0.5, 0.5, 2.5, 2.5, 2.5]))
    assert torch.allclose(found[1, :, 1], torch.tensor([6.5, 8.5, 10.5, 6.5, 8.5, 10.5]))


def test_a_latent_sees_its_own_window_only():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*shape, generator=generator) for shape in ((4, 3, 8), (2, 4, 6, 8), (2, 4, 6, 8)))
    out = attend_windows(q, k, v, 2)
    assert out.shape == (2, 3, 4, 8)
    k[0, 2], v[0, 2] = 9.0, -9.0
    changed = (attend_windows(q, k, v, 2) - out).abs().amax(dim=(1, 3)) > 1e-3
    assert changed.tolist() == [[False, False, True, False], [False] * 4]
