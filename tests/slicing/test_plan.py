"""The adaptive planner against the released implementations, and against its own definition."""

import json
import math
import pathlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import uhd
from tests.tiny import refuses
from uhd.pixels import image_size_hw
from uhd.slicing import (
    PRESETS,
    SlicePlan,
    SlicingConfig,
    candidates,
    find,
    grid_score,
    plan,
    plan_from_grid,
    plan_many,
)
from uhd.slicing.plan import MAX_SIDE

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
SIGLIP = SlicingConfig.preset("llava-uhd").for_vision(image_size=384, patch_size=14)

sides = st.integers(1, 6000)
sizes = st.tuples(sides, sides)
presets = st.sampled_from(sorted(PRESETS))
of_grids = st.sampled_from(sorted(name for name in PRESETS if PRESETS[name].one_view_below is None))


def golden(name):
    """Rows as dicts, converted to (height, width) and (rows, columns) here and nowhere else."""
    data = json.loads((GOLDEN / name).read_text())
    return [dict(zip(data["columns"], row, strict=True)) for row in data["rows"]]


def expected(row, tag):
    grid = (row[f"{tag}_rows"], row[f"{tag}_cols"])
    uncut = grid in ((0, 0), (1, 1))  # march2024 writes (1, 1) for an image that stays whole
    return (
        None if uncut else grid,
        None if uncut else (row[f"{tag}_slice_h"], row[f"{tag}_slice_w"]),
        (row[f"{tag}_overview_h"], row[f"{tag}_overview_w"]),
    )


@pytest.mark.parametrize(
    "file, tag, config",
    [
        ("slices_llava_uhd.json", "v1", SlicingConfig.preset("llava-uhd")),
        ("slices_llava_uhd.json", "v2_siglip384", SIGLIP),
        ("slices_llava_uhd.json", "march2024", SlicingConfig.preset("llava-uhd-paper")),
        ("slices_minicpm_v.json", "remote_2_6", SlicingConfig.preset("minicpm-v")),
        ("slices_minicpm_v.json", "hf_4_6_16x", SlicingConfig.preset("minicpm-v-4.6")),
        ("slices_minicpm_v.json", "hf_4_6_4x", SlicingConfig.preset("minicpm-v-4.6-4x")),
    ],
)
def test_equals_the_reference_on_every_size(file, tag, config):
    rows = golden(file)
    assert len(rows) == 2000
    for row in rows:
        found = plan((row["h"], row["w"]), config)
        assert (found.grid, found.slice_hw, found.overview_hw) == expected(row, tag), (row["h"], row["w"])


@pytest.mark.parametrize("tag, name", [("hf_4_6_16x", "minicpm-v-4.6"), ("hf_4_6_4x", "minicpm-v-4.6-4x")])
def test_token_counts_equal_minicpm_v_4_6(tag, name):
    for row in golden("slices_minicpm_v.json"):
        tokens = {view.kind: view.num_tokens for view in plan((row["h"], row["w"]), name).views}
        assert tokens["overview"] == row[f"{tag}_tokens_overview"]
        assert tokens.get("slice", 0) == row[f"{tag}_tokens_slice"]


def test_the_papers_example_costs_448_visual_tokens():
    found = uhd.plan((1008, 672))
    assert (found.grid, found.slice_hw, found.overview_hw) == ((3, 2), (336, 336), (406, 266))
    assert (found.num_views, found.num_visual_tokens, found.num_tokens) == (7, 448, 454)
    assert found.num_patches == 6 * 576 + 29 * 19
    assert [view.kind for view in found.views] == ["slice"] * 6 + ["overview"]
    assert [(view.row, view.col) for view in found.views[:3]] == [(0, 0), (0, 1), (1, 0)]


def test_one_ulp_decides_squares():
    """ln(2/3) and ln(3/2) differ in the last bit, so released code cuts a large square into 2 rows x 3 columns."""
    assert plan((1008, 1008), "llava-uhd").grid == (2, 3)
    assert plan((475, 475), "llava-uhd").grid == (2, 1)
    best, second, *others = candidates((1008, 1008), "llava-uhd")
    assert (best.grid, second.grid) == ((2, 3), (3, 2))
    assert best.tied
    assert second.tied
    assert not any(other.tied for other in others)
    assert 0 < best.score - second.score < 1e-15


