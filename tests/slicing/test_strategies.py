"""Every other system's rule: equal to its reference, well formed on any size, and drawn as the reference draws it."""

import functools
import inspect
import json
import math
import pathlib
import pickle
import re
from dataclasses import asdict, fields, replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import uhd
from tests.tiny import refuses
from uhd.cli import main
from uhd.draw import draw_plan
from uhd.pixels import render
from uhd.slicing import OwnRule, SlicePlan, SlicingConfig, find, flops, plan
from uhd.slicing.plan import MAX_SIDE, Box, Canvas
from uhd.slicing.rules import slicing_from_dict
from uhd.slicing.strategies import ALIASES, STRATEGIES, anyres, base, selectors
from uhd.slicing.strategies.anyres import AnyResConfig, ThresholdConfig, threshold_tokens, video_tokens
from uhd.slicing.strategies.closest import InternVLConfig, Ovis2Config
from uhd.slicing.strategies.fixed import StretchConfig
from uhd.slicing.strategies.upscale import OpenAIConfig

GOLDEN = json.loads((pathlib.Path(__file__).parent.parent / "golden" / "strategies.json").read_text())
SIZES = [(height, width) for width, height in GOLDEN["sizes_wh"]]
TOKEN_COLUMNS = ("tokens_hf", "tokens_hf_processor", "tokens_each", "tokens", "cross_attn_tokens", "patches")
EXTREMES = [(1, 1), (1, 4096), (4096, 1), (1, 200), (200, 1), (201, 1), (7, 3000), (1, MAX_SIDE), (MAX_SIDE, 1)]
EXTREMES += [(MAX_SIDE, MAX_SIDE), (999_983, 31), (4096, 20), (500_000, 3)]
ALL = sorted(STRATEGIES)


def words(text):
    return text.split()


names = st.sampled_from(ALL)
sides = st.one_of(st.integers(1, 3000), st.integers(1, 40), st.integers(1, MAX_SIDE))
sizes = st.tuples(sides, sides)


def planned(image_hw, rule):
    """The plan, or ``None`` where the rule refuses the size with a message that names it."""
    try:
        return plan(image_hw, rule)
    except ValueError as problem:
        if f"refuses a {image_hw[0]}x{image_hw[1]} px image" not in str(problem):
            raise
        return None


def golden_rows(name):
    entry = GOLDEN["strategies"][name]
    for image_hw, row in zip(SIZES, entry["rows"], strict=True):
        yield image_hw, None if row == "error" else dict(zip(entry["fields"], row, strict=True))


def pair(row, name):
    """(height, width) of the columns ``name_w`` and ``name_h``; ``None`` where the reference has none."""
    found = (row.get(f"{name}_h"), row.get(f"{name}_w"))
    return None if None in found else found


@pytest.mark.parametrize("name", sorted(GOLDEN["strategies"]))
def test_equals_the_reference_on_every_size(name):
    """Tokens, grid and views, and whatever geometry a preset's columns tell beyond them."""
    rows = list(golden_rows(name))
    assert len(rows) == 300
    for image_hw, row in rows:
        found = planned(image_hw, name)
        assert (found is None) == (row is None), image_hw
        if row is None:
            continue
        column = next(column for column in TOKEN_COLUMNS if column in row)
        assert found.num_tokens == row[column], image_hw
        if "grid_rows" in row:
            assert found.grid == (row["grid_rows"], row["grid_cols"]), image_hw
        if "views" in row:
            assert found.num_views == row["views"], image_hw
        detail = next((canvas for canvas in found.canvases if canvas.kind == "slice"), found.canvases[0])
        checks = {
            "content": detail.content_hw,
            "canvas": detail.size_hw,
            "resized": detail.content_hw,
            "out": found.canvases[0].view_hw,
            "padded": tuple(max(sides) for sides in zip(*(c.size_hw for c in found.canvases), strict=True)),
            "crop": detail.size_hw,
            "thumb": found.canvases[-1].view_hw,
            "last_content": detail.content_hw,
        }
        if name.startswith("aria") or (name == "step3p7_728_504" and not row["local_tiles"]):
            checks = {"last_content": found.canvases[0].content_hw} if name == "aria_980" else {}
        for column, got in checks.items():
            want = pair(row, column)
            if want is not None:
                assert got == want, (image_hw, column)
        if "paste_x" in row:
            assert detail.offset == (row["paste_y"], row["paste_x"]), image_hw
        if row.get("tiles_dim0"):
            assert found.grid == (row["tiles_dim0"], row["tiles_dim1"])
        if "local_tiles" in row:
            assert sum(view.kind == "slice" for view in found.views) == row["local_tiles"]
        if "hi_rows" in row:
            assert found.packing.final_hw == (row["hi_rows"], row["hi_cols"])
        if "unpad_feat_h_hf" in row:
            want = (row["unpad_feat_h_hf"], row["unpad_feat_w_hf"])
            assert found.packing.kept.size_hw == want or 0 == math.prod(want) == math.prod(found.packing.kept.size_hw)
        if "grid_h" in row and "merge" not in name:
            assert found.views[0].patches_hw == (row["grid_h"], row["grid_w"])


