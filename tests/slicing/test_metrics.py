"""Metrics of a plan: equal to tables made elsewhere from the executed references, and to formulas on made-up plans."""

import json
import math
import pathlib
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import uhd
from tests.slicing.test_strategies import words
from uhd.slicing import PRESETS, Box, Canvas, SlicePlan, flops, metrics, plan, view_box
from uhd.slicing.flops import LMShape, ResamplerShape, ViTShape, lm_flops, plan_flops, resampler_flops, vit_flops
from uhd.slicing.metrics import (
    cliffs,
    measure,
    monotonicity_violations,
    share_seen,
    summarize,
    transposition_violations,
)
from uhd.slicing.strategies import STRATEGIES

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
TABLES = json.loads((GOLDEN / "metrics.json").read_text())
"""Computed elsewhere from the executed references; the file says what its columns are."""

# where the tables' definition is another one, and which columns it concerns
OTHER_TOKENS = words(  # the table adds start and end tokens, tile markers or row breaks that are text
    "internvl_dynamic_448_max12 cohere2_vision_512_max12 idefics3_364 llama4_336_max16 ovis2_original_448_max9 "
    "ovis2_448_max9_covering lfm2_vl_512 molmo2_378_max8 gemma3_896_pas step3p7_728_504 qwen2_5_vl_ckpt "
    "pixtral_1024_p16 fuyu_1080x1920 gemma4_1120"
)
OTHER_PADDING = {
    "siglip2_naflex_256",  # the table counts the padded sequence, which is no pixel
    "openai_high_detail",  # the table leaves out the padding of the overview
    "phi4_multimodal_448_hd36",  # the mean falls on 15.5, and the table cuts
}
OTHER_DISTORTION = {
    "idefics2_split",  # four quarters of different sizes: ours takes the worst one
    "step3p7_728_504",  # windows beside an uncut image: the table's median is of other views
}
OTHER_KEPT = {"idefics3_364"}  # the table forgets the first of two resizes, to a longer side of 1456 px

SIZES = [
    (h, w)
    for w, h in json.loads((GOLDEN / "strategies.json").read_text())["sizes_wh"]
    if min(w, h) >= 64 and max(w, h) <= 8 * min(w, h)
]
everyday = st.tuples(st.integers(30, 2500), st.integers(30, 2500))


@pytest.mark.parametrize("name", sorted(TABLES["at_five_sizes"]))
def test_equals_the_table_at_five_sizes(name):
    for size, cell in zip(TABLES["sizes_hw"], TABLES["at_five_sizes"][name], strict=True):
        found = measure(plan(size, name))
        tokens, distortion, padding, kept = cell.split(" / ")
        if name not in OTHER_TOKENS:
            assert str(found.tokens) == tokens, size
        assert f"{found.distortion:.2f}" == distortion, size
        if name not in OTHER_PADDING:
            assert f"{100 * found.padding:.0f}" == padding, size
        if name not in OTHER_KEPT:
            assert f"{100 * found.resolution_kept:.0f}" == kept, size


def test_where_the_table_counts_text_too_the_difference_is_positive_and_small():
    for name in OTHER_TOKENS:
        for size, cell in zip(TABLES["sizes_hw"], TABLES["at_five_sizes"][name], strict=True):
            more = int(cell.split(" / ")[0]) - plan(size, name).num_tokens
            assert 0 < more <= 80, (name, size)


@pytest.mark.parametrize("name", sorted(TABLES["over_198_sizes"]))
def test_equals_the_aggregate_over_198_sizes(name):
    assert len(SIZES) == 198
    found = summarize(name, SIZES)
    median, high, padding, kept = TABLES["over_198_sizes"][name]
    if name not in OTHER_DISTORTION:
        assert round(found.distortion_median, 2) == median
        assert round(found.distortion_p95, 2) == high
    if name not in OTHER_PADDING:
        assert round(100 * found.padding_mean) == padding
    if name not in OTHER_KEPT:
        assert round(100 * found.resolution_kept_mean) == kept
    assert (found.compared, found.refused) == (198, 0)


def two_views(source_a, source_b, *, kind="slice", image_hw=(100, 200)):
    """Two canvases of one 28 x 56 px view each, of any parts of the image."""
    views = (Box(0, 0, 28, 56),)
    canvases = tuple(
        Canvas(kind, (28, 56), (28, 56), (1, 1), views, (28, 56), 5, source=source, cell=(0, place))
        for place, source in enumerate((source_a, source_b))
    )
    return SlicePlan(image_hw, 14, canvases, (1, 2), 10, 0, "two")


