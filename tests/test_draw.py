"""The picture shows the cut where the plan has it."""

import numpy as np
import pytest
from PIL import Image

import uhd
from uhd.demo import page_image
from uhd.draw import draw_plan
from uhd.slicing import Box, Canvas, SlicePlan

ORANGE, BLUE = (214, 64, 40), (24, 104, 196)


def count(picture, color):
    return int((np.asarray(picture) == color).all(axis=2).sum())


def test_grid_lines_are_at_the_slices_edges():
    """672x1008 is drawn at 720 / 1008: the line between the columns lies 240 px from the left edge."""
    picture = np.asarray(draw_plan(page_image(), uhd.plan((1008, 672))))
    outlined = (picture == ORANGE).all(axis=2)
    columns = np.flatnonzero(outlined.sum(axis=0) > 700)
    assert {24, 24 + 240 - 1, 24 + 240, 24 + 480 - 1} <= set(columns.tolist())
    rows = np.flatnonzero(outlined.sum(axis=1) > 450)
    assert len(rows) == 3 * 2 * 3  # three rows of slices, two edges each, 3 px wide


@pytest.mark.parametrize("size_hw", [(1, 1), (2, 900), (900, 2), (57, 58), (2000, 500)])
@pytest.mark.parametrize("strategy", ["llava-uhd-safe", "minicpm-v"])
def test_any_shape_is_drawn(size_hw, strategy):
    image = Image.new("RGB", size_hw[::-1], (128, 128, 128))
    plan = uhd.plan(size_hw, strategy)
    picture = draw_plan(image, plan)
    assert picture.width < 1700
    assert count(picture, ORANGE if plan.grid else BLUE) > 100


@pytest.mark.parametrize("size_hw", [(1, 4096), (4096, 1)])
@pytest.mark.parametrize("strategy", ["llava-next", "llava-next-anyres-336-repo-order", "aria-490-split"])
def test_slices_of_nothing_but_padding_are_drawn(size_hw, strategy):
    """Their boxes lie outside the image."""
    picture = draw_plan(Image.new("RGB", size_hw[::-1], (128, 128, 128)), uhd.plan(size_hw, strategy))
    assert count(picture, ORANGE) > 10


def test_many_slices_and_other_plans_are_drawn():
    image = page_image()
    assert count(draw_plan(image, uhd.plan((1008, 672), uhd.SlicingConfig(image_size=112, max_slices=64))), ORANGE)
    boxes = (Box(0, 0, 60, 60), Box(0, 40, 60, 100))
    canvas = Canvas("slice", (50, 100), (60, 100), (1, 2), boxes, (28, 28), 4, offset=(5, 0), fill=(0, 0, 0))
    overlapping = SlicePlan((1008, 672), 14, (canvas,), (1, 2), 8, 0, "overlapping")
    assert count(draw_plan(image, overlapping), ORANGE) > 100


def test_the_image_must_be_the_planned_one():
    with pytest.raises(ValueError, match="1008"):
        draw_plan(Image.new("RGB", (10, 20)), uhd.plan((1008, 672)))