def test_the_two_roundings_of_unpadding_differ_where_the_reference_does():
    for row in GOLDEN["unpad"]["rows"]:
        row = dict(zip(GOLDEN["unpad"]["fields"], row, strict=True))
        image_hw = (row["height"], row["width"])
        theirs = plan(image_hw, "llava-next")
        assert theirs.num_tokens == row["tokens_hf"]
        assert theirs.packing.kept.size_hw == (row["unpad_feat_h_hf"], row["unpad_feat_w_hf"])
        original = plan(image_hw, AnyResConfig(unpad_rounding="original"))
        assert original.num_tokens == row["tokens_repo"] != theirs.num_tokens
        assert original.packing.kept.size_hw == (row["unpad_feat_h_repo"], row["unpad_feat_w_repo"])


def test_onevision_video_counts():
    assert GOLDEN["video"]
    for frames, tokens in GOLDEN["video"].items():
        assert video_tokens(int(frames)) == tokens
    frame = plan((480, 640), "llava-onevision-video")
    assert (frame.num_tokens, frame.packing.pooled_hw) == (196, (14, 14))
    assert video_tokens(0) == 0
    with pytest.raises(ValueError, match="at least 0 frames"):
        video_tokens(-1)


def test_openai_documented_examples():
    assert len(GOLDEN["openai"]) == 2
    for width, height, tokens in GOLDEN["openai"]:
        assert plan((height, width), "gpt-4v").num_tokens == tokens
    assert plan((4096, 2048), "gpt-4v").num_tokens == plan((4096, 2048), "openai-high-detail-overlap").num_tokens
    assert plan((3000, 4000), "openai-low-detail").num_tokens == 85


def test_overlapping_tiles_start_where_the_pilot_study_has_them():
    """768 px in two 512 px tiles: starts 0 and 256, so the middle third is seen twice."""
    found = plan((768, 1500), OpenAIConfig(remainder="overlap"))
    tiles = found.canvases[1].tiles
    assert found.canvases[1].size_hw == (768, 1500)
    assert sorted({tile.top for tile in tiles}) == [0, 256]
    assert sorted({tile.left for tile in tiles}) == [0, 494, 988]
    assert {tile.size_hw for tile in tiles} == {(512, 512)}


def test_threshold_of_the_paper():
    """Four crops of 30 tokens against 100: 25 each."""
    assert threshold_tokens(3, 30, 100) == 25
    assert threshold_tokens(3, 25, 100) == 25
    assert threshold_tokens(1, 30, 100) == 30
    small, large = plan((300, 300), "llava-onevision-threshold"), plan((2300, 2300), "llava-onevision-threshold")
    assert (small.num_tokens, small.packing) == (2 * 729, None)
    assert large.grid == (6, 6)
    assert large.packing.pooled_hw == (14, 14)  # isqrt(7290 // 37)
    assert large.num_tokens == 37 * 196 <= 7290 < plan((2300, 2300), "llava-onevision").num_tokens
    with pytest.raises(ValueError, match="leaves no token"):
        plan((2300, 2300), ThresholdConfig(threshold=36))


@settings(max_examples=400)
@given(sizes, names)
def test_plans_are_well_formed(image_hw, name):
    found = planned(image_hw, name)
    if found is None:
        return
    check_form(found)
    assert found.image_hw == image_hw
    assert found.strategy == name
    again = STRATEGIES[name].function(image_hw, STRATEGIES[name].config)
    assert again == found
    assert hash(again) == hash(found)
    if found.num_views < 2000:
        assert SlicePlan.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def check_form(found):
    p = found.patch_size
    for canvas in found.canvases:
        assert len(canvas.tiles) == math.prod(canvas.grid)
        assert min(min(tile.top, tile.left) for tile in canvas.tiles) >= 0
        assert max(tile.bottom for tile in canvas.tiles) <= canvas.size_hw[0]
        assert max(tile.right for tile in canvas.tiles) <= canvas.size_hw[1]
        assert all(min(tile.size_hw) >= 1 for tile in canvas.tiles)
        assert min(canvas.content_hw) >= 1
        assert min(canvas.view_hw) >= p
        sides = list(zip(canvas.offset, canvas.content_hw, canvas.size_hw, strict=True))
        assert canvas.fill is not None or all(start <= 0 and start + content >= side for start, content, side in sides)
        inside = all(start >= 0 and start + content <= side for start, content, side in sides)
        assert inside or found.strategy.startswith("clip")
    slices = [view for view in found.views if view.kind == "slice"]
    if found.grid is None:
        assert not slices
    elif slices:
        rows, cols = found.grid
        assert [(view.row, view.col) for view in slices] == [(r, c) for r in range(rows) for c in range(cols)]
    else:
        assert found.grid == (1, 1)
    assert 1 <= found.num_views <= base.MAX_VIEWS
    check_count(found)


def check_count(found):
    """Tokens follow from the views, or from what the packing says about their features."""
    by_view = sum(view.num_tokens for view in found.views)
    if found.packing is None:
        assert found.tokens_by_view
        assert (found.num_visual_tokens, found.num_separators) == (by_view, 0)
        return
    packing, overviews = found.packing, sum(view.kind == "overview" for view in found.views)
    slices = found.num_views - overviews
    overview, separators = math.prod(packing.overview_hw) * overviews, int(packing.separator is not None)
    if packing.overview_newline:
        separators += packing.overview_hw[0] * overviews
    if packing.map_hw is None:
        detail = slices * math.prod(packing.pooled_hw or packing.view_hw)
        assert found.tokens_by_view
    else:
        dropped = sum(packing.overlap)
        pairs = zip(found.grid, packing.view_hw, strict=True)
        assert packing.map_hw == tuple(count * side - (count - 1) * dropped for count, side in pairs)
        assert all(view.num_tokens == math.prod(packing.view_hw) for view in found.views if view.kind == "slice")
        detail = math.prod(packing.final_hw)
        separators += packing.final_hw[0] * packing.newline
        assert not found.tokens_by_view
        with pytest.raises(ValueError, match="no token belongs to one view"):
            uhd.slicing.token_range(found, 0)
    assert (found.num_visual_tokens, found.num_separators) == (overview + detail, separators)


