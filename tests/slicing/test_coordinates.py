"""Maps between image, canvas, view, patch and token are exact inverses."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uhd.slicing import PRESETS, Box, Canvas, SlicePlan, plan
from uhd.slicing import coordinates as at

sizes = st.tuples(st.integers(1, 4000), st.integers(1, 4000))
plans = st.builds(plan, sizes, st.sampled_from(sorted(PRESETS)))
unit = st.floats(0, 1, exclude_max=True)


@given(plans, st.data())
def test_each_map_undoes_the_other(found, data):
    view = data.draw(st.sampled_from(found.views))
    number = st.one_of(st.integers(-50, 5000), st.floats(-50, 5000), st.fractions(-50, 5000))
    place = data.draw(st.one_of(st.tuples(number, number), st.tuples(number, number, number, number)))
    exact = tuple(Fraction(value) for value in place)
    assert at.canvas_to_image(found, view.canvas, at.image_to_canvas(found, view.canvas, place)) == exact
    assert at.view_to_canvas(found, view.index, at.canvas_to_view(found, view.index, place)) == exact
    assert at.view_to_image(found, view.index, at.image_to_view(found, view.index, place)) == exact
    assert at.image_to_view(found, view.index, at.view_to_image(found, view.index, place)) == exact


@given(plans, unit, unit)
def test_a_point_is_in_the_overview_and_in_one_slice(found, y, x):
    point = [min(part * side, side - 1e-6) for part, side in zip((y, x), found.image_hw, strict=True)]
    hits = at.locate(found, point)
    assert sorted(found.views[hit.view].kind for hit in hits) == ["overview"] + ["slice"] * bool(found.grid)
    for hit in hits:
        top, left, bottom, right = at.patch_box(found, hit.view, hit.patch)
        assert top <= Fraction(point[0]) < bottom
        assert left <= Fraction(point[1]) < right
        assert at.view_to_image(found, hit.view, hit.point) == tuple(map(Fraction, point))
        assert at.patch_at(found, at.patch_index(found, hit.view, hit.patch)) == (hit.view, hit.patch)


@given(plans)
def test_views_partition_the_image_and_its_tokens(found):
    area = {"slice": 0, "overview": 0}
    for view in found.views:
        top, left, bottom, right = at.view_box(found, view.index)
        area[view.kind] += (bottom - top) * (right - left)
    whole = found.image_hw[0] * found.image_hw[1]
    assert area["overview"] == whole
    assert area["slice"] == (whole if found.grid else 0)
    tokens = [token for view in found.views for token in at.token_range(found, view.index)]
    assert tokens == list(range(found.num_visual_tokens))
    for view in found.views:
        ours = at.token_range(found, view.index)
        assert at.view_of_token(found, ours[0]) == at.view_of_token(found, ours[-1]) == view.index


def test_a_known_point():
    """672x1008 is cut 3x2 into 336 px slices without any resize, so slice coordinates are plain offsets."""
    found = plan((1008, 672))
    slice_hit, overview_hit = at.locate(found, (400, 500))
    assert (slice_hit.view, slice_hit.point, slice_hit.patch) == (3, (64, 164), (4, 11))
    assert overview_hit.view == 6
    assert overview_hit.point == (Fraction(400 * 406, 1008), Fraction(500 * 266, 672))
    assert at.view_box(found, 3) == (336, 336, 672, 672)
    assert at.patch_box(found, 3, (0, 1)) == (336, 350, 350, 364)
    assert at.token_range(found, 3) == range(192, 256)


def test_numpy_points_are_points():
    found = plan((1008, 672))
    assert at.locate(found, np.array([400.5, 500], np.float32)) == at.locate(found, (400.5, 500))
    assert at.locate(found, np.array([400, 500]))[0].patch == (4, 11)


def test_padding_cropping_and_a_second_resize():
    """A letterboxed canvas whose one tile is resized once more: the case of strategies that pad."""
    canvas = Canvas(
        "overview", (50, 100), (100, 100), (1, 1), (Box(0, 0, 100, 100),), (28, 28), 4, offset=(25, 0), fill=(0, 0, 0)
    )
    found = SlicePlan((200, 400), 14, (canvas,), None, 4, 0, "letterbox")
    assert at.image_to_canvas(found, 0, (0, 0)) == (25, 0)
    assert at.image_to_view(found, 0, (200, 400)) == (21, 28)
    assert at.view_box(found, 0) == (-100, 0, 300, 400)
    part = Canvas("slice", (20, 20), (20, 20), (1, 1), (Box(0, 0, 20, 20),), (20, 20), 1, source=Box(10, 30, 20, 40))
    found = SlicePlan((200, 400), 14, (part,), (1, 1), 1, 0, "crop")
    assert at.image_to_view(found, 0, (15, 35)) == (10, 10)
    # the view's side is 20 px: the last 6 px are covered by no patch
    assert at.locate(found, (19, 39)) == ()
    assert at.locate(found, (12, 32))[0].patch == (0, 0)


PLACES = {
    "outside the \\(1008, 672\\)": lambda found: at.locate(found, (1008, 3)),
    "24x24 patches .* no patch \\(24, 0\\)": lambda found: at.patch_box(found, 0, (24, 0)),
    "7 views, so no view 7": lambda found: at.view_box(found, 7),
    "visual token 448 is not in 0..447": lambda found: at.view_of_token(found, 448),
    "box .*, got 3 numbers": lambda found: at.image_to_view(found, 0, (1, 2, 3)),
    "point \\(y, x\\), got 3 numbers": lambda found: at.locate(found, (1, 2, 3)),
    "finite number of px, got inf": lambda found: at.locate(found, (1, float("inf"))),
}


@pytest.mark.parametrize("message", PLACES)
def test_places_that_do_not_exist_are_named(message):
    with pytest.raises(ValueError, match=message):
        PLACES[message](plan((1008, 672)))


def test_joined_views_have_no_tokens_of_their_own():
    found = plan((1008, 672))
    stitched = SlicePlan(found.image_hw, 14, found.canvases, found.grid, 300, 0, "stitched")
    with pytest.raises(ValueError, match="joins the views' 448 tokens into 300"):
        at.token_range(stitched, 0)