@given(sizes, presets)
def test_slices_tile_the_canvas_exactly_once(image_hw, name):
    config = PRESETS[name]
    for canvas in plan(image_hw, config).canvases:
        assert canvas.size_hw == canvas.content_hw
        assert len(canvas.tiles) == math.prod(canvas.grid)
        rows = sorted({(box.top, box.bottom) for box in canvas.tiles})
        cols = sorted({(box.left, box.right) for box in canvas.tiles})
        for edges, length in ((rows, canvas.size_hw[0]), (cols, canvas.size_hw[1])):
            assert edges[0][0] == 0
            assert edges[-1][1] == length
            assert all(first[1] == second[0] for first, second in pairwise(edges))
        assert [(b.top, b.left) for b in canvas.tiles] == [(top, left) for top, _ in rows for left, _ in cols]
        assert all(box.size_hw == canvas.view_hw for box in canvas.tiles)
        assert all(side % config.unit == 0 for side in canvas.view_hw)


@given(sizes, presets, st.integers(1, 64))
def test_slices_stay_within_the_cap(image_hw, name, cap):
    config = PRESETS[name].replace(max_slices=cap)
    found = plan(image_hw, config)
    slices = sum(view.kind == "slice" for view in found.views)
    assert slices <= cap + (name == "llava-uhd-paper")
    assert slices == (math.prod(found.grid) if found.grid else 0)
    assert found.num_views == slices + 1