@pytest.mark.parametrize("name", ALL)
def test_extremes_are_planned_or_refused(name):
    """No hang, no unbounded list of tiles, and the error says which rule refused which image."""
    for found in filter(None, (planned(image_hw, name) for image_hw in EXTREMES)):
        check_form(found)


def test_refusals_name_the_rule_and_what_to_do():
    with pytest.raises(ValueError, match=r"'qwen3-vl-ckpt' refuses a 201x1 px image.*at most 200.*Crop or pad"):
        plan((201, 1), "qwen3-vl")
    with pytest.raises(ValueError, match="at least 10 are needed"):
        plan((1, 4096), "phi4")
    with pytest.raises(ValueError, match="a quarter of it would be empty"):
        plan((1, 9), "idefics2-split")
    with pytest.raises(ValueError, match="70000 views of one image, at most 65536"):
        base.tiled((70, 1000), (14, 14), 1)


SYMMETRIC = words(
    "cohere2 idefics3 smolvlm idefics2 idefics2-split qwen2.5-vl qwen3-vl hunyuan-vl ernie-4.5-vl pixtral "
    "mistral-small llama4 mllama gemma3-pan-and-scan gemma4 gemma4-1120 ovis2 molmo2 step3 siglip2-naflex "
    "kimi monkey siglip clip llava-1.5 llava-onevision-multi-image gpt-4v openai-high-detail-overlap"
)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_symmetric_rules_cost_the_same_either_way_up(name):
    refused = 0
    for height, width in SIZES:
        found, turned = planned((height, width), name), planned((width, height), name)
        assert (found is None) == (turned is None)
        if found is None:
            refused += 1
            continue
        assert found.num_tokens == turned.num_tokens, (height, width)
        assert found.num_views == turned.num_views
    assert refused <= 5


def test_known_asymmetries_are_kept():
    """Rules that are not symmetric in the release are not made so."""
    assert plan((1568, 224), "deepseek-vl2").num_tokens != plan((224, 1568), "deepseek-vl2").num_tokens
    assert plan((1080, 1920), "fuyu").num_tokens != plan((1920, 1080), "fuyu").num_tokens
    assert plan((150, 300), "llava-next").grid == (1, 2)
    assert plan((1008, 672), "ovis2-448-max9-covering").grid == plan((672, 1008), "ovis2").grid == (2, 3)


# selectors, each against its definition


@given(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), st.integers(1, 16))
def test_least_upscaling_takes_the_smallest_canvas_that_holds_the_image(image_hw, most):
    grids = selectors.grids_up_to(most)
    rows, cols = selectors.least_upscaling(image_hw, grids, 336)

    def scale(grid):
        return min(Fraction(grid[0] * 336, image_hw[0]), Fraction(grid[1] * 336, image_hw[1]))

    holding = [grid for grid in grids if scale(grid) >= 1]
    best = min(map(scale, holding)) if holding else max(map(scale, grids))
    assert float(scale((rows, cols))) == float(best)
    assert rows * cols == min(r * c for r, c in grids if float(scale((r, c))) == float(best))


@given(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), st.integers(1, 20))
def test_closest_aspect_is_the_closest(image_hw, most):
    rows, cols = selectors.closest_aspect(image_hw, selectors.grids_up_to(most), 448)
    aspect = image_hw[1] / image_hw[0]
    assert abs(aspect - cols / rows) == min(abs(aspect - c / r) for r, c in selectors.grids_up_to(most))


def test_closest_aspect_ties_go_by_area():
    grids = selectors.grids_up_to(4)
    assert selectors.closest_aspect((448, 448), grids, 448) == (1, 1)
    assert selectors.closest_aspect((633, 633), grids, 448) == (1, 1)  # 633^2 < 2 * 448^2
    assert selectors.closest_aspect((634, 634), grids, 448) == (2, 2)


def test_best_resolution_order_decides_ties():
    assert selectors.best_resolution((200, 200), ((1, 2), (2, 1)), 336) == (1, 2)
    assert selectors.best_resolution((200, 200), ((2, 1), (1, 2)), 336) == (2, 1)
    assert selectors.best_resolution((1, 4096), ((2, 2), (1, 3)), 336) == (1, 3)  # keeps nothing: least waste


@given(st.tuples(st.integers(1, 4000), st.integers(1, 4000)), st.sampled_from([28, 32]))
def test_smart_resize_keeps_its_range(image_hw, factor):
    low, high = 16 * factor**2, 1000 * factor**2
    if max(image_hw) > 200 * min(image_hw):
        with pytest.raises(ValueError, match="at most 200"):
            selectors.smart_resize(image_hw, factor, low, high)
        return
    height, width = selectors.smart_resize(image_hw, factor, low, high)
    assert height % factor == width % factor == 0
    assert low <= height * width
    assert height * width <= high or min(height, width) == factor


# pixels


