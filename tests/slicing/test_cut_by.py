"""Cut by shape: the number of slices follows from the longer side where area would give fewer."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings

from tests.slicing.test_many import check, random_sizes
from uhd.compare import choose
from uhd.compare.advice import pasted
from uhd.compare.learned import kind_of
from uhd.slicing import PRESETS, SlicingConfig, candidates, plan, plan_from_grid, worst_case
from uhd.testing import check_strategy, image_sizes, slicing_configs

RELEASED = sorted(name for name, config in PRESETS.items() if config.rule == "released")
SHAPE = PRESETS["llava-uhd-safe"].replace(cut_by="shape")


@pytest.mark.parametrize(
    "size_hw, grid",
    [
        ((100, 1000), (1, 4)),  # one view's area and 3 of its sides: of 2, 3 and 4 slices those nearest a square
        ((1000, 100), (4, 1)),
        ((60, 672), (1, 3)),
        ((336, 336), None),
        ((336, 337), (1, 2)),
        ((50, 336), None),
        ((20, 3000), (1, 7)),  # capped
        ((1008, 672), (3, 2)),  # by area
    ],
)
def test_long_images_are_cut_by_what_their_side_needs(size_hw, grid):
    found = plan(size_hw, SHAPE)
    assert found.grid == grid
    assert found == plan_from_grid(size_hw, grid, SHAPE)
    assert [one.grid for one in candidates(size_hw, SHAPE)][:1] == ([] if grid is None else [grid])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(slicing_configs(), image_sizes())
def test_the_count_is_the_larger_of_area_and_side(config, size_hw):
    """By the rule's words: cells N - 1, N, N + 1, without 1 or more than the cap; all else is the rule as it was."""
    config = config.replace(one_view_below=None)  # which takes grids away again
    shape, area = config.replace(cut_by="shape"), config.replace(cut_by="area")
    side = config.image_size
    ideal = max(math.ceil(math.prod(size_hw) / side**2), math.ceil(max(size_hw) / side))
    near = min(ideal, config.max_slices)
    counts = {n for n in (near - 1, near, near + 1) if 1 < n <= config.max_slices} if near > 1 else set()
    assert {math.prod(one.grid) for one in candidates(size_hw, shape)} == counts
    found = plan(size_hw, shape)
    assert math.prod(found.grid or (1, 1)) in (counts or {1})
    assert found == plan_from_grid(size_hw, found.grid, shape)
    if ideal == math.ceil(math.prod(size_hw) / side**2):
        assert found == plan(size_hw, area)
    if config.clamp:  # the bounds then hold for every aspect
        worst = worst_case(shape)
        assert found.num_views <= worst.num_views
        assert found.num_tokens <= worst.num_tokens
        assert found.num_patches <= worst.num_patches


@pytest.mark.parametrize("name", RELEASED)
def test_arrays_of_sizes_are_planned_alike(name):
    check(random_sizes(4000, seed=3), PRESETS[name].replace(cut_by="shape"))
    check(random_sizes(500, seed=4), PRESETS[name].replace(cut_by="shape", max_slices=40))
    sides = np.arange(1, 3000, 7)
    strips = np.stack([sides, np.full_like(sides, 97)], axis=1)
    check(np.concatenate([strips, strips[:, ::-1]]), PRESETS[name].replace(cut_by="shape"))


def test_a_token_budget_lowers_the_cap():
    config = SHAPE.replace(max_tokens=200)
    assert plan((100, 1000), config).grid == (1, 2)
    assert plan((100, 1000), SHAPE, max_tokens=100).grid is None
    check(np.random.default_rng(2).integers(100, 2000, (500, 2)), SHAPE.replace(max_tokens=300))


def test_every_law_holds():
    worst = SHAPE.worst_case()
    check_strategy(SHAPE, max_tokens=worst.num_tokens, max_patches=worst.num_patches)


def test_options_that_are_off_are_not_written():
    for name, config in PRESETS.items():
        assert set(config.later) & set(config.to_dict()) == (
            {"cut_by", "one_view_below", "latents"} if name == "uhd-plus" else set()
        )
    both = SHAPE.replace(border_moves=3)
    assert both.to_dict() == {**PRESETS["llava-uhd-safe"].to_dict(), "cut_by": "shape", "border_moves": 3}
    assert SlicingConfig.from_dict(json.loads(json.dumps(both.to_dict()))) == both


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="cut_by must be 'area' or 'shape', got 'side'"):
        SlicingConfig(cut_by="side")
    with pytest.raises(ValueError, match="changes the rule 'released', not 'march2024'"):
        SlicingConfig.preset("llava-uhd-paper", cut_by="shape")


def test_advice_names_the_option():
    found = choose([(100, 1000), (700, 500)], rules=[SHAPE], max_tokens=1000, slices=[7], latents=[64])
    assert pasted(found.best) == "uhd.SlicingConfig.preset(\"llava-uhd-safe\", cut_by='shape')"


def test_the_learned_comparison_has_no_arm_of_it():
    assert kind_of(PRESETS["llava-uhd-safe"]) == "uhd"
    assert kind_of(SHAPE) is None
    assert kind_of(PRESETS["llava-uhd-safe"].replace(border_moves=1)) is None