def brute_force(image_hw, config):
    """The grid by trying every (rows, columns) pair of an admitted count, fewest slices and columns first."""
    height, width = image_hw
    ideal = min(-(-height * width // config.image_size**2), config.max_slices)
    if config.rule == "released" and ideal <= 1:
        return None
    counts = {ideal - 1, ideal, ideal + 1}
    if config.rule == "released":
        counts = {n for n in counts if 1 < n <= config.max_slices}
    elif ideal <= 2:
        counts = {ideal, ideal + 1}
    grids = [(n // cols, cols) for n in sorted(counts) for cols in range(1, n + 1) if n % cols == 0]
    best = min(grids, key=lambda grid: abs(math.log(width / height) - math.log(grid[1] / grid[0])))
    return None if best == (1, 1) else best


@given(sizes, of_grids, st.integers(1, 40))
def test_the_grid_is_the_brute_force_optimum(image_hw, name, cap):
    config = PRESETS[name].replace(max_slices=cap)
    found = plan(image_hw, config)
    assert found.grid == brute_force(image_hw, config)
    ranked = candidates(image_hw, config)
    if found.grid is None:
        assert ranked == ()
    else:
        assert ranked[0].grid == found.grid
        assert [c.score for c in ranked] == sorted((c.score for c in ranked), reverse=True)
        assert all(c.score <= 0 and c.score == grid_score(image_hw, c.grid) for c in ranked)


@given(sizes, presets)
def test_a_plan_is_a_pure_function(image_hw, name):
    config = PRESETS[name]
    first = plan(image_hw, config)
    again = plan(list(image_hw), SlicingConfig.from_dict(json.loads(json.dumps(config.to_dict()))))
    assert first == again
    assert hash(first) == hash(again)
    assert SlicePlan.from_dict(json.loads(json.dumps(first.to_dict()))) == first


@given(sizes, sizes, sizes)
def test_score_of_a_general_view(image_hw, grid, view_hw):
    """Zero where the cell has the view's aspect; the same for a scaled image; mirrored with everything transposed."""
    cell = (view_hw[0] * grid[0], view_hw[1] * grid[1])
    assert grid_score(cell, grid, view_hw) == pytest.approx(0, abs=1e-12)
    score = grid_score(image_hw, grid, view_hw)
    assert score <= 0
    assert grid_score((3 * image_hw[0], 3 * image_hw[1]), grid, view_hw) == pytest.approx(score, abs=1e-12)
    assert grid_score(image_hw[::-1], grid[::-1], view_hw[::-1]) == pytest.approx(score, abs=1e-12)
    assert grid_score(image_hw, grid) == grid_score(image_hw, grid, (336, 336))


@given(sizes)
def test_the_clamp_touches_degenerate_views_only(image_hw):
    """The safe preset keeps 576 patches a view, and equals the released one wherever that does."""
    safe, released = plan(image_hw, "llava-uhd-safe"), plan(image_hw, "llava-uhd")
    assert safe.grid == released.grid
    for ours, theirs in zip(safe.views, released.views, strict=True):
        assert ours.num_patches <= 576
        if theirs.num_patches <= 576:
            assert ours.size_hw == theirs.size_hw
        else:
            shorter = min(theirs.patches_hw)
            assert min(ours.patches_hw) == shorter
            assert max(ours.patches_hw) == 576 // shorter


def test_the_clamp_at_known_extremes():
    assert plan((5000, 1), "llava-uhd").overview_hw == (23758, 14)
    assert plan((5000, 1), "llava-uhd-safe").overview_hw == (576 * 14, 14)
    assert plan((5000, 1)) == plan((5000, 1), "llava-uhd-safe")
    assert all(
        view.num_patches <= 1024 for view in plan((1000, 3), SlicingConfig.preset("minicpm-v", clamp=True)).views
    )


@given(sizes, presets, st.integers(1, 1200))
def test_max_tokens_lowers_the_number_of_slices(image_hw, name, budget):
    config = PRESETS[name]
    free = plan(image_hw, config)
    overview = plan(image_hw, config.replace(max_slices=1, rule="released"))  # never cut
    if overview.num_tokens > budget:
        with pytest.raises(ValueError, match=f"max_tokens is {budget}"):
            plan(image_hw, config, max_tokens=budget)
        return
    found = plan(image_hw, config, max_tokens=budget)
    assert found.num_tokens <= budget
    if free.num_tokens <= budget:
        assert (found.grid, found.canvases) == (free.grid, free.canvases)
    # no larger cap would have fitted
    slices = math.prod(found.grid) if found.grid else 0
    for cap in range(slices + 1, config.max_slices + 1):
        larger = plan(image_hw, config.replace(max_slices=cap))
        assert larger.num_tokens > budget or larger.grid == found.grid
    ranked = candidates(image_hw, config, max_tokens=budget)
    assert (ranked[0].grid if ranked else None) == found.grid


def test_max_tokens_below_the_overview_says_what_it_costs():
    with pytest.raises(ValueError, match=r"1008x672 px .* alone takes 64 tokens .* raise it to 64"):
        plan((1008, 672), max_tokens=63)
    assert plan((1008, 672), max_tokens=64).grid is None


@pytest.mark.parametrize("cap", range(1, 65))
def test_any_cap(cap):
    config = SlicingConfig.preset("llava-uhd", max_slices=cap)
    found = plan((336 * cap, 336), config)
    assert found.grid == ((cap, 1) if cap > 1 else None)
    bound = config.worst_case()
    assert (bound.num_views, bound.num_tokens) == (found.num_views, found.num_tokens)


@given(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), presets, st.integers(1, 30), st.booleans())
def test_worst_case_is_an_upper_bound(image_hw, name, cap, clamp):
    config = PRESETS[name].replace(max_slices=cap, clamp=clamp)
    bound = config.worst_case()
    named = plan(bound.image_hw, config)
    assert named.num_tokens <= bound.num_tokens
    if config.tokens_per_view and not config.fits_latents:
        assert (named.num_views, named.num_tokens) == (bound.num_views, bound.num_tokens)
    if max(image_hw) > 200 * min(image_hw):
        return
    found = plan(image_hw, config)
    assert found.num_views <= bound.num_views
    assert found.num_patches <= bound.num_patches
    assert found.num_tokens <= bound.num_tokens
    assert all(view.num_patches <= bound.view_patches for view in found.views)


@pytest.mark.parametrize("name", ["llava-uhd", "minicpm-v-4.6"])
def test_worst_case_without_a_clamp_knows_its_aspect(name):
    strip = (1, 5000)
    config = SlicingConfig.preset(name)
    assert plan(strip, config).num_patches > config.worst_case().view_patches
    assert plan(strip, config).num_patches <= config.worst_case(max_aspect=5000).view_patches
    with pytest.raises(ValueError, match="at least 1"):
        config.worst_case(max_aspect=0.5)


def test_worst_case_of_the_default_and_of_a_token_budget():
    assert tuple(SlicingConfig.preset("llava-uhd-safe").worst_case())[:4] == (8, 576, 8 * 576, 8 * 64 + 7)
    assert SlicingConfig.preset("llava-uhd-safe", max_tokens=200).worst_case().num_tokens <= 200
    bound = SlicingConfig.preset("minicpm-v-4.6", max_tokens=400).worst_case()
    assert (bound.num_tokens, bound.num_patches) == (400, 400 * 16)


def cell_of(image_hw, grid):
    return image_hw[0] / grid[0], image_hw[1] / grid[1]


@given(st.floats(1.0001, 20), st.floats(-math.log(6), math.log(6)))
def test_appendix_bounds_hold_from_two_slices_on(area, log_aspect):
    """Paper, appendix: slice aspect in [1/2, 2], area in [1/3, 3/2] of the ViT's, for 1 < N <= 20, aspect in [1/6, 6].

    They hold for the cell of the image itself, where a single slice is not allowed and the cap is above N.
    """
    aspect = math.exp(log_aspect)
    image_hw = (round(3360 * math.sqrt(area / aspect)), round(3360 * math.sqrt(area * aspect)))
    config = SlicingConfig(image_size=3360, patch_size=14, max_slices=64)
    grid = plan(image_hw, config).grid
    if grid is None:  # rounding to whole pixels brought the area down to one view's
        assert area < 1.01
        return
    height, width = cell_of(image_hw, grid)
    assert 1 / 2 - 1e-3 <= width / height <= 2 + 1e-3
    assert 1 / 3 - 1e-3 <= height * width / 3360**2 <= 3 / 2 + 1e-3


def test_appendix_bounds_fail_outside_their_range():
    """At N = 1 an image is not cut, so its view is as elongated as it; above the cap a slice is larger than a view."""
    uncut = plan((130, 780), "llava-uhd")
    assert uncut.grid is None
    assert uncut.overview_hw[1] / uncut.overview_hw[0] > 5
    capped = plan((3000, 4000), "llava-uhd")
    height, width = cell_of((3000, 4000), capped.grid)
    assert height * width / 336**2 > 15


@pytest.mark.parametrize(
    "size, message",
    [
        ((0, 10), "height 0"),
        ((10, -3), "width -3"),
        ((1_000_001, 10), "1..1000000"),
        ((10.5, 10), "whole numbers"),
        ((10.0, 10), "whole numbers"),
        ((True, 10), "whole numbers"),
        (("10", 10), "whole numbers"),
        ((10,), "whole numbers"),
        ((10, 10, 3), "whole numbers"),
        (7, "whole numbers"),
    ],
)
def test_bad_sizes_say_what_to_do(size, message):
    for ask in (plan, candidates):
        with pytest.raises(ValueError, match=message):
            ask(size)


def test_what_is_no_size_or_dictionary_raises():
    with pytest.raises(ValueError, match=r"positive, got image_hw=\(0, 3\)"):
        grid_score((0, 3), (1, 1))
    with pytest.raises(ValueError, match="not the dictionary of a SlicePlan: .*missing"):
        SlicePlan.from_dict({})
    with pytest.raises(ValueError, match="SlicingConfig has no \\['slices'\\]"):
        SlicingConfig.from_dict({"slices": 3})


def test_numpy_integers_are_sizes_and_settings():
    assert SlicingConfig(max_slices=np.int64(3)) == SlicingConfig(max_slices=3)
    assert plan((np.int32(1008), np.uint16(672))) is plan((1008, 672))


def test_unknown_presets_name_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'llava-uhd"):
        plan((10, 10), "lava-uhd")
    with pytest.raises(TypeError, match="got int"):
        plan((10, 10), 7)
    assert SlicingConfig.preset("MiniCPM_V") == PRESETS["minicpm-v"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"max_slices": 0}, "max_slices must be a positive int"),
        ({"patch_size": 14.0}, "patch_size must be a positive int"),
        ({"max_tokens": 0}, "max_tokens must be a positive int or None"),
        ({"rounding": "ceil"}, "'floor' or 'round'"),
        ({"rule": "paper"}, "'released' or 'march2024'"),
        ({"rule": "march2024", "rounding": "round"}, "march2024"),
        ({"image_size": 13}, "smaller than patch_size"),
        ({"separators": 3}, "must be a SeparatorCount"),
        ({"clamp": "no"}, "clamp must be True or False"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        SlicingConfig(**change)


def test_strategies_are_presets_by_name():
    assert PRESETS.keys() <= uhd.strategies().keys()
    assert uhd.strategy("llava_uhd")((1008, 672)) == plan((1008, 672), "llava-uhd")
    assert "3x2 slices of 336x336 px" in str(plan((1008, 672)))


@pytest.mark.parametrize(
    "name, view_patches, seen",
    [
        ("llava-uhd", 576, 576),
        ("llava-uhd-safe", 576, 576),
        ("llava-uhd-paper", 576, 576),
        ("minicpm-v", 1304, 1110),
        ("minicpm-v-4.6", 2608, 1808),
        ("minicpm-v-4.6-4x", 1368, 1280),
    ],
)
def test_worst_case_is_no_looser_than_it_was(name, view_patches, seen):
    """``seen`` is the most of some strips: at 336 px nothing lies between that and the bound."""
    config = SlicingConfig.preset(name)
    bound = config.worst_case()
    assert bound.view_patches <= view_patches
    assert bound.num_patches == bound.view_patches * bound.num_views
    found = plan(bound.image_hw, config)
    assert (found.num_views, found.num_tokens) == (bound.num_views, bound.num_tokens) or config.merge > 1
    strips = [(h, h * aspect) for h in range(1, 600) for aspect in (1, 3, 10, 37, 100, 199, 200)]
    most = max(v.num_patches for h, w in strips for size in ((h, w), (w, h)) for v in plan(size, config).views)
    assert seen == most <= bound.view_patches


def test_a_lone_best_grid_is_not_tied():
    first, *others = candidates((1008, 672))
    assert (first.grid, first.tied) == ((3, 2), False)
    assert not any(other.tied for other in others)


def test_the_longest_side_is_planned_and_one_more_is_not():
    for size in ((MAX_SIDE, 300), (300, MAX_SIDE), (MAX_SIDE, MAX_SIDE)):
        assert plan(size).image_hw == size
        assert plan_many([size])["num_tokens"].tolist() == [plan(size).num_tokens]
    for size in ((MAX_SIDE + 1, 300), (300, MAX_SIDE + 1)):
        for call in (plan, lambda size: plan_many([size])):
            with pytest.raises(ValueError, match=r"each must lie in 1\.\.1000000 px"):
                call(size)
    assert MAX_SIDE == 1_000_000


@given(size=sizes, preset=of_grids, first=st.booleans())
def test_the_planners_own_grid_gives_its_own_plan(size, preset, first):
    config = SlicingConfig.preset(preset, overview_first=first)
    found = plan(size, config)
    assert plan_from_grid(size, found.grid, config) == found


def test_a_grid_of_ones_own():
    found = plan_from_grid((900, 600), (4, 3), "minicpm-v")  # 12 slices, above the preset's cap of 9
    assert (found.grid, found.num_views, [view.kind for view in found.views[:2]]) == (
        (4, 3),
        13,
        ["overview", "slice"],
    )
    assert found.num_tokens == 13 * 64 + 5 - 1 + 2 * 12 + 4
    assert found.canvases[1].size_hw == (4 * found.slice_hw[0], 3 * found.slice_hw[1])
    assert plan_from_grid((900, 600), (1, 1)) == plan_from_grid((900, 600), None)
    assert plan_from_grid((900, 600), (1, 1)).grid is None


@pytest.mark.parametrize("grid", [(2,), (0, 3), (2.0, 3), (True, 2), 6, "23", (1, 2, 3)])
def test_what_is_no_grid_is_refused(grid):
    refuses(r"a grid is two whole numbers \(rows, columns\) from 1", plan_from_grid, (30, 50), grid)


def test_a_grid_needs_the_adaptive_planner_and_its_bounds():
    refuses(
        "under a SlicingConfig or the name of one", plan_from_grid, (30, 50), (1, 2), find("clip"), error=TypeError
    )
    refuses("no slicing preset named 'clip'", plan_from_grid, (30, 50), (1, 2), "clip")
    refuses("at most 65536 are planned", plan_from_grid, (3000, 5000), (300, 300))
    refuses("at most 65536 are planned", plan_from_grid, (30, 50), (256, 256))
    refuses("is too large, .* would not fit in memory", plan_from_grid, (900, 600), (255, 256))
    tight = SlicingConfig(max_tokens=200)
    refuses("costs 259 tokens under 'custom', max_tokens is 200", plan_from_grid, (30, 50), (3, 1), tight)


@pytest.mark.parametrize(
    "orientation, size_hw", [(None, (300, 700)), (1, (300, 700)), (3, (300, 700)), (6, (700, 300))]
)
def test_a_picture_is_planned_upright(orientation, size_hw, tmp_path):
    image = Image.new("RGB", (700, 300))
    if orientation is not None:
        image.getexif()[0x0112] = orientation
        image.save(tmp_path / "turned.jpg", exif=image.getexif())
        with Image.open(tmp_path / "turned.jpg") as opened:
            assert uhd.plan(opened, "llava-next") == uhd.plan(size_hw, "llava-next")
        assert image_size_hw(tmp_path / "turned.jpg") == size_hw
    assert uhd.plan(image, max_tokens=500).image_hw == size_hw