def coordinates(image_hw):
    """An image whose red is its row and green its column, and blue 200, for sides up to 255 px."""
    rows, cols = np.mgrid[0 : image_hw[0], 0 : image_hw[1]]
    return np.stack([rows, cols, np.full(image_hw, 200)], axis=-1).astype(np.uint8)


def test_letterbox_has_the_right_colour_and_offset():
    """LLaVA-1.5: 336 px wide, 168 high, is padded by 84 rows of CLIP's mean above and below."""
    image = np.full((168, 336, 3), 250, np.uint8)
    (view,) = render(image, plan((168, 336), "llava-1.5"))
    assert (view[:84] == (122, 116, 104)).all()
    assert (view[84:252] == 250).all()
    assert (view[252:] == (122, 116, 104)).all()


def test_an_odd_pixel_of_padding_goes_right_and_down():
    found = plan((336, 335), AnyResConfig(grids=((1, 1),)))
    assert found.canvases[1].offset == (0, 0)
    image = np.full((336, 335, 3), 250, np.uint8)
    _, tile = render(image, found)
    assert (tile[:, :335] == 250).all()
    assert (tile[:, 335] == 0).all()


@pytest.mark.parametrize("name, fill", [("phi4", 255), ("llama4", 0), ("mllama", 0), ("kimi", 0), ("fuyu", 1)])
def test_padding_lies_right_and_below(name, fill):
    image = np.full((100, 150, 3), 90, np.uint8)
    found = plan((100, 150), name)
    canvas = found.canvases[0]
    height, width = canvas.content_hw
    view = render(image, found)[0]
    assert (view[:height, :width] == 90).all()
    assert (view[height:] == fill).all()
    assert (view[:, width:] == fill).all()
    assert canvas.content_hw != canvas.size_hw


def test_idefics3_is_resized_twice_and_its_overview_thrice():
    """1456 px, then multiples of 364 px, then the overview: each with a Lanczos filter and in 8 bits."""
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (90, 161, 3), np.uint8))
    found = plan((90, 161), "idefics3")
    assert found.canvases[0].first_hw == (814, 1456)
    assert found.canvases[0].size_hw == (1092, 1456)
    lanczos = Image.Resampling.LANCZOS
    whole = image.resize((1456, 814), lanczos).resize((1456, 1092), lanczos)
    views = render(image, found)
    assert (views[0] == np.asarray(whole)[:364, :364]).all()
    assert (views[11] == np.asarray(whole)[728:, 1092:]).all()
    assert (views[12] == np.asarray(whole.resize((364, 364), lanczos))).all()


def test_centre_crop_shows_the_middle():
    image = coordinates((100, 220))
    found = plan((100, 220), replace(STRATEGIES["clip-center-crop-336"].config, tile=100, patch_size=10))
    (view,) = render(image, found)
    assert (view == image[:, 60:160]).all()


def test_a_crop_of_an_elongated_image_needs_no_memory_for_the_rest():
    """336 px high, the content would be 67 million px wide."""
    found = plan((1, 200_000), "clip")
    assert found.canvases[0].content_hw == (336, 67_200_000)
    image = np.zeros((1, 200_000, 3), np.uint8)
    image[:, 99_000:101_000] = 77
    (view,) = render(Image.fromarray(image), found)
    assert view.shape == (336, 336, 3)
    assert (view == 77).all()


def test_overlapping_crops_show_the_same_pixels():
    found = plan((644, 644), "molmo2")
    assert found.grid == (2, 2)
    assert found.canvases[1].size_hw == (644, 644)
    image = np.random.default_rng(0).integers(0, 256, (644, 644, 3), np.uint8)
    _, first, right, below, _ = render(image, found)
    assert (first == image[:378, :378]).all()
    assert (first[:, 266:] == right[:, :112]).all()
    assert (first[266:] == below[:112]).all()


def test_slices_of_their_own_canvas_show_their_source():
    """Ovis2 crops the image's own pixels; 448 x 896 is cut into two squares and shown whole before them."""
    image = np.random.default_rng(1).integers(0, 256, (448, 896, 3), np.uint8)
    found = plan((448, 896), "ovis2")
    overview, left, right = render(image, found)
    assert [view.kind for view in found.views] == ["overview", "slice", "slice"]
    assert (left == image[:, :448]).all()
    assert (right == image[:, 448:]).all()
    assert (overview[:112] == (123, 117, 104)).all()
    assert uhd.slicing.view_box(found, 2) == (0, 448, 448, 896)


def test_very_long_images_are_padded_to_a_square_of_bounded_size():
    for name in ("llava-1.5", "step3"):
        found = plan((1, 60_000), name)
        assert max(max(canvas.size_hw) for canvas in found.canvases) <= base.LARGEST_PAD
    found = plan((400, 20_000), replace(STRATEGIES["llava15-pad-336"].config, fill=(1, 2, 3)))
    assert found.canvases[0].content_hw == (266, base.LARGEST_PAD)
    assert found.canvases[0].size_hw == (base.LARGEST_PAD, base.LARGEST_PAD)


@pytest.mark.parametrize("name", ALL)
def test_every_strategy_renders_and_draws(name):
    image = Image.fromarray(coordinates((120, 70)))
    found = plan((120, 70), name)
    views = render(image, found)
    assert [view.shape[:2] for view in views] == [view.size_hw for view in found.views]
    if found.num_views < 12:
        picture = draw_plan(image, found)
        assert picture.width > 1000


# names, configs, the user's own rule


