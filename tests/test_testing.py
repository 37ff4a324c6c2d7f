"""The checker finds each kind of broken rule and says so; the hypothesis strategies make what they promise."""

import math
import pathlib
import random
import re
from dataclasses import replace

import pytest
from hypothesis import find, given, settings

from tests.tiny import refuses
from uhd.slicing import Box, SlicePlan, SlicingConfig, plan, plan_from_grid
from uhd.slicing.strategies import STRATEGIES
from uhd.testing import (
    CHECKS,
    DRAWN,
    EXTREMES,
    SIZES,
    check_strategy,
    image_sizes,
    inspect_strategy,
    near_ties,
    plans,
    slicing_configs,
)

PASTED = 'uhd.SlicingConfig.preset("minicpm-v")'
DOCS = pathlib.Path(__file__).parent.parent / "docs"


def good(size):
    return plan(size, "llava-uhd")


def planning(rule="llava-1.5", **changes):
    """A rule that plans as this one, but for these fields of the plan."""
    return lambda size: replace(plan(size, rule), **changes)


def drawing(**changes):
    """A rule that plans one view, but for these fields of its canvas."""

    def rule(size):
        found = plan(size, "llava-1.5")
        return replace(found, canvases=(replace(found.canvases[0], **changes),))

    return rule


calls = []


def stateful(size):
    calls.append(size)
    return replace(good(size), num_separators=len(calls))


def lists(size):
    return replace(good(size), image_hw=size, grid=[1, 2])


def source_beyond(size):
    return drawing(source=Box(0, 0, size[0] + 1, size[1]))(size)


