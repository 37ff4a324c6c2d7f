"""One kind of slicing: whatever it is, it plans, is bounded, is fitted to a vision encoder, and is read back."""

import json
import pathlib

import pytest

import uhd
from uhd.schema import SpatialSchema
from uhd.schema.counted import PLAIN, Counted, counted, own_function, slicing_from_dict
from uhd.slicing import OwnRule, SlicePlan, VideoPlan, find, plan_images, plan_many

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "slicings_before_one_type.json").read_text())
IMAGE_HW = (600, 1000)
SCHEMA = SpatialSchema.preset("llava-uhd")
KINDS = {
    "adaptive": find("llava-uhd-safe"),
    "strategy": find("internvl"),
    "counted": Counted(find("internvl"), 16, SCHEMA),
    "own": OwnRule(lambda image_hw: uhd.plan(image_hw, "internvl")),
    "counted own": Counted(OwnRule(lambda image_hw: uhd.plan(image_hw, "internvl")), 16, SCHEMA),
}


@pytest.mark.parametrize("name", GOLDEN["plans"])
def test_what_was_written_before_is_read_and_written_alike(name):
    saved, planned = GOLDEN["slicings"][name], GOLDEN["plans"][name]
    slicing = slicing_from_dict(saved)
    assert json.loads(json.dumps(slicing.to_dict())) == saved
    assert slicing.plan(IMAGE_HW) == SlicePlan.from_dict(planned)
    assert json.loads(json.dumps(slicing.plan(IMAGE_HW).to_dict())) == planned


def test_a_video_that_was_written_before_is_read():
    assert VideoPlan.from_dict(GOLDEN["videos"]["llava-onevision"]) == uhd.plan_video((300, 400), 2, "llava-onevision")


@pytest.mark.parametrize("name", ["own", "fitted-own"])
def test_of_a_function_only_the_name_was_written(name):
    saved = GOLDEN["slicings"][name]
    assert own_function(saved) == "own"
    with pytest.raises(ValueError, match="slicing function of the caller's own, 'own': pass slicing="):
        slicing_from_dict(saved)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_same_methods(kind):
    slicing = KINDS[kind]
    found = slicing.plan(IMAGE_HW)
    assert found == slicing(IMAGE_HW) == uhd.plan(IMAGE_HW, slicing) == find(slicing).plan(IMAGE_HW)
    assert found.num_views > 1
    alone = slicing.single_view(IMAGE_HW)
    assert alone.num_views == 1
    assert alone == slicing.uncut().plan(IMAGE_HW) == slicing.overview_of(found)
    assert slicing.for_images(3).plan(IMAGE_HW) == found
    assert slicing.for_video() is None
    assert find(slicing.name if kind in ("adaptive", "strategy") else slicing) == slicing
    assert hash(slicing) == hash(slicing.replace())
    columns = plan_many([IMAGE_HW, IMAGE_HW], slicing)
    assert columns["grid"].tolist() == [list(found.grid)] * 2
    assert columns["num_tokens"].tolist() == [found.num_tokens] * 2
    assert plan_images([IMAGE_HW], slicing, max_tokens=found.num_tokens - 1)[0].num_tokens < found.num_tokens


@pytest.mark.parametrize("kind", ["adaptive", "strategy", "counted"])
def test_settings_are_capped_and_fitted_and_functions_are_not(kind):
    slicing = KINDS[kind]
    assert slicing.capped(2).plan(IMAGE_HW).num_views == 3
    fitted = slicing.for_vision(image_size=224, patch_size=16)
    assert (fitted.view_side, fitted.patch_size, type(fitted)) == (224, 16, type(slicing))
    assert fitted.for_vision(image_size=None, patch_size=14).view_side == 224
    assert slicing.replace() == slicing_from_dict(json.loads(json.dumps(slicing.to_dict())))


def test_a_function_has_nothing_to_cap_or_to_fit():
    for own in (KINDS["own"], KINDS["counted own"]):
        assert own.capped(2) is None
        assert own.for_vision(image_size=224, patch_size=16) == own
        assert (own.view_side, own.patch_size) == (None, None)
        with pytest.raises(ValueError, match="max_tokens bounds the adaptive planner only, not '<lambda>'"):
            uhd.plan(IMAGE_HW, own, max_tokens=100)


def test_counts_are_those_of_the_compressor_and_the_schema():
    adaptive = counted(find("minicpm-v"), 16, SCHEMA)
    assert (adaptive.tokens_per_view, adaptive.separators) == (16, SCHEMA.separator_count())
    assert not adaptive.overview_first
    assert counted(find("internvl"), None, PLAIN) is find("internvl")
    assert counted(find("internvl"), 16, SCHEMA) == counted(KINDS["counted"], 16, SCHEMA) == KINDS["counted"]
    found = KINDS["counted"].plan(IMAGE_HW)
    assert found.num_visual_tokens == 16 * found.num_views
    assert found.num_separators == uhd.layout(found, SCHEMA).num_separators


def test_a_size_that_a_strategy_refuses_is_named_by_its_row():
    with pytest.raises(ValueError, match="^row 1: 'qwen2-5-vl-ckpt' refuses"):
        plan_many([(100, 100), (28, 28 * 300)], "qwen2-vl")