def test_names_are_listed_and_accepted():
    listed = uhd.strategies()
    assert {name.replace("_", "-") for name in GOLDEN["strategies"]} <= set(listed)
    assert all(listed.values())
    assert not any("\n" in line for line in listed.values())
    for name in listed:
        found = uhd.strategy(name)((400, 300))
        assert found == plan((400, 300), name.upper().replace("-", "_"))
        assert found.strategy == ALIASES.get(name, name)
    wanted = words(
        "llava-1.5 llava-next llava-onevision internvl idefics3 smolvlm qwen2-vl qwen2.5-vl qwen3-vl pixtral "
        "mistral-small llama4 llama-3.2-vision deepseek-vl2 deepseek-ocr2 ovis2 aria phi4 gemma3 gemma3-pan-and-scan "
        "gemma4 lfm2-vl molmo2 monkey ureader docowl fuyu kimi nemotron gpt-4v blip2 minigpt-v2 clip "
        "siglip siglip2-naflex step3 perception-lm granite cohere2 idefics2 glm-4.6v"
    )
    assert set(wanted) <= set(listed)


def test_unknown_names_give_the_nearest():
    with pytest.raises(ValueError, match=r"no strategy named 'lava-next': did you mean .*'llava-next'"):
        uhd.strategy("lava-next")
    with pytest.raises(ValueError, match=r"uhd\.strategies\(\) lists all"):
        plan((10, 10), "xyzzy")
    with pytest.raises(TypeError, match=r"a function from .* got int"):
        plan((10, 10), 3)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llava-uhd-safe", {"cut_by": "shape"}),
        ("llava-uhd-safe", {"border_moves": 2, "max_slices": 12}),
        ("llava-uhd-safe", {"one_view_below": 2.5, "clamp": False}),
        ("minicpm-v", {"latents": "fitted", "max_tokens": None}),
        ("uhd-plus", {"one_view_below": None, "rounding": "round"}),
        ("internvl", {"max_tiles": 4, "resample": "bilinear"}),
        ("llava-next-anyres-336", {"grids": ((1, 2), (3, 1))}),
    ],
)
def test_settings_may_follow_a_name(name, changes):
    base = uhd.strategy(name)
    text = "+".join([name, *(f"{key}={json.dumps(value)}" for key, value in changes.items())])
    assert uhd.strategy(text) == base.replace(**changes)
    assert uhd.strategy(text.replace('"', "").replace("_", "-")) == base.replace(**changes)
    python = "+".join([name, *(f"{key}={value}" for key, value in changes.items() if not isinstance(value, tuple))])
    assert uhd.strategy(python) == base.replace(**{k: v for k, v in changes.items() if not isinstance(v, tuple)})
    assert slicing_from_dict(uhd.strategy(text).to_dict()) == base.replace(**changes)
    assert plan((300, 900), text) is plan((300, 900), text)
    assert plan((300, 900), text) == base.replace(**changes).plan((300, 900))


def test_settings_that_a_rule_does_not_have_are_refused():
    for text, words in (
        (
            "llava-uhd+max_slice=2",
            "'max_slice=2' is not a setting of 'llava-uhd' and its value; its settings are image",
        ),
        ("llava-uhd+latents", "'latents' is not a setting"),
        ("llava-uhd+name=own", "'name=own' is not a setting"),
        ("llava-uhd+max_slices=1+MAX-SLICES=2", "it gives max_slices twice"),
        ("llava-uhd+max_slices=" + "[" * 20_000, "max_slices must be a positive int"),
        ("llava-uhd+max_slices=two", "max_slices must be a positive int, got 'two'"),
        ("internvl+max_tiles=two", "max_tiles of InternVLConfig must be a whole number"),
        ("lava-uhd+max_slices=2", "no strategy named 'lava-uhd': did you mean 'llava-uhd'"),
    ):
        refuses(re.escape(words), uhd.strategy, text)
    refuses("has no '\\+'", uhd.register_strategy, "own+max_slices=3", lambda image_hw: plan(image_hw, "clip"))
    uhd.register_strategy("own-function", lambda image_hw: plan(image_hw, "clip"))
    refuses("'clip=1' is not .* it is a function, which has no settings", uhd.strategy, "own-function+clip=1")


def test_plan_takes_configs_and_adaptive_presets_alike():
    assert plan((500, 900), InternVLConfig(max_tiles=4)).num_views == 3
    assert plan((500, 900), STRATEGIES["internvl-dynamic-448-max12"].config) == plan((500, 900), "internvl")
    assert plan((500, 900), "minicpm-v") == plan((500, 900), SlicingConfig.preset("minicpm-v"))
    assert uhd.strategy("internvl")((500, 900)) is uhd.strategy("internvl")((500, 900))
    for bad in ((0, 5), (5.5, 5), (True, 5)):
        with pytest.raises(ValueError, match="image size|height"):
            plan(bad, "internvl")
    with pytest.raises(ValueError, match="max_tokens bounds the adaptive planner only, not 'internvl"):
        plan((500, 900), "internvl", max_tokens=100)


def test_a_users_own_function_is_a_strategy():
    def halves(image_hw):
        height, width = image_hw
        tiles = (Box(0, 0, 28, 28), Box(0, 28, 28, 56))
        canvas = Canvas("slice", (28, 56), (28, 56), (1, 2), tiles, (28, 28), 4)
        return SlicePlan((height, width), 14, (canvas,), (1, 2), 8, 0, "halves")

    found = plan((100, 200), halves)
    assert (found.strategy, found.num_tokens) == ("halves", 8)
    with pytest.raises(TypeError, match="'<lambda>' must return a SlicePlan for .*, got NoneType"):
        plan((100, 200), lambda image_hw: None)
    with pytest.raises(ValueError, match="planned one of"):
        plan((100, 200), lambda image_hw: halves((1, 1)))


