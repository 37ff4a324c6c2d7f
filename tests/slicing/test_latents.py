"""One view in place of slices, and tokens shared by patches: what the planner decides, one by one and many at once."""

import itertools
import json
import math
import random
from fractions import Fraction

import numpy as np
import pytest

from tests.tiny import refuses
from uhd.cli import main
from uhd.compare.learned import kind_of
from uhd.compare.measuring import COLUMNS, measured_at_once, record
from uhd.slicing import PRESETS, SlicePlan, SlicingConfig, plan, plan_images, plan_many, worst_case
from uhd.slicing.flops import plan_flops
from uhd.slicing.latents import latent_grid, shared_latents
from uhd.slicing.plan import contradictions
from uhd.testing import check_strategy

SAFE = PRESETS["llava-uhd-safe"]


def finest(tokens, hw):
    """The grid by its definition, over all that there are."""
    grids = [(rows, columns) for rows in range(1, tokens + 1) for columns in range(1, tokens // rows + 1)]
    return min(grids, key=lambda g: (max(Fraction(hw[0], g[0]), Fraction(hw[1], g[1])), -math.prod(g), g[0]))


def test_grids_of_latents_are_the_finest():
    drawn = random.Random(0)
    for _ in range(400):
        tokens, hw = drawn.randint(1, 70), (drawn.randint(1, 40), drawn.choice((drawn.randint(1, 40), 300)))
        assert latent_grid(tokens, hw) == finest(tokens, hw), (tokens, hw)
    assert latent_grid(10**6, (3, 4)) == (866, 1154)  # at once, too
    assert [latent_grid(side**2, (5, 5)) for side in range(1, 40)] == [(side, side) for side in range(1, 40)]


def test_slices_get_their_share_and_the_overview_the_rest():
    # 45 * 16 // 80 = 9 a slice; and 36 * 16 // 62 = 9, which leaves 9: 3 x 3 cells of 2 x 7 patches would be wider
    assert shared_latents(45, 4, (4, 4), (4, 4)) == ((3, 3), (3, 3))
    assert shared_latents(36, 3, (4, 4), (2, 7)) == ((3, 3), (2, 4))
    assert shared_latents(5, 4, (1, 1), (9, 9)) == ((1, 1), (1, 1))  # never none
    assert shared_latents(9, 0, (0, 0), (2, 8)) == (latent_grid(9, (2, 8)),) * 2


def test_fitted_tokens_are_at_most_the_fixed_ones_and_in_proportion():
    fitted = SAFE.replace(latents="fitted")
    for image_hw in ((600, 1500), (1000, 700), (300, 300), (200, 500), (90, 3000)):
        found, fixed = plan(image_hw, fitted), plan(image_hw, SAFE)
        assert found.num_visual_tokens == sum(math.prod(view.latents_hw) for view in found.views)
        assert 0.9 * fixed.num_visual_tokens < found.num_visual_tokens <= fixed.num_visual_tokens
        assert [view.patches_hw for view in found.views] == [view.patches_hw for view in fixed.views]
        share = fixed.num_visual_tokens / fixed.num_patches
        for view in found.views:
            if view.kind == "slice":
                assert 0.8 * share < view.num_tokens / view.num_patches <= share
    assert plan((300, 300), fitted).views[0].latents_hw == (8, 8)
    assert plan((200, 500), fitted).views[0].latents_hw == (5, 12)


def test_one_view_has_the_patches_and_tokens_of_what_it_replaces():
    joined = SAFE.replace(one_view_below=1.5)
    for image_hw in ((900, 1200), (1000, 1000), (1500, 1001)):
        found, cut = plan(image_hw, joined), plan(image_hw, SAFE)
        (view,) = found.views
        assert (found.grid, found.num_separators, view.kind) == (None, 0, "overview")
        assert 0.9 * cut.num_patches < found.num_patches <= cut.num_patches
        assert view.latents_hw == latent_grid(cut.num_visual_tokens, view.patches_hw)
        assert abs(math.log(view.size_hw[1] * image_hw[0] / (view.size_hw[0] * image_hw[1]))) < 0.05
    assert plan((900, 1200), joined).overview_hw == (742, 994)
    for image_hw in ((900, 1351), (1351, 900), (300, 300)):  # longer, or never cut
        assert plan(image_hw, joined) == plan(image_hw, SAFE)
    assert plan((900, 1350), joined).grid is None  # exactly at the border
    merged = plan((900, 1200), PRESETS["minicpm-v-4.6"].replace(one_view_below=2))
    assert merged.num_visual_tokens == merged.num_patches // 16
    assert merged.views[0].latents_hw is None


@pytest.mark.parametrize("count", [None, lambda found: found])
def test_one_view_shrinks_to_the_budget_of_a_sample(count):
    joined = SAFE.replace(one_view_below=2)
    for budget, tokens in ((432, 432), (431, 320), (300, 192), (100, 64)):
        (found,) = plan_images([(900, 1200)], joined, max_tokens=budget, count=count)
        assert found == plan((900, 1200), joined, max_tokens=budget)
        assert found.num_tokens == tokens
    assert [found.num_tokens for found in plan_images([(900, 1200), (300, 300)], joined, max_tokens=400)] == [320, 64]


@pytest.mark.parametrize("name", ["llava-uhd-safe", "llava-uhd-paper", "minicpm-v", "minicpm-v-4.6"])
def test_many_are_planned_as_one_by_one_and_within_the_bounds(name):
    drawn = random.Random(1)
    for options in ({"latents": "fitted"}, {"one_view_below": 2.5}, {"latents": "fitted", "one_view_below": 1.0}):
        for most in (None, 300):
            merged = PRESETS[name].tokens_per_view is None and "latents" not in options
            tokens = None if merged else drawn.choice((1, 9, 30, 64))
            config = PRESETS[name].replace(**options, max_tokens=most, tokens_per_view=tokens)
            sizes = [(drawn.randint(20, 2500), drawn.randint(20, 2500)) for _ in range(60)] + [(700, 700), (10, 900)]
            many, bound = plan_many(sizes, config), worst_case(config)
            for row, size in enumerate(sizes):
                found = plan(size, config)
                for key in ("num_views", "num_patches", "num_tokens"):
                    assert many[key][row] == getattr(found, key) <= getattr(bound, key), (size, config, key)
                for key in ("grid", "slice_hw", "overview_hw"):
                    assert tuple(many[key][row]) == (getattr(found, key) or (0, 0)), (size, config, key)
                assert max(view.num_patches for view in found.views) <= bound.view_patches
                assert not list(contradictions(found))
    assert plan_many([], config)["num_tokens"].shape == (0,)


@pytest.mark.parametrize("latents", ["fixed", "fitted"])
def test_one_view_may_have_fewer_tokens_than_it_stands_for_views(latents):
    config = SAFE.replace(one_view_below=2.5, latents=latents, tokens_per_view=1, max_slices=30, max_tokens=20)
    found, bound = plan((1317, 1852), config), worst_case(config)
    assert (found.num_tokens, config.slices_of(found)) == (20, 21)  # and an overview: 4 x 5 latents of 22
    assert plan_many([found.image_hw], config)["num_patches"].tolist() == [found.num_patches]
    assert found.num_patches <= min(bound.num_patches, bound.view_patches)
    assert (found,) == plan_images([found.image_hw], config.replace(max_tokens=None), max_tokens=20)


def test_the_laws_of_a_strategy_hold():
    # sides become whole patches from a truncated height, so that a turned view may be a patch longer
    check_strategy(SAFE.replace(latents="fitted", one_view_below=2.5), skip=["transposition"])
    assert all(
        math.prod(latent_grid(t, (h, 9))) == math.prod(latent_grid(t, (9, h))) for t in (7, 64) for h in range(1, 60)
    )


def test_the_preset_is_one_view_up_to_eight_to_one_and_costs_no_more():
    config = PRESETS["uhd-plus"]
    check_strategy(config, skip=["transposition"])
    assert config == SAFE.replace(name="uhd-plus", cut_by="shape", one_view_below=8.0, latents="fitted")
    for hw in itertools.product((40, 336, 700, 1500, 4000), repeat=2):
        found, cut = plan(hw, config), plan(hw, SAFE.replace(cut_by="shape"))
        assert (found.num_views == 1) == (max(hw) <= 8 * min(hw) or cut.grid is None)
        assert found.num_patches <= cut.num_patches
        assert found.num_visual_tokens <= cut.num_visual_tokens
    assert plan((300, 2401), config).grid == (1, 7)


def test_json_carries_what_is_on_and_nothing_of_what_is_off():
    assert not {"one_view_below", "latents"} & set(SAFE.to_dict())
    assert "latents_hw" not in json.dumps(plan((900, 600)).to_dict())
    config = SAFE.replace(latents="fitted", one_view_below=2)
    assert SlicingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    found = plan((900, 1200), config)
    data = json.loads(json.dumps(found.to_dict()))
    assert SlicePlan.from_dict(data) == found
    data["canvases"][0]["latents_hw"][0] += 1
    refuses(r"latents_hw is \(19, 24\) \(rows, columns\) but tokens_per_view 432", SlicePlan.from_dict, data)


def test_settings_that_make_no_sense_are_refused():
    refuses("latents must be 'fixed' or 'fitted', got 'square'", SAFE.replace, latents="square")
    for value in (0.9, True, "2", float("nan"), float("inf")):
        refuses("one_view_below is longer side / shorter side, a number from 1", SAFE.replace, one_view_below=value)
    refuses("shares tokens_per_view .*: give a number", SAFE.replace, latents="fitted", tokens_per_view=None)


def test_costs_follow_the_latents():
    fitted, fixed = (plan((600, 1500), SAFE.replace(latents=how)) for how in ("fitted", "fixed"))
    few = plan((600, 1500), SAFE.replace(latents="fitted", tokens_per_view=16))
    costs = [plan_flops(found, resampler="perceiver-64").compressor for found in (fixed, fitted, few)]
    assert costs[0] > costs[1] > costs[2]
    assert kind_of(SAFE) == "uhd"
    assert kind_of(SAFE.replace(latents="fitted")) is None  # what was measured is not this
    sizes = np.array([(600, 1500), (90, 70), (1500, 60), (120, 999), (800, 801)])
    for rule in (SAFE.replace(latents="fitted"), PRESETS["uhd-plus"], SAFE.replace(one_view_below=2.5)):
        rows = measured_at_once(sizes, rule)
        for place, size in enumerate(sizes.tolist()):
            assert [rows[name][place] for name in COLUMNS] == pytest.approx(record(rule.plan(tuple(size))))
        assert measured_at_once(sizes, rule, resampler="perceiver-64") is None  # whose FLOPs go by a view's latents


def test_commands_take_both(capsys):
    given = ["--one-view-below", "2", "--latents", "fitted", "--json"]
    assert main(["plan", "1200x900", *given]) == 0
    assert json.loads(capsys.readouterr().out)["num_tokens"] == 432
    assert main(["plan", "1200x900", "--strategy", "llava-next", "--latents", "fitted"]) == 1
    assert "--latents: only for llava-uhd" in capsys.readouterr().err