def test_a_partition():
    found = measure(two_views(Box(0, 0, 100, 100), Box(0, 100, 100, 200)))
    assert (found.coverage, found.duplication, found.seam) == (1, 1, pytest.approx(100 / math.sqrt(20000)))
    assert found.distortion == pytest.approx(2)  # 0.28 by 0.56
    assert found.resolution_kept == pytest.approx(0.28 * 0.56)
    assert (found.patches, found.attention_pairs, found.views) == (16, 128, 2)
    assert found.tokens_per_megapixel == pytest.approx(500)
    assert found.pixels_per_token_edge == pytest.approx(math.sqrt(20000 * 0.28 * 0.56 / 10))
    assert (found.padding, found.upsampling, found.budget_error) == (0, 1, None)


def test_an_overlap_duplicates_and_has_no_seam():
    found = measure(two_views(Box(0, 0, 100, 120), Box(0, 80, 100, 200)))
    assert (found.coverage, found.seam) == (1, 0)
    assert found.duplication == pytest.approx(1.2)
    assert found.resolution_kept == pytest.approx(0.28 * 56 / 120)


def test_a_gap_is_not_covered():
    found = measure(two_views(Box(0, 0, 100, 50), Box(50, 100, 100, 200)))
    assert found.coverage == pytest.approx(0.5)
    assert found.duplication == pytest.approx(0.5)
    assert found.resolution_kept == pytest.approx(0.25 * 0.28 + 0.25 * 0.56 * 0.56)


@pytest.mark.parametrize("order", [1, -1])
def test_where_views_overlap_the_sharper_one_counts_for_resolution(order):
    found = measure(two_views(*(None, Box(0, 0, 28, 56))[::order]))
    share = 28 * 56 / 20000
    assert found.resolution_kept == pytest.approx(share + (1 - share) * 0.28 * 0.28)
    assert found.distortion == 1


def test_what_a_first_resize_loses_does_not_come_back():
    """Idefics3: 1080 x 1920 px become 820 x 1456, and only then 1092 x 1456."""
    found = measure(plan((1080, 1920), "idefics3"))
    assert found.resolution_kept == pytest.approx(820 / 1080 * 1456 / 1920)
    assert found.distortion == pytest.approx(1092 / 1080 / (1456 / 1920))
    shown = two_views(Box(0, 0, 100, 100), Box(0, 100, 100, 200))
    small = replace(shown, canvases=tuple(replace(canvas, first_hw=(14, 112)) for canvas in shown.canvases))
    assert measure(small).resolution_kept == pytest.approx(0.14 * 0.56)
    assert measure(small).distortion == measure(shown).distortion


def test_enlarging_counts_as_upsampling_not_as_resolution():
    found = measure(two_views(Box(0, 0, 14, 56), Box(0, 0, 28, 28), image_hw=(28, 56)))
    assert found.upsampling == pytest.approx(2)
    assert found.resolution_kept == pytest.approx(0.75)


def test_padding_and_crops():
    view = (Box(0, 0, 28, 28),)
    padded = Canvas("overview", (14, 28), (28, 28), (1, 1), view, (28, 28), 4, offset=(7, 0), fill=(0, 0, 0))
    found = measure(SlicePlan((100, 200), 14, (padded,), None, 4, 0, "padded"))
    assert (found.padding, found.coverage, found.distortion) == (0.5, 1, 1)
    cropped = replace(padded, content_hw=(28, 56), offset=(0, -14), fill=None)
    found = measure(SlicePlan((100, 200), 14, (cropped,), None, 4, 0, "cropped"))
    assert (found.padding, found.coverage) == (0, pytest.approx(0.5))
    assert found.resolution_kept == pytest.approx(0.5 * 0.28**2)


def test_a_tile_of_nothing_but_padding_is_no_detail_view():
    tiles = (Box(0, 0, 28, 28), Box(0, 28, 28, 56))
    canvas = Canvas("slice", (28, 28), (28, 56), (1, 2), tiles, (28, 28), 4, fill=(0, 0, 0))
    found = measure(SlicePlan((28, 28), 14, (canvas,), (1, 2), 8, 0, "half"))
    assert (found.padding, found.duplication, found.seam) == (0.5, 1, 0)