def half(size):
    return drawing(source=Box(0, 0, max(size[0] // 2, 1), size[1]))(size)


def free(size):
    return replace(drawing(tokens_per_view=0)(size), num_visual_tokens=0)


def by_height(size):
    return replace(good(size), num_separators=size[0])


def crashes_on_strips(size):
    return plan(size, "llava-1.5") if 1000 / (min(size) - 1) else None


def refuses_everything(size):
    raise ValueError("no")


@pytest.mark.parametrize(
    "rule, check, words",
    [
        (stateful, "purity", "and then"),
        (lists, "purity", "use tuples"),
        (drawing(tiles=(Box(0, 0, 10**7, 10),)), "geometry", "is not on the"),
        (drawing(fill=None), "geometry", "give an RGB fill"),
        (source_beyond, "geometry", "is not in the image"),
        (planning("monkey", grid=(3, 3)), "geometry", "but 4 slices"),
        (planning(num_visual_tokens=7), "geometry", "num_visual_tokens is 7"),
        (drawing(kind="crop"), "geometry", "kind is 'crop'"),
        (drawing(view_hw=(336.0, 336.0)), "geometry", "view_hw[0] must be a whole number, got 336.0"),
        (planning(resample="sharpest"), "geometry", "resample is 'sharpest': take one of bicubic"),
        (drawing(fill=(0, 0, 700)), "geometry", "(0, 0, 700) is no RGB colour"),
        (drawing(fill=(0,)), "geometry", "fill must be a list of 3, got (0,)"),
        (drawing(tiles=()), "geometry", "its grid is (1, 1) (rows, columns), its tiles are 0"),
        (drawing(grid=(2, 2)), "geometry", "its grid is (2, 2) (rows, columns), its tiles are 1"),
        (drawing(source=Box(0, 0, 0, 0)), "geometry", "source (0, 0, 0, 0) is not in the image"),
        (planning(patch_size=0), "geometry", "patch_size is 0"),
        (planning("monkey", grid=None), "geometry", "4 slices and no grid"),
        (planning(grid=(2, 3)), "geometry", "grid (2, 3) (rows, columns) but 0 slices"),
        (planning(num_visual_tokens=-9), "budget", "-9 tokens"),
        (drawing(view_hw=(330, 336)), "divisibility", "a view of 330x336 px with patches of 14 px"),
        (half, "coverage", "50.0% of the image"),
        (free, "budget", "0 tokens"),
        (by_height, "transposition", "when turned"),
        (crashes_on_strips, "extremes", "ZeroDivisionError"),
        (refuses_everything, "returns", "ValueError: no"),
        (lambda size: None, "returns", "must return a SlicePlan"),
    ],
)
def test_a_broken_rule_is_explained(rule, check, words):
    report = inspect_strategy(rule, drawn=0)
    broken = {failure.check: failure for failure in report.failures}
    assert check in broken
    assert words in str(broken[check])
    refuses(check, check_strategy, rule, drawn=0, error=AssertionError)
    rest = inspect_strategy(rule, skip=[check], drawn=0)
    assert check not in {failure.check for failure in rest.failures}


def test_a_plan_without_views_is_reported():
    assert "geometry: the plan's parts contradict" in str(inspect_strategy(planning(canvases=()), drawn=0))


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_released_rule_is_sound(name):
    skip = ("divisibility", "coverage", "transposition")
    assert check_strategy(name, skip=skip, sizes_hw=SIZES[:6], drawn=50).planned > 6


def test_an_aspect_below_one_is_refused():
    refuses("max_aspect is longer / shorter side, so at least 1, got 0.5", image_sizes, max_aspect=0.5)


def test_bounds():
    assert check_strategy(good, drawn=0, max_tokens=600, max_patches=40_000).ok
    with pytest.raises(AssertionError, match=r"454 tokens, max_tokens=300(.|\n)*and \d+ more"):
        check_strategy(good, drawn=0, max_tokens=300)
    refuses("max_patches=500", check_strategy, good, max_patches=500, drawn=0, error=AssertionError)


def test_released_rules():
    assert (
        str(check_strategy("llava-uhd-safe"))
        == "llava-uhd-safe: 2,284 sizes tried, 264 of them near ties; 2,284 planned, 0 refused, every law holds"
    )
    assert check_strategy("qwen2-vl", drawn=0).refused == 3  # extremes may be refused
    assert [f.check for f in inspect_strategy("siglip", drawn=0).failures] == ["divisibility"]
    assert [f.check for f in inspect_strategy("clip", drawn=0).failures] == ["coverage"]
    assert [f.check for f in inspect_strategy("llava-next", drawn=0).failures] == ["transposition"]
    assert check_strategy("llava-next", skip=["transposition"], drawn=0).ok
    assert check_strategy(SlicingConfig(max_slices=3), drawn=0).name == "custom"
    assert [f.check for f in inspect_strategy("qwen2-vl", sizes_hw=[(1, 500)], drawn=0).failures] == ["returns"]


@pytest.mark.parametrize("law", ["transposition", "coverage"])
def test_a_fault_in_four_of_a_thousand_sizes_is_seen(law):
    """Whichever these are: each of the faults is in other sizes, none in a usual one."""
    wrong = {
        "transposition": lambda found: replace(found, num_separators=found.num_separators + 1),
        "coverage": lambda found: plan(found.image_hw, "clip"),
    }[law]
    for number in range(3):

        def rule(size, number=number):
            found = plan(size, "llava-uhd-safe")
            struck = size not in SIZES and size[0] < 3 * size[1] and random.Random(f"{number} {size}").random() < 0.004
            return wrong(found) if struck else found

        assert inspect_strategy(rule, extremes_hw=(), drawn=0).ok
        assert law in {failure.check for failure in inspect_strategy(rule, extremes_hw=()).failures}, number


def test_a_rule_that_rounds_at_ties_is_seen():
    """It compares aspects instead of their logarithms: wrong only where two grids fit nearly alike."""

    grids = ((1, 3), (3, 1), (1, 2), (2, 1), (2, 2))

    def rounding(size):
        misfits = {grid: abs(math.log(size[1] / size[0]) - math.log(grid[1] / grid[0])) for grid in grids}
        return plan_from_grid(size, min(grids, key=lambda grid: (round(misfits[grid], 2), grid[1])), "llava-uhd")

    assert "transposition" in {failure.check for failure in inspect_strategy(rounding, drawn=1).failures}
    usual = inspect_strategy(
        rounding, drawn=0, extremes_hw=(), sizes_hw=[size for size in SIZES if len(set(size)) == 2]
    )
    assert usual.ok


def test_drawn_sizes_are_refused_without_harm_and_counted():
    def picky(size):
        if size[0] % 7 == 3 and size not in SIZES:
            raise ValueError("no")
        return good(size)

    report = inspect_strategy(picky, skip=["transposition"])
    assert report.ok
    assert 250 < report.refused < 450
    assert report.planned + report.refused == len(SIZES) + len(EXTREMES) + DRAWN + len(near_ties())
    refuses("drawn is a whole number of sizes", inspect_strategy, good, drawn=-1)


def test_unknown_checks_and_names_raise():
    refuses(r"no checks \['colour'\]; there are returns, purity", inspect_strategy, good, skip=["colour"])
    refuses("no strategy named", check_strategy, "lava")


def test_arguments_are_read_strictly():
    refuses(r"write \['budget'\]", check_strategy, good, skip="budget", error=TypeError)
    refuses("max_tokens must be a positive int", check_strategy, good, max_tokens="900")
    refuses("max_patches must be a positive int", check_strategy, good, max_patches=0)
    for sizes in ([(300.5, 400)], (300, 400)):
        refuses("in whole px", check_strategy, good, sizes_hw=sizes, drawn=0)
        refuses("in whole px", check_strategy, good, extremes_hw=sizes, drawn=0)


def test_every_check_is_documented():
    for check in CHECKS:
        assert re.search(rf"^    {check} ", check_strategy.__doc__, re.M)
        assert f"`{check}`" in (DOCS / "compare.md").read_text()


@given(image_sizes(min_side=20, max_side=900, max_aspect=5))
def test_sizes_keep_their_bounds(size):
    assert 20 <= min(size) <= max(size) <= 900
    assert max(size) <= 5 * min(size)


@pytest.mark.parametrize(
    "wanted",
    [lambda s: s[0] == s[1], lambda s: s[0] == s[1] + 1, lambda s: s[1] > 50 * s[0], lambda s: s[0] > 50 * s[1]],
)
def test_sizes_reach_squares_their_neighbours_and_strips(wanted):
    assert wanted(find(image_sizes(), wanted))


def test_size_bounds_are_checked():
    refuses("min_side <= max_side", image_sizes, min_side=9, max_side=3)


@given(plans("qwen2-vl"))
@settings(max_examples=20)
def test_plans_leave_out_refused_sizes(found):
    assert isinstance(found, SlicePlan)
    assert max(found.image_hw) <= 200 * min(found.image_hw)


@given(plans(slicing_configs(), sizes_hw=image_sizes(max_side=2000)))
def test_plans_of_drawn_configs(found):
    assert found.strategy == "custom"
    assert all(side % found.patch_size == 0 for view in found.views for side in view.size_hw)


def test_usual_sizes_are_rectangles_and_squares_both_ways():
    assert any(h > w for h, w in SIZES)
    assert any(h < w for h, w in SIZES)
    assert any(h == w for h, w in SIZES)


@pytest.mark.parametrize("number", range(6))
def test_the_guides_code_runs(number, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "compare.md").read_text(), re.S)
    assert len(blocks) == 6
    exec(compile(blocks[number], f"compare.md, block {number}", "exec"), {"__name__": "guide"})
    printed = capsys.readouterr().out
    assert ("0.44", "20 llava-uhd 454", PASTED, "-> 4x3 slices", "1 laws broken", "")[number] in printed