@pytest.mark.parametrize("name", ALL)
def test_configs_are_hashable_and_json_able(name):
    config = STRATEGIES[name].config
    again = slicing_from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config == pickle.loads(pickle.dumps(config))
    assert hash(again) == hash(config)
    assert plan((333, 777), again) == plan((333, 777), config)
    fitted = config.for_vision(image_size=224, patch_size=config.patch_size)
    found = planned((333, 777), fitted)
    assert found.patch_size == config.patch_size


def test_unknown_settings_and_rules_are_named():
    with pytest.raises(ValueError, match=r"StretchConfig has no \['tiles'\]; its fields are"):
        slicing_from_dict({"rule": "StretchConfig", "tiles": 3})
    with pytest.raises(ValueError, match="unknown rule 'Other'"):
        slicing_from_dict({"rule": "Other"})


def test_settings_become_plain_and_hashable():
    assert AnyResConfig(grids=[[1, 2], [2, 2]]) == AnyResConfig(grids=((1, 2), (2, 2)))
    assert plan((100, 300), AnyResConfig(grids=[[1, 2], [2, 2]])).grid == (1, 2)
    config = InternVLConfig(max_tiles=np.int64(6), tile=np.int32(448))
    assert config == InternVLConfig(max_tiles=6)
    assert type(config.max_tiles) is int
    json.dumps(config.to_dict())


TILED = [name for name in ALL if STRATEGIES[name].config.view_side]
FIT_SIZES = [(1008, 672), (1080, 1920), (300, 1700), (2990, 410), (97, 240), (61, 70)]


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("image_hw", FIT_SIZES)
def test_twice_the_image_is_cut_alike_for_a_backbone_of_twice_the_size(name, image_hw):
    """Every length of a rule grows with its tile: grids, views, tokens and padding stay, sizes double."""
    config = STRATEGIES[name].config
    large = config.for_vision(image_size=2 * config.tile, patch_size=2 * config.patch_size)
    found, double = plan(image_hw, config), plan((2 * image_hw[0], 2 * image_hw[1]), large)
    assert (double.grid, double.num_views, double.num_tokens) == (found.grid, found.num_views, found.num_tokens)
    assert [v.patches_hw for v in double.views] == [v.patches_hw for v in found.views]
    assert [v.size_hw for v in double.views] == [(2 * v.size_hw[0], 2 * v.size_hw[1]) for v in found.views]
    for one, two in zip(found.canvases, double.canvases, strict=True):
        for small, big in zip((*one.content_hw, *one.offset), (*two.content_hw, *two.offset), strict=True):
            assert abs(2 * small - big) <= 4
        assert (one.first_hw is None) == (two.first_hw is None)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("image_size", "patch_size"), [(56, 14), (224, 16), (448, 14), (518, 14), (980, 14)])
def test_every_rule_plans_for_other_backbones(name, image_size, patch_size):
    config = STRATEGIES[name].config
    fitted = config.for_vision(image_size=image_size, patch_size=patch_size)
    assert fitted.for_vision(image_size=image_size, patch_size=patch_size).patch_size == patch_size
    assert slicing_from_dict(json.loads(json.dumps(fitted.to_dict()))) == fitted
    for image_hw in ((500, 310), (200, 1500)):
        found = plan(image_hw, fitted)
        check_form(found)
        assert found.patch_size == patch_size
        if name in TILED and name != "lfm2-vl-512":  # its overview keeps the image's aspect
            slices = {view.size_hw for view in found.views if view.kind == "slice"}
            assert slices <= {(image_size, image_size)}
            sides = {side for view in found.views for side in view.size_hw}
            assert all(side == image_size or side % patch_size == 0 for side in sides)


def test_lengths_beside_the_tile_keep_their_ratio_to_it():
    def fitted(name, image_size, patch_size=14):
        return STRATEGIES[name].config.for_vision(image_size=image_size, patch_size=patch_size)

    next_384 = plan((800, 600), fitted("llava-next-anyres-336", 384))
    assert (next_384.packing.view_hw, next_384.overview_hw) == ((27, 27), (384, 384))
    assert fitted("idefics3-364", 384).longest == 1536
    assert fitted("smolvlm-512", 256, 16).longest == 1024
    assert fitted("deepseek-ocr2", 384, 16).overview_side == 512
    assert fitted("deepseek-ocr2", 384).overview_side == 37 * 14  # 512 in whole patches
    assert (fitted("step3p7-728-504", 252).overview_side, fitted("step3p7-728-504", 252).longest) == (26 * 14, 1512)
    assert (fitted("openai-high-detail", 256).longest, fitted("openai-high-detail", 256).shortest) == (1024, 384)
    assert fitted("gemma3-896-pas", 448).min_crop == 128
    assert (fitted("aria-980-split", 490).cell, fitted("aria-980-split", 490).min_side) == (245, 168)
    assert fitted("aria-original-490-split", 245).min_side == 168
    assert fitted("molmo2-378-max8", 336).margins == (4, 4)  # Molmo's own, on 24 patches
    assert fitted("molmo2-378-max8", 56).margins == (1, 1)
    lfm = fitted("lfm2-vl-512", 256, 16)
    assert (lfm.min_tokens, lfm.max_tokens) == (16, 64)
    assert fitted("qwen3-vl-ckpt", 384) == STRATEGIES["qwen3-vl-ckpt"].config.replace(patch_size=14)
    for config in (STRATEGIES[name].config for name in ALL):
        assert config.for_vision(image_size=config.view_side or 1, patch_size=config.patch_size) == config


