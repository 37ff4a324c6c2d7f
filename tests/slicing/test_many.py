"""plan_many gives what plan gives, size by size."""

import numpy as np
import pytest

from uhd.slicing import PRESETS, SlicingConfig, plan, plan_many

NAMES = ("grid", "slice_hw", "overview_hw", "num_views", "num_patches", "num_tokens")


def table(columns):
    assert tuple(columns) == NAMES
    assert all(column.dtype == np.int64 for column in columns.values())
    return np.column_stack([columns[name] for name in NAMES])


def check(sizes, config):
    plans = [plan(size, config) for size in map(tuple, sizes.tolist())]
    want = np.array([np.hstack([getattr(found, name) or (0, 0) for name in NAMES]) for found in plans])
    wrong = np.flatnonzero((table(plan_many(sizes, config)) != want).any(axis=1))
    assert not len(wrong), (len(wrong), sizes[wrong[0]])


def random_sizes(count, seed, largest=20_000):
    log_sides = np.random.default_rng(seed).uniform(0, np.log(largest), (count, 2))
    return np.exp(log_sides).astype(np.int64)


def test_equals_plan_on_100_000_random_sizes():
    check(random_sizes(100_000, seed=0), PRESETS["llava-uhd"])


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_equals_plan_on_every_square_and_random_sizes(name):
    squares = np.arange(1, 4097)[:, None].repeat(2, axis=1)
    check(np.concatenate([squares, random_sizes(1500, seed=1)]), PRESETS[name])


@pytest.mark.parametrize("cap", [1, 2, 13, 64])
def test_equals_plan_under_other_caps(cap):
    check(random_sizes(1000, seed=cap), SlicingConfig.preset("minicpm-v", max_slices=cap))
    check(random_sizes(1000, seed=cap), SlicingConfig.preset("llava-uhd-paper", max_slices=cap))


@pytest.mark.parametrize("name", ["llava-uhd-safe", "llava-uhd-paper", "minicpm-v-4.6"])
def test_equals_plan_within_a_token_budget(name):
    """Sizes up to aspect ~10, whose overview fits."""
    sizes = np.random.default_rng(2).integers(200, 2000, (1500, 2))
    check(sizes, PRESETS[name].replace(max_tokens=300))


def test_a_budget_below_an_overview_raises_as_plan_does():
    with pytest.raises(ValueError, match="10x20 px .* alone takes 64 tokens"):
        plan_many([[10, 20]], max_tokens=63)


def test_no_sizes_give_empty_columns():
    assert table(plan_many([])).shape == (0, 9)
    assert table(plan_many(np.zeros((0, 2), int))).shape == (0, 9)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ([[10, 20], [10, 0]], "row 1: got height 10 and width 0"),
        ([[10, 2_000_000]], "1..1000000"),
        ([[10.5, 20]], "dtype float64"),
        ([10, 20], "shape \\(2,\\)"),
        ([(1, 2), (3,)], "rows of other lengths"),
        ([[10, 20, 3]], "shape \\(1, 3\\)"),
    ],
)
def test_bad_sizes_name_the_row(sizes, message):
    with pytest.raises(ValueError, match=message):
        plan_many(sizes)


@pytest.mark.parametrize("name", ["llava-uhd-paper", "llava-uhd", "minicpm-v"])
@pytest.mark.parametrize("max_tokens", [64, 65, 127, 128, 129, 191, 193, 300, 1000])
def test_equals_plan_at_the_edges_of_a_budget(name, max_tokens):
    """From the overview alone, where the loop over caps goes down to none, to more than any image costs."""
    spare = PRESETS[name].separators.per_image
    check(random_sizes(200, seed=max_tokens), PRESETS[name].replace(max_tokens=max_tokens + spare))
    alone = plan_many([(900, 700)], name, max_tokens=64 + spare)
    assert alone["num_views"].tolist() == [1]
    assert alone["num_tokens"].tolist() == [64 + spare]
