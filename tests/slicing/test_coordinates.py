"""Maps between image, canvas, view, patch and token are exact inverses."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uhd.slicing import (
    PRESETS,
    Box,
    Canvas,
    SlicePlan,
    canvas_to_image,
    canvas_to_view,
    image_to_canvas,
    image_to_view,
    locate,
    patch_at,
    patch_box,
    patch_index,
    plan,
    token_range,
    view_box,
    view_of_token,
    view_to_canvas,
    view_to_image,
)

sizes = st.tuples(st.integers(1, 4000), st.integers(1, 4000))
plans = st.builds(plan, sizes, st.sampled_from(sorted(PRESETS)))
unit = st.floats(0, 1, exclude_max=True)


@given(plans, st.data())
def test_each_map_undoes_the_other(found, data):
    view = data.draw(st.sampled_from(found.views))
    number = st.one_of(st.integers(-50, 5000), st.floats(-50, 5000), st.fractions(-50, 5000))
    place = data.draw(st.one_of(st.tuples(number, number), st.tuples(number, number, number, number)))
    exact = tuple(Fraction(value) for value in place)
    assert canvas_to_image(found, view.canvas, image_to_canvas(found, view.canvas, place)) == exact
    assert view_to_canvas(found, view.index, canvas_to_view(found, view.index, place)) == exact
    assert view_to_image(found, view.index, image_to_view(found, view.index, place)) == exact
    assert image_to_view(found, view.index, view_to_image(found, view.index, place)) == exact


@given(plans, unit, unit)
def test_a_point_is_in_the_overview_and_in_one_slice(found, y, x):
    point = [min(part * side, side - 1e-6) for part, side in zip((y, x), found.image_hw, strict=True)]
    hits = locate(found, point)
    assert sorted(found.views[hit.view].kind for hit in hits) == ["overview"] + ["slice"] * bool(found.grid)
    for hit in hits:
        top, left, bottom, right = patch_box(found, hit.view, hit.patch)
        assert top <= Fraction(point[0]) < bottom
        assert left <= Fraction(point[1]) < right
        assert view_to_image(found, hit.view, hit.point) == tuple(map(Fraction, point))
        assert patch_at(found, patch_index(found, hit.view, hit.patch)) == (hit.view, hit.patch)


@given(plans)
def test_views_partition_the_image_and_its_tokens(found):
    area = {"slice": 0, "overview": 0}
    for view in found.views:
        top, left, bottom, right = view_box(found, view.index)
        area[view.kind] += (bottom - top) * (right - left)
    whole = found.image_hw[0] * found.image_hw[1]
    assert area["overview"] == whole
    assert area["slice"] == (whole if found.grid else 0)
    tokens = [token for view in found.views for token in token_range(found, view.index)]
    assert tokens == list(range(found.num_visual_tokens))
    for view in found.views:
        ours = token_range(found, view.index)
        assert view_of_token(found, ours[0]) == view_of_token(found, ours[-1]) == view.index


def test_a_known_point():
    """672x1008 is cut 3x2 into 336 px slices without any resize, so slice coordinates are plain offsets."""
    found = plan((1008, 672))
    slice_hit, overview_hit = locate(found, (400, 500))
    assert (slice_hit.view, slice_hit.point, slice_hit.patch) == (3, (64, 164), (4, 11))
    assert overview_hit.view == 6
    assert overview_hit.point == (Fraction(400 * 406, 1008), Fraction(500 * 266, 672))
    assert view_box(found, 3) == (336, 336, 672, 672)
    assert patch_box(found, 3, (0, 1)) == (336, 350, 350, 364)
    assert token_range(found, 3) == range(192, 256)


def test_numpy_points_are_points():
    found = plan((1008, 672))
    assert locate(found, np.array([400.5, 500], np.float32)) == locate(found, (400.5, 500))
    assert locate(found, np.array([400, 500]))[0].patch == (4, 11)


def test_padding_cropping_and_a_second_resize():
    """A letterboxed canvas whose one tile is resized once more: the case of strategies that pad."""
    canvas = Canvas(
        "overview", (50, 100), (100, 100), (1, 1), (Box(0, 0, 100, 100),), (28, 28), 4, offset=(25, 0), fill=(0, 0, 0)
    )
    found = SlicePlan((200, 400), 14, (canvas,), None, 4, 0, "letterbox")
    assert image_to_canvas(found, 0, (0, 0)) == (25, 0)
    assert image_to_view(found, 0, (200, 400)) == (21, 28)
    assert view_box(found, 0) == (-100, 0, 300, 400)
    part = Canvas("slice", (20, 20), (20, 20), (1, 1), (Box(0, 0, 20, 20),), (20, 20), 1, source=Box(10, 30, 20, 40))
    found = SlicePlan((200, 400), 14, (part,), (1, 1), 1, 0, "crop")
    assert image_to_view(found, 0, (15, 35)) == (10, 10)
    # the view's side is 20 px: the last 6 px are covered by no patch
    assert locate(found, (19, 39)) == ()
    assert locate(found, (12, 32))[0].patch == (0, 0)


def test_places_that_do_not_exist_are_named():
    found = plan((1008, 672))
    with pytest.raises(ValueError, match="outside the \\(1008, 672\\)"):
        locate(found, (1008, 3))
    with pytest.raises(ValueError, match="24x24 patches .* no patch \\(24, 0\\)"):
        patch_box(found, 0, (24, 0))
    with pytest.raises(ValueError, match="7 views, so no view 7"):
        view_box(found, 7)
    with pytest.raises(ValueError, match="visual token 448 is not in 0..447"):
        view_of_token(found, 448)
    with pytest.raises(ValueError, match="got 3 numbers"):
        image_to_view(found, 0, (1, 2, 3))
    with pytest.raises(ValueError, match="point \\(y, x\\), got 3 numbers"):
        locate(found, (1, 2, 3))
    with pytest.raises(ValueError, match="finite number of px, got inf"):
        locate(found, (1, float("inf")))
    stitched = SlicePlan(found.image_hw, 14, found.canvases, found.grid, 300, 0, "stitched")
    with pytest.raises(ValueError, match="joins the views' 448 tokens into 300"):
        token_range(stitched, 0)