# what a rule is: its documentation, its filter, and plans from before


def test_plans_carry_the_filter_of_their_rule():
    lanczos = {"idefics3", "smolvlm", "muse"}
    bilinear = set(words("llama4 mllama gemma3 idefics2 phi4 molmo2 fuyu lfm2-vl siglip2-naflex step3"))
    for name in ALIASES:
        want = "lanczos" if name in lanczos else "bilinear" if name in bilinear else "bicubic"
        if name in lanczos | bilinear or name in ("internvl", "llava-next", "qwen3-vl", "siglip", "monkey"):
            assert plan((300, 500), name).resample == want, name
    assert [name for name in ALL if not plan((300, 500), name).antialias] == ["molmo2-378-max8"]
    assert plan((300, 500), "phi4").canvases[1].view_filter == ("bicubic", False)
    assert plan((300, 500), InternVLConfig(resample="lanczos")).resample == "lanczos"
    assert plan((300, 500), "llava-uhd").resample == "bicubic"


def test_plans_that_were_saved_before_filters_were_known_still_load():
    found = plan((300, 500), "internvl")
    data = json.loads(json.dumps(found.to_dict()))
    for key in ("resample", "antialias"):
        del data[key]
    for canvas in data["canvases"]:
        for key in ("first_hw", "view_filter", "cell"):
            del canvas[key]
    assert SlicePlan.from_dict(data) == found
    twice = plan((300, 500), "smolvlm")
    assert SlicePlan.from_dict(json.loads(json.dumps(twice.to_dict()))) == twice
    config = {key: value for key, value in InternVLConfig().to_dict().items() if key not in ("resample", "antialias")}
    assert slicing_from_dict(config) == InternVLConfig()


# command line


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_command_plans_by_any_strategy(capsys, tmp_path):
    sizes_file = tmp_path / "sizes.json"
    sizes_file.write_text("[[672, 1008], [201, 1]]")
    assert main(["plan", "--sizes", str(sizes_file), "--strategy", "qwen3_vl_ckpt", "--json"]) == 0
    first, second = lines(capsys)
    assert (first["num_tokens"], first["grid"], first["views"]) == (672, None, 1)
    assert "refuses" in second["error"]
    assert main(["plan", "1920x1080", "--strategy", "mllama"]) == 0
    assert "overview" not in capsys.readouterr().out


@pytest.mark.parametrize("option", [["--max-slices", "3"], ["--max-tokens", "99"], ["--candidates"]])
def test_adaptive_options_are_refused_elsewhere(capsys, option):
    assert main(["plan", "672x1008", "--strategy", "internvl", *option]) == 1
    assert option[0] in capsys.readouterr().err


def test_the_command_draws_any_strategy(capsys, tmp_path):
    source, output = tmp_path / "in.png", tmp_path / "out.png"
    Image.fromarray(coordinates((90, 200))).save(source)
    assert main(["show", str(source), "-o", str(output), "--strategy", "llava-next"]) == 0
    with Image.open(output) as picture:
        assert picture.width > 1000
    assert main(["layout", "672x1008", "--strategy", "llava-next"]) == 1
    assert "no schema" in capsys.readouterr().err