@given(everyday, st.sampled_from(sorted(STRATEGIES)))
@settings(max_examples=120)
def test_bounds_hold_for_every_rule(size, name):
    try:
        planned = plan(size, name)
    except ValueError:
        return
    found = measure(planned)
    assert found.distortion >= 1
    assert 0 <= found.padding < 1
    assert 0 < found.resolution_kept <= found.coverage + 1e-9 <= 1 + 2e-9
    assert found.duplication >= found.coverage - 1e-9
    assert found.upsampling >= 1
    assert found.seam >= 0
    assert found.flops.total == found.flops.encoder + found.flops.compressor + found.flops.lm > 0
    json.dumps(found.to_dict())


@given(everyday)
def test_the_adaptive_cut_is_a_partition_with_the_seams_of_its_grid(size):
    planned = plan(size, "llava-uhd")
    found = measure(planned)
    rows, cols = planned.grid or (1, 1)
    assert found.coverage == pytest.approx(1)
    assert found.duplication == pytest.approx(1)
    assert found.seam == pytest.approx(((rows - 1) * size[1] + (cols - 1) * size[0]) / math.sqrt(size[0] * size[1]))
    assert found.padding == 0


@given(everyday, st.sampled_from(["molmo2", "openai-high-detail-overlap", "gemma3-896-pas", "idefics2-split", "clip"]))
@settings(max_examples=40)
def test_duplication_is_the_sum_of_view_boxes(size, name):
    """Against the exact coordinate maps."""
    planned = plan(size, name)
    kind = "slice" if planned.slice_hw else "overview"
    total = Fraction(0)
    for view in planned.views:
        if view.kind == kind:
            top, left, bottom, right = view_box(planned, view.index)
            total += max(min(bottom, size[0]) - max(top, 0), 0) * max(min(right, size[1]) - max(left, 0), 0)
    assert measure(planned).duplication == pytest.approx(float(total / (size[0] * size[1])), abs=1e-6)


def test_extremes_are_measured():
    for size in ((1, 1), (1, 4096), (4096, 1), (999_983, 31), (10**6, 10**6)):
        for name in ("llava-uhd-safe", "llava-next", "internvl", "gemma4-280", "idefics3", "gemma3-896-pas"):
            found = measure(plan(size, name))
            assert all(math.isfinite(v) for v in (found.distortion, found.resolution_kept, found.seam))


def test_views_in_general_position_are_refused_rather_than_allocated():
    views = (Box(0, 0, 14, 14),)
    canvases = tuple(
        Canvas("slice", (14, 14), (14, 14), (1, 1), views, (14, 14), 1, source=Box(i, i, 5000 + i, 5000 + i))
        for i in range(2200)
    )
    with pytest.raises(ValueError, match="2200 views cut the image into 4399 x 4399"):
        measure(SlicePlan((8000, 8000), 14, canvases, None, 2200, 0, "many"))


def test_what_is_not_measured():
    with pytest.raises(TypeError, match="a SlicePlan is measured, got str"):
        measure("internvl")
    assert measure(plan((1008, 672), "llava-uhd"), budget=908).budget_error == 0.5
    for bad in (0, -3, 2.5, True):
        with pytest.raises(ValueError, match=f"budget must be a positive int or None, got {bad}"):
            measure(plan((30, 50)), budget=bad)
    for metric in (cliffs, transposition_violations, monotonicity_violations, summarize):
        with pytest.raises(ValueError, match="two whole numbers of pixels"):
            metric("internvl", (300, 500))
        with pytest.raises(ValueError, match="each must lie in"):
            metric("internvl", [(300, 500), (0, 5)])
    with pytest.raises(ValueError, match="factor enlarges"):
        monotonicity_violations("internvl", [(300, 500)], factor=0)


def test_the_share_seen_counts_every_view():
    assert share_seen(plan((300, 500), "clip")) == pytest.approx(0.6)
    assert share_seen(plan((300, 500), "molmo2")) == pytest.approx(1)


def test_cliffs():
    sizes = [(150, 137), (500, 500), (300, 300)]
    found = cliffs("internvl-dynamic-448-max40", sizes)
    tokens = uhd.plan_many([(h, w + more) for h, w in sizes for more in (0, 1)], "internvl-dynamic-448-max40")
    by_hand = [max(pair) / min(pair) for pair in tokens["num_tokens"].reshape(-1, 2).tolist()]
    assert found.worst == max(by_hand) == 31
    assert found.worst_at == sizes[by_hand.index(max(by_hand))]
    assert found.share == sum(j >= 1.1 for j in by_hand) / 3
    steady = cliffs("siglip", SIZES[:20])
    assert (steady.worst, steady.share, steady.compared) == (1, 0, 20)


