"""Borders that avoid content: where they go, and that every law of a plan holds for what results."""

import json
import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uhd.slicing import (
    PRESETS,
    SlicingConfig,
    image_to_view,
    locate,
    plan,
    plan_from_grid,
    view_box,
    view_to_image,
    worst_case,
)
from uhd.slicing.borders import Gradient, content_cut, even_borders, move_borders, moved_borders, with_borders
from uhd.slicing.metrics import measure, share_seen
from uhd.slicing.plan import Box, SlicePlan, contradictions
from uhd.testing import EXTREMES, check_strategy, drawn_sizes, image_sizes, slicing_configs

SAFE = PRESETS["llava-uhd-safe"].replace(border_moves=2)


def of(pixels):
    """What is asked for of an image that is there."""
    return lambda box: pixels[box.top : box.bottom, box.left : box.right]


def made(box, seed=0):
    """Any image's px from their places, so that one of 10^12 px need not be there: blocks of noise on white."""
    y, x = np.ogrid[box.top : box.bottom, box.left : box.right]
    hashed = (y // 3 * 73_856_093) ^ (x // 5 * 19_349_663) ^ (seed * 83_492_791)
    ink = np.where(hashed % 7 < 3, hashed % 251, 255)
    return np.stack([ink, ink // 2, 255 - ink], axis=-1).astype(np.uint8)


def page(height, width, seed=0):
    return made(Box(0, 0, height, width), seed)


def slowly(found, config, pixels):
    """The borders of the best moves, as the rule is described: a sum for every candidate, in Python's own numbers."""
    grey = [[(int(r) + 2 * int(g) + int(b)) // 4 for r, g, b in row] for row in pixels.tolist()]
    result = []
    for axis, lines in enumerate((grey, list(map(list, zip(*grey, strict=True))))):
        side, count = found.image_hw[axis], found.grid[axis]
        patch = Fraction(side, count) / Fraction(found.slice_hw[axis], config.patch_size)
        reach = math.floor(min(config.border_moves * patch, Fraction(side // count - math.ceil(patch), 2)))
        step = max(side // (count * found.slice_hw[axis]), math.ceil(reach / 32), 1)
        places = []
        for number in range(1, count):
            even = math.floor(Fraction(side * number, count) + Fraction(1, 2))
            moves = [move for move in range(-reach, reach + 1) if move % step == 0] or [0]
            places.append(even + min(moves, key=lambda move: (cost(lines, even + move), abs(move), move)))
        result.append(tuple(places))
    return tuple(result)


def cost(lines, place):
    across = sum(abs(a - b) for a, b in zip(lines[place - 1], lines[place], strict=True))
    along = sum(abs(a - b) for line in lines[place - 1 : place + 1] for a, b in pairwise(line))
    return across + along


@pytest.mark.parametrize("size_hw", [(300, 410), (411, 290), (40, 1050), (1200, 90)])
@pytest.mark.parametrize("name, moves", [("llava-uhd-safe", 1), ("llava-uhd-safe", 4), ("minicpm-v", 2)])
def test_borders_are_where_a_slow_search_finds_least(size_hw, name, moves):
    config = PRESETS[name].replace(border_moves=moves, image_size=140)
    pixels, found = page(*size_hw), plan(size_hw, config)
    moved = move_borders(found, config, of(pixels))
    assert (moved_borders(moved) or even_borders(moved)) == slowly(found, config, pixels)
    assert moved != found


def test_a_step_is_a_pixel_of_the_view():
    """A slice of 112 px shows 350 px of the image: the candidates are 3 px apart, and a 32nd of the way would be 2."""
    config = SAFE.replace(image_size=112, max_slices=4, border_moves=1)
    found = plan((700, 700), config)
    assert (found.grid, found.slice_hw) == ((2, 2), (112, 112))
    moves = set()
    for seed in range(3):
        pixels = page(700, 700, seed)
        borders = moved_borders(move_borders(found, config, of(pixels)))
        assert borders == slowly(found, config, pixels)
        moves |= {lines[0] - 350 for lines in borders}
    assert not any(move % 3 for move in moves)
    assert any(move % 2 for move in moves)


def test_bounds_cover_slices_between_moved_borders():
    """22 patches of 14 px are one view's px of 66 x 66; of equal slices up to 2:1 none has more than 3 x 7."""
    few, more = (SlicingConfig(image_size=66, border_moves=moves) for moves in (0, 2))
    assert [worst_case(config, max_aspect=2).view_patches for config in (few, more)] == [21, 22]


def test_a_line_of_print_is_not_cut():
    found = plan((800, 600), SAFE)
    pixels = np.full((800, 600, 3), 255, np.uint8)
    pixels[255:275, 1::2] = 0
    moved = move_borders(found, SAFE, of(pixels))
    assert moved_borders(moved) == ((276, 533), (300,))  # below it 276 is nearest, above it 254
    assert content_cut(found, pixels) > 0.05
    assert content_cut(moved, pixels) < 0.01  # the line is too long for a border between columns to avoid it


@pytest.mark.parametrize("place", [1, 1023, 1024, 1025, 2047, 2048, 2199])
def test_every_change_along_a_border_counts(place):
    """Also between the pieces of a long border, and once: the rows around it change at one column alone."""
    found, pixels = plan_from_grid((300, 2200), (2, 1), SAFE), np.zeros((300, 2200, 3), np.uint8)
    pixels[147:153, place:] = 1
    assert [cost(pixels[..., 0].tolist(), row) for row in (150, 146, 154)] == [2, 0, 0]
    assert moved_borders(move_borders(found, SAFE, of(pixels))) == ((146,), ())


def test_neighbours_that_near_each_other_leave_a_patch():
    """Both borders want to be in the middle, and 2.4 px are a patch: they stop 4 px apart, at 73 and 77."""
    config = SAFE.replace(border_moves=99)
    found, pixels = plan_from_grid((150, 60), (3, 1), config), np.zeros((150, 60, 3), np.uint8)
    pixels[:, ::2] = np.abs(np.arange(150) - 75)[:, None, None] * 3
    moved = move_borders(found, config, of(pixels))
    assert moved_borders(moved) == ((73, 77), ())
    check(found, moved, config)


def test_of_equal_costs_the_smallest_move_and_then_the_one_up_wins():
    blank = np.zeros((800, 600, 3), np.uint8)
    found = plan((800, 600), SAFE)
    assert move_borders(found, SAFE, of(blank)) is found
    blank[266:268, 1::2] = 255  # the border at 267 lies in its middle
    assert moved_borders(move_borders(found, SAFE, of(blank))) == ((265, 533), (300,))


def test_colours_and_both_directions_count():
    found, pixels = plan((400, 800), SAFE), np.zeros((400, 800, 3), np.uint8)
    assert found.grid == (1, 2)
    for channel in range(3):
        for hatched in (np.s_[::2, 398:402], np.s_[:, 400:402]):
            pixels[...] = 0
            pixels[(*hatched, channel)] = 200
            assert moved_borders(move_borders(found, SAFE, of(pixels))), (channel, hatched)


def check(found, moved, config):
    """Every law of a plan, and what moving may not change."""
    assert not list(contradictions(moved))
    assert SlicePlan.from_dict(json.loads(json.dumps(moved.to_dict()))) == moved
    same = ("image_hw", "grid", "num_views", "num_tokens", "num_visual_tokens", "num_separators", "overview_hw")
    assert [getattr(moved, name) for name in same] == [getattr(found, name) for name in same]
    assert [(view.kind, view.row, view.col) for view in moved.views] == [
        (view.kind, view.row, view.col) for view in found.views
    ]
    slices = [view for view in moved.views if view.kind == "slice"]
    for view in slices:
        assert not any(side % config.unit for side in view.size_hw)
        assert view.num_patches <= config.view_budget * config.merge**2
    assert moved.num_patches <= config.worst_case().num_patches
    ys, xs = moved_borders(moved)
    for axis, (lines, even) in enumerate(zip((ys, xs), even_borders(found), strict=True)):
        patch = Fraction(found.image_hw[axis] * config.patch_size, found.grid[axis] * found.slice_hw[axis])
        assert all(abs(a - b) <= config.border_moves * patch for a, b in zip(lines, even, strict=True))
        edges = [0, *lines, found.image_hw[axis]]
        assert lines == even or all(b - a >= patch for a, b in pairwise(edges))
    boxes = [view_box(moved, view.index) for view in slices]
    assert [tuple(map(int, box)) for box in boxes] == [
        (top, left, bottom, right)
        for top, bottom in zip((0, *ys), (*ys, found.image_hw[0]), strict=True)
        for left, right in zip((0, *xs), (*xs, found.image_hw[1]), strict=True)
    ]
    assert all(side.denominator == 1 for box in boxes for side in box)
    assert with_borders(found, (ys, xs), config) == moved


def check_maps(moved, point):
    """A point is in one slice and the overview, and comes back from each."""
    hits = locate(moved, point)
    assert sorted(moved.views[hit.view].kind for hit in hits) == ["overview", "slice"]
    for hit in hits:
        assert image_to_view(moved, hit.view, point) == hit.point
        assert view_to_image(moved, hit.view, hit.point) == point


def cutting(config):
    """The same rule with small views and some slices, so that most images are cut."""
    side = min(config.image_size, 7 * config.unit)
    slices, tokens = max(config.max_slices, 4), config.tokens_per_view or 5
    return config.replace(image_size=side, max_slices=slices, tokens_per_view=tokens)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(slicing_configs().map(cutting), image_sizes(), st.integers(1, 9), st.integers(0, 99), st.integers(0, 10**6))
def test_every_law_holds_for_moved_borders(config, size_hw, moves, seed, where):
    config = config.replace(border_moves=moves)
    found = plan(size_hw, config)
    moved = move_borders(found, config, lambda box: made(box, seed))
    assert move_borders(found, config, lambda box: made(box, seed)) == moved
    if moved_borders(moved) is None:
        assert moved is found
        return
    assert move_borders(moved, config, lambda box: made(box, seed + 1)) is moved
    check(found, moved, config)
    check_maps(moved, (where % size_hw[0], where * 7 % size_hw[1]))


@pytest.mark.slow
def test_every_law_holds_for_100_000_sizes_and_images():
    configs = [PRESETS[name].replace(border_moves=moves) for name in PRESETS for moves in (1, 2, 5)
               if PRESETS[name].tokens_per_view]  # fmt: skip
    configs += [config.replace(cut_by="shape") for config in configs if config.rule == "released"]
    moved = 0
    for number, size_hw in enumerate(drawn_sizes(100_000)):
        config = configs[number % len(configs)]
        found = plan(size_hw, config)
        result = move_borders(found, config, lambda box, seed=number: made(box, seed))
        if moved_borders(result) is not None:
            moved += 1
            check(found, result, config)
            check_maps(result, (number % size_hw[0], number * 7 % size_hw[1]))
    assert moved > 50_000


def test_moved_plans_keep_every_law_of_a_strategy():
    """Of all sizes, extremes too, of one image each: the same px turned for the size turned."""

    def rule(image_hw):
        return move_borders(plan(image_hw, SAFE), SAFE, lambda box: made(box))

    worst = SAFE.worst_case()
    sizes = [size for size in EXTREMES if math.prod(size) < 10**6]
    check_strategy(rule, drawn=200, extremes_hw=sizes, max_tokens=worst.num_tokens, max_patches=worst.num_patches)


@pytest.mark.parametrize("size_hw", [(700, 1000), (1500, 300), (200, 800)])
def test_turning_the_image_turns_its_borders(size_hw):
    pixels = np.random.default_rng(0).integers(0, 256, (*size_hw, 3), np.uint8)
    ys, xs = moved_borders(move_borders(plan(size_hw, SAFE), SAFE, of(pixels)))
    turned = move_borders(plan(size_hw[::-1], SAFE), SAFE, of(pixels.transpose(1, 0, 2)))
    assert moved_borders(turned) == (xs, ys)


def test_metrics_know_moved_slices():
    found, pixels = plan((1080, 1920), SAFE), page(1080, 1920)
    moved = move_borders(found, SAFE, of(pixels))
    assert moved != found
    assert share_seen(moved) == 1
    before, after = measure(found), measure(moved)
    assert (after.coverage, after.duplication, after.padding) == (1, 1, 0)
    assert after.seam == pytest.approx(before.seam)
    assert (after.tokens, after.views) == (before.tokens, before.views)


@pytest.mark.parametrize(
    "size_hw, grid", [((2, 900), (3, 1)), ((1, 1), (2, 2)), ((3, 3), (3, 3)), ((5, 7), (2, 3)), ((336, 336), None)]
)
def test_images_without_room_stay_as_they_are(size_hw, grid):
    found = plan_from_grid(size_hw, grid, SAFE)
    assert move_borders(found, SAFE, of(page(*size_hw))) is found


def test_without_the_option_or_for_other_plans_nothing_moves():
    found = plan((800, 600))
    assert move_borders(found, PRESETS["llava-uhd-safe"], None) is found
    for name in ("monkey-896", "idefics3", "llava-next", "deepseek-vl2", "clip"):
        assert moved_borders(plan((800, 600), name)) is None


@pytest.mark.parametrize(
    "borders", [((), ()), ((300,), (300,)), ((300, 200), (300,)), ((0, 500), (300,)), ((200, 800), (300,))]
)
def test_borders_that_do_not_cut_the_image_are_refused(borders):
    with pytest.raises(ValueError, match="do not cut an image of \\(800, 600\\) px .* grid \\(3, 2\\)"):
        with_borders(plan((800, 600), SAFE), borders, SAFE)


@pytest.mark.parametrize("value", [-1, 1.5, True, "2", None])
def test_moves_are_a_count(value):
    with pytest.raises(ValueError, match="border_moves must be a whole number of at least 0, got"):
        SlicingConfig(border_moves=value)
    none, two = (SlicingConfig(border_moves=np.int64(number)).border_moves for number in (0, 2))
    assert (type(none), none, type(two), two) == (int, 0, int, 2)


def test_moves_need_tokens_that_do_not_follow_from_patches():
    with pytest.raises(ValueError, match="border_moves .* needs tokens_per_view"):
        SlicingConfig.preset("minicpm-v-4.6", border_moves=1)


@pytest.mark.parametrize("name", ["llava-uhd", "llava-next", "monkey-896", "clip", "idefics3"])
def test_content_cut_is_the_share_of_differences_at_seams(name):
    """Against every pair of neighbouring px by itself."""
    pixels = page(300, 410)
    found = plan((300, 410), name)
    from uhd.slicing.metrics import cut_edges

    grey = (pixels[..., 0].astype(int) + 2 * pixels[..., 1].astype(int) + pixels[..., 2].astype(int)) // 4
    every = np.abs(np.diff(grey, axis=0)).sum() + np.abs(np.diff(grey, axis=1)).sum()
    pairs = set()
    for axis, place, start, stop in cut_edges(found):
        for at in range(start, stop):
            one, other = ((place - 1, at), (place, at)) if axis == 0 else ((at, place - 1), (at, place))
            pairs.add((one, other))
            if at + 1 < stop:
                step = (0, 1) if axis == 0 else (1, 0)
                pairs |= {(end, (end[0] + step[0], end[1] + step[1])) for end in (one, other)}
    cut = sum(abs(int(grey[one]) - int(grey[other])) for one, other in pairs)
    assert content_cut(found, pixels) == pytest.approx(cut / every)
    assert content_cut(found, Gradient.of(pixels)) == content_cut(found, pixels)
    assert (content_cut(found, pixels) > 0) == (measure(found).seam > 0)


def test_content_cut_of_nothing_and_of_another_image():
    assert content_cut(plan((800, 600)), np.zeros((800, 600, 3), np.uint8)) == 0
    with pytest.raises(ValueError, match=r"\(800, 600\) px .* this one has \(600, 800\)"):
        content_cut(plan((800, 600)), np.zeros((600, 800, 3), np.uint8))