def test_the_documentation_has_every_name_and_what_the_docstrings_say():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "strategies.md").read_text()
    assert not [name for name in uhd.strategies() if f"`{name}`" not in text]
    for function in dict.fromkeys(entry.function for entry in STRATEGIES.values()):
        said = re.sub(r":\w+:`(?:[\w.]+\.)?(\w+)`", r"`\1`", inspect.cleandoc(function.__doc__)).replace("``", "`")
        parts = re.split(r"\n(Source|Models|Traps): ", said)
        assert parts[1::2] == ["Source", "Models", "Traps"], function.__name__
        assert 1 <= len(parts[0].strip().splitlines()) <= 8
        cells = (" ".join(part.split()) for part in parts[::2])
        assert f"| {' | '.join(cells)} |\n" in text, function.__name__


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: InternVLConfig(max_tiles="12"),
            "max_tiles of InternVLConfig must be a whole number, e.g. 12, got '12'",
        ),
        (lambda: StretchConfig(tile=0), "tile of StretchConfig must be positive, got 0"),
        (lambda: InternVLConfig(min_tiles=5, max_tiles=4), "min_tiles 5 is above max_tiles 4"),
        (
            lambda: InternVLConfig(resample="nearest"),
            "resample must be 'bicubic', 'bilinear' or 'lanczos', got 'nearest'",
        ),
        (lambda: OpenAIConfig(remainder="crop"), "remainder must be"),
        (lambda: AnyResConfig(unpad_rounding="up"), "unpad_rounding"),
        (lambda: anyres.AriaPortConfig(tile=600), "once or twice"),
        (lambda: InternVLConfig(max_tiles=12.5), "must be a whole number, e.g. 12, got 12.5"),
        (lambda: InternVLConfig(max_tiles=True), "must be a whole number, e.g. 12, got True"),
        (lambda: InternVLConfig(tile=448.5), "tile of InternVLConfig must be a whole number"),
        (lambda: InternVLConfig(tile=10), "tile 10 px is smaller than a patch of 14 px"),
        (lambda: InternVLConfig(max_tiles=200_000), "max_tiles is at most 65536, got 200000"),
        (lambda: Ovis2Config(max_tiles=300), "max_tiles of an Ovis2Config is at most 256, got 300"),
        (lambda: Ovis2Config(transformers="yes"), "transformers of Ovis2Config must be bool"),
        (lambda: Ovis2Config(fill=(0, 0)), "fill of Ovis2Config must be whole numbers, nested as these are"),
        (lambda: AnyResConfig(grids=((1, 0),)), "grids of AnyResConfig must be positive, got ((1, 0),)"),
        (lambda: AnyResConfig(grids=((1.5, 2),)), "grids of AnyResConfig must be whole numbers"),
        (lambda: AnyResConfig(grids=(3, 4)), "grids of AnyResConfig must be whole numbers"),
        (lambda: AnyResConfig(rate=(1, 0)), "rate of AnyResConfig must be positive"),
        (lambda: AnyResConfig(max_tiles="9"), "max_tiles of AnyResConfig must be a whole number"),
        (lambda: uhd.SlicingConfig(max_slices=10**9), "max_slices is at most 65536, got 1000000000"),
        (lambda: uhd.plan((9, 9), InternVLConfig(tile=20)), "views too small for a token: raise tile"),
    ],
)
def test_settings_are_checked_where_they_are_made(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_what_strategy_gave_is_the_rule_it_names():
    """Not a function of the caller's own: it has a name, is cached, and can be saved."""
    for name in ("llava-next", "llava-uhd", "openai"):
        assert find(uhd.strategy(name)) is find(name) is uhd.strategy(name)
        assert plan((1008, 672), uhd.strategy(name)) is plan((1008, 672), name)
    assert plan((1008, 672), uhd.strategy("llava-uhd"), max_tokens=200).num_tokens <= 200
    mine = functools.partial(plan, config="clip", max_tokens=None)
    assert find(mine) == OwnRule(mine)
    assert find(mine).name == "plan"
    assert find("clip").name == "clip-center-crop-336"


def test_candidate_grids_are_listed_without_trying_every_pair():
    """Up to the largest cap in a second or two, where trying every pair would take minutes."""
    slow = [(n // c, c) for n in range(3, 60) for c in range(1, n + 1) if n % c == 0]
    assert list(selectors.grids_up_to(59, 3)) == slow
    groups = {}
    for n in range(40, 0, -1):
        for a in (a for a in range(1, n + 1) if n % a == 0):
            groups.setdefault(a / (n // a), []).append((a, n // a))
    assert [(ratio, list(pairs)) for ratio, pairs in selectors.pairs_by_ratio(40).items()] == list(groups.items())
    assert len(selectors.grids_up_to(20_000)) == sum(20_000 // cols for cols in range(1, 20_001))


def test_phi4_cuts_36_tiles_and_no_more():
    for rows, cols in ((6, 6), (36, 1), (1, 36), (4, 9)):
        assert plan((448 * rows, 448 * cols), "phi4").grid == (rows, cols)
    for rows, cols in ((37, 1), (1, 37), (6, 7)):
        found = plan((448 * rows, 448 * cols), "phi4")
        assert math.prod(found.grid) <= 36
        assert found.grid != (rows, cols)


@pytest.mark.parametrize("name", ["deepseek-ocr2", "unlimited-ocr"])
def test_an_overview_of_one_pixel_is_planned_and_of_none_refused(name):
    """round() of half a pixel is 0: 1024 px over 2048 px of a side of 1 px are the first to be refused."""
    for size in ((1, 2047), (2047, 1)):
        overview = next(canvas for canvas in plan(size, name).canvases if canvas.kind == "overview")
        assert min(overview.content_hw) == 1
    for size in ((1, 2048), (2048, 1)):
        with pytest.raises(ValueError, match=r"its overview would be (0x1024|1024x0) px"):
            plan(size, name)


def test_settings_are_those_of_the_releases():
    """Every number of every rule, those too that no named one leaves at its default."""
    kept = json.loads((pathlib.Path(__file__).parents[1] / "golden/settings.json").read_text())
    classes = {type(entry.config) for entry in STRATEGIES.values()}
    found = {
        "rules": {name: entry.config.to_dict() for name, entry in STRATEGIES.items()},
        "presets": {name: config.to_dict() for name, config in uhd.slicing.PRESETS.items()},
        "defaults": {cls.__name__: {f.name: f.default for f in fields(cls)} for cls in classes},
        "vits": {name: asdict(shape) for name, shape in flops.VITS.items()},
        "lms": {name: asdict(shape) for name, shape in flops.LMS.items()},
    }
    assert json.loads(json.dumps(found)) == kept


def test_the_most_slices_may_be_asked_for():
    assert SlicingConfig(max_slices=65_536).max_slices == 65_536


def test_phi4_takes_ten_pixels_and_not_nine():
    assert plan((10, 448), "phi4").canvases[0].content_hw == (10, 448)
    with pytest.raises(ValueError, match="fitted it would be 9x448 px, at least 10 are needed"):
        plan((9, 448), "phi4")


def test_overviews_of_strips_have_a_pixel():
    for size in ((1, 4000), (4000, 1)):
        content = [canvas.content_hw for canvas in plan(size, "deepseek-vl2").canvases]
        assert min(map(min, content)) == 1, size
