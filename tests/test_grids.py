"""The views' grids: their check, and work that is done grid by grid."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from uhd.grids import as_grid, check_grids, join_blocks, made_once, map_by_grid, shrink_grids

sides = st.integers(1, 4)


def test_grids_are_pairs_of_host_integers():
    assert check_grids([(2, np.int64(3))]) == check_grids(torch.tensor([[2, 3]])) == ((2, 3),)
    assert as_grid([4, 5]) == (4, 5)
    for bad in ([(2.0, 3)], [(2, 3, 4)], [7], torch.zeros(1, 2, device="meta")):
        with pytest.raises(TypeError, match="grids"):
            check_grids(bad)
    with pytest.raises(ValueError, match=r"grids\[1\] must be at least \(1, 1\)"):
        check_grids([(1, 1), (0, 2)])


@given(grids=st.lists(st.tuples(sides, sides), max_size=8))
def test_each_grid_is_computed_once_and_results_stay_in_order(grids):
    calls = []

    def compute(grid, views):
        calls.append(grid)
        return [(grid, view) for view in views]

    assert map_by_grid(compute, grids) == [(grid, view) for view, grid in enumerate(grids)]
    assert len(calls) == len(set(grids))


@given(grids=st.lists(st.tuples(sides, sides), max_size=4), side=sides)
def test_blocks_hold_their_patches(grids, side):
    grids = [(rows * side, columns * side) for rows, columns in grids]
    places = [(view, y, x) for view, (rows, columns) in enumerate(grids) for y in range(rows) for x in range(columns)]
    blocks = join_blocks(torch.tensor(places).reshape(-1, 3), grids, side)
    wanted = [
        [(view, side * y + dy, side * x + dx) for dy in range(side) for dx in range(side)]
        for view, (rows, columns) in enumerate(shrink_grids(grids, side, ""))
        for y in range(rows)
        for x in range(columns)
    ]
    assert [[tuple(place) for place in block] for block in blocks.tolist()] == wanted


def test_a_grid_that_cannot_be_divided_is_named():
    with pytest.raises(ValueError, match=r"grids\[1\] is \(4, 3\); .* multiples of 2: plan with merge=2"):
        shrink_grids([(4, 2), (4, 3)], 2, "plan with merge=2")


def test_an_array_is_made_once_and_serves_training_after_inference_mode():
    made = []

    @made_once
    def ramp(length, *, start=0):
        made.append(length)
        return np.arange(start, start + length, dtype=np.float32)

    with torch.inference_mode():
        assert ramp(3, start=1).tolist() == [1, 2, 3]
    weight = torch.ones(3, requires_grad=True)
    (weight * ramp(3, start=1)).sum().backward()
    assert weight.grad.tolist() == [1, 2, 3]
    assert made == [3]