def test_transposition_and_monotonicity():
    assert transposition_violations("llava-1.5", SIZES[:30]).share == 0
    found = transposition_violations("fuyu", [(2000, 500), (500, 500)])
    assert (found.share, found.example) == (0.5, (2000, 500))
    assert monotonicity_violations("llava-1.5", SIZES[:30]) == (0.0, None, 30, 0)

    def shrinking(size):
        return replace(plan(size, "llava-1.5"), num_visual_tokens=10**6 // size[0])

    assert monotonicity_violations(shrinking, [(100, 70), (200, 90)]).share == 1


def test_refused_sizes_are_counted_not_hidden():
    found = cliffs("qwen2-vl", [(1, 500), (300, 400)])
    assert (found.compared, found.refused) == (1, 1)
    assert summarize("qwen2-vl", [(1, 500), (300, 400)]).refused == 1
    assert cliffs("qwen2-vl", [(1, 500)]).compared == 0
    with pytest.raises(ValueError, match="refused all of 1 sizes"):
        summarize("qwen2-vl", [(1, 500)])


# --- FLOPs


def test_vit_and_projector_formulas_equal_what_is_multiplied():
    import torch
    from torch import nn

    from uhd.flop_counter import count_flops
    from uhd.vision import ViT, ViTConfig

    vit = ViT(ViTConfig(patch_size=4, width=32, depth=3, heads=4, mlp_width=48, image_size=32, class_token=True))
    shape, grids = ViTShape(3, 32, 48, prefix=1), [(5, 7), (3, 4)]
    assert count_flops(lambda: vit(torch.randn(47, 48), grids)) == sum(
        vit_flops(h * w, shape, patch_size=4) for h, w in grids
    )
    projector = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64))
    assert count_flops(lambda: projector(torch.randn(35, 32))) == flops.mlp_flops(35, 32, width=64)


def test_resampler_formula_equals_what_is_multiplied():
    import torch
    from torch import nn

    from uhd.flop_counter import count_flops

    into, out = nn.Linear(32, 64, bias=False), nn.Linear(64, 64)
    attend = nn.MultiheadAttention(64, 4, batch_first=True)

    def forward():
        keys = into(torch.randn(1, 35, 32))
        out(attend(torch.randn(1, 9, 64), keys, keys, need_weights=False)[0])

    counted = count_flops(forward)
    assert counted == resampler_flops(35, 32, ResamplerShape(9), width=64)
    assert counted == resampler_flops(35, 32, ResamplerShape(9, width=64), width=7)


def test_a_plans_flops_are_its_parts():
    planned = plan((1008, 672), "llava-uhd")
    found = plan_flops(planned, resampler="perceiver-64")
    assert found.encoder == 6 * vit_flops(576, "clip-l") + vit_flops(551, "clip-l")
    each = [resampler_flops(patches, 1024, "perceiver-64", width=5120) for patches in (576, 551)]
    assert found.compressor == 6 * each[0] + each[1]
    assert found.lm == lm_flops(454, "llama-13b")
    head = plan_flops(planned, resampler="perceiver-64", head=True)
    assert head.total - found.total == 2 * 454 * 5120 * 32000
    other = plan_flops(planned, vit=flops.VITS["siglip-b"], lm=LMShape(1, 8, 16, 8, 10))
    assert other.lm == 2 * 454 * (2 * 64 + 2 * 64 + 3 * 128) + 4 * 454**2 * 8
    assert lm_flops(10, "llama-3-8b") < lm_flops(10, replace(flops.LMS["llama-3-8b"], kv_width=4096))


def test_unknown_models_are_named():
    with pytest.raises(ValueError, match="no model named 'clip-xl': did you mean 'clip-l'"):
        measure(uhd.plan((30, 40)), vit="clip-xl")


@pytest.mark.parametrize("size", [(1, 1), (3, 3000), (811, 1501), (1999, 640), (5000, 4000)])
def test_side_by_side_tiles_are_measured_as_any_views_are(size):
    """Most plans are one canvas of equal tiles, which has formulas; the general way must give the same numbers."""
    formulas = 0
    for name in (*PRESETS, *STRATEGIES):
        try:
            found = plan(size, name)
        except ValueError:
            continue
        short = metrics._regular(found, [metrics._tiled(canvas) for canvas in found.canvases])
        if short is not None:
            assert short == pytest.approx(metrics._general(found), rel=1e-6), name
            formulas += 1
    assert formulas > 60
