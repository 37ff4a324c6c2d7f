from __future__ import annotations

import numpy as np
import pytest
import torch

from uhd.resampler import sincos_2d


@pytest.mark.parametrize(("dim", "grid_hw"), [(4, (1, 1)), (16, (5, 7)), (24, (70, 3)), (32, (1, 48)), (64, (8, 8))])
def test_equals_float64_formula(dim, grid_hw):
    rows, columns = grid_hw
    table = sincos_2d(dim, grid_hw)
    assert table.dtype == torch.float32
    want = np.empty((rows * columns, dim))
    quarter = dim // 4
    for y in range(rows):
        for x in range(columns):
            for k in range(quarter):
                omega = 10000.0 ** (-k / quarter)
                want[y * columns + x, k::quarter] = [
                    np.sin(x * omega),
                    np.cos(x * omega),
                    np.sin(y * omega),
                    np.cos(y * omega),
                ]
    np.testing.assert_allclose(table.numpy(), want, atol=1e-5)


def test_first_half_is_x_and_rows_are_row_major():
    """Row 9 of MAE's 8 x 8 table of width 16, that is y = 1, x = 1, and row 2: numbers of the reference."""
    table = sincos_2d(16, (8, 8))
    one = [0.84147102, 0.09983342, 0.00999983, 0.001, 0.54030228, 0.99500418, 0.99995, 0.9999995]
    two = [0.90929741, 0.19866933, 0.01999867, 0.002, -0.41614684, 0.98006660, 0.9998, 0.999998]
    zero = [0, 0, 0, 0, 1, 1, 1, 1]
    torch.testing.assert_close(table[9], torch.tensor(one + one), atol=1e-6, rtol=0)
    torch.testing.assert_close(table[2], torch.tensor(two + zero, dtype=torch.float32), atol=1e-6, rtol=0)


def test_a_smaller_grid_is_a_crop_of_a_larger():
    large = sincos_2d(24, (70, 70)).reshape(70, 70, 24)
    assert torch.equal(sincos_2d(24, (5, 17)).reshape(5, 17, 24), large[:5, :17])


@pytest.mark.parametrize(("dim", "grid_hw"), [(18, (4, 4)), (0, (4, 4)), (-4, (4, 4)), (16, (0, 3)), (16, (3, -1))])
def test_errors(dim, grid_hw):
    with pytest.raises(ValueError, match=r"multiple of 4|at least 1 patch"):
        sincos_2d(dim, grid_hw)
