"""Packed features: equal to transformers' own, and each step checked on features that carry their coordinates."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import uhd
from uhd.resampler import FeaturePacker, pack_features
from uhd.resampler.stitch import feature_lengths
from uhd.slicing import find
from uhd.slicing.plan import Box, Packing, SlicePlan
from uhd.slicing.strategies import STRATEGIES, anyres

D = 3
RNG = np.random.default_rng(0)
SIZES = [(336, 336), (1008, 672), (1080, 1920), (3000, 4000), (1568, 224), (300, 150), (176, 110), (1, 4096)]
SIZES += [(9, 2000), (2000, 2100), (2300, 2300), (1700, 2200), (2304, 1600), (1537, 2304), (2900, 1900), (4096, 4096)]
SIZES += [tuple(int(side) for side in pair) for pair in np.exp(RNG.uniform(4, 8.3, (40, 2)))]


def features_of(plan, seed=0, dtype=torch.float32):
    """(n, D) for every view."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, D, generator=generator, dtype=dtype) for count in feature_lengths(plan)]


def vectors():
    return {"newline": torch.tensor([1e3, 2e3, 3e3]), "separator": torch.tensor([7e5, 8e5, 9e5])}


def hf_config(plan_config):
    side = plan_config.tile
    return SimpleNamespace(
        config=SimpleNamespace(
            vision_config=SimpleNamespace(image_size=side, patch_size=plan_config.patch_size),
            image_grid_pinpoints=[[rows * side, cols * side] for rows, cols in plan_config.grids],
        )
    )


@pytest.mark.parametrize("name", ["llava-next", "granite-vision-3-anyres-384"])
def test_equals_llava_next_in_transformers(name):
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

    config = find(name)
    checked = 0
    for seed, image_hw in enumerate(SIZES):
        plan = uhd.plan(image_hw, name)
        if 0 in plan.packing.kept.size_hw:
            continue  # its unpadding cannot leave nothing: see the test of empty maps
        views, newline = features_of(plan, seed), vectors()["newline"]
        want, lengths = LlavaNextModel.pack_image_features(
            hf_config(config), [torch.stack(views)], torch.tensor([image_hw]), "full", image_newline=newline
        )
        got = pack_features(views, plan, newline=newline)
        assert torch.equal(got, want[0]), image_hw
        assert lengths.tolist() == [plan.num_tokens]
        checked += 1
    assert checked > 25


@pytest.mark.parametrize("most", [9, 4])
def test_equals_llava_onevision_in_transformers(most):
    """Single images, bounded maps among them, and images of one sample: one view and one newline."""
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    name = f"llava-onevision-anyres-max-{most}"
    config, newline, bounded = STRATEGIES[name].config, vectors()["newline"], 0
    for seed, image_hw in enumerate(SIZES):
        plan = uhd.plan(image_hw, name)
        if 0 in plan.packing.kept.size_hw:
            continue
        several = uhd.plan(image_hw, "llava-onevision-multi-image")
        both = [features_of(plan, seed), features_of(several, seed)]
        want, _ = LlavaOnevisionModel.pack_image_features(
            hf_config(config),
            [torch.stack(views) for views in both],
            torch.tensor([image_hw, image_hw]),
            image_newline=newline,
            vision_aspect_ratio=f"anyres_max_{most}",
        )
        assert torch.allclose(pack_features(both[0], plan, newline=newline), want[0], rtol=1e-6, atol=1e-6), image_hw
        assert torch.equal(pack_features(both[1], several, separator=newline), want[1])
        assert len(want[1]) == several.num_tokens == 730
        bounded += plan.packing.resized_hw is not None
    assert bounded > 10


def test_equals_llava_onevision_video_in_transformers():
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    frame = uhd.plan((480, 640), "llava-onevision-video")
    views = torch.stack([features_of(frame, seed)[0] for seed in range(5)])
    want = LlavaOnevisionModel.apply_pooling(hf_config(anyres.AnyResConfig(tile=384)), views)
    got = torch.stack([pack_features([view], frame) for view in views])
    assert got.shape == (5, 196, D)
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-6)


def coordinates(plan):
    """For every view its features' (row, column) on the slices' map, and 1; (-1 - index, ...) for an overview."""
    packing, out = plan.packing, []
    for view in plan.views:
        rows, cols = packing.view_hw
        if view.kind == "overview":
            out.append(torch.full((feature_lengths(plan)[view.index], D), -1.0 - view.index))
            continue
        dropped = sum(packing.overlap)
        top, left = view.row * (rows - dropped), view.col * (cols - dropped)
        grid = torch.stack(torch.meshgrid(torch.arange(rows) + top, torch.arange(cols) + left, indexing="ij"), -1)
        out.append(torch.cat([grid.flatten(0, 1).float(), torch.ones(rows * cols, 1)], dim=1))
    return out


def test_overlapping_maps_join_without_a_seam():
    """Molmo2: every patch once, in its place; then blocks of 2 x 2, a rest counting as one."""
    for image_hw, margins in (((400, 900), (4, 4)), ((1200, 500), (1, 3)), ((2000, 2000), (2, 0))):
        plan = uhd.plan(image_hw, find("molmo2").replace(margins=margins))
        assert plan.packing.overlap == margins
        got = pack_features(coordinates(plan), plan)
        rows, cols = plan.packing.map_hw
        grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")).float()
        want = F.avg_pool2d(grid[None], 2, ceil_mode=True, count_include_pad=False)[0].flatten(1).T
        assert torch.equal(got[math.prod(plan.packing.overview_hw) :, :2], want)
        assert torch.equal(got[:196], torch.full((196, D), -1.0))
        assert len(got) == plan.num_tokens


def test_which_view_an_overlap_is_taken_from():
    """A crop loses ``margins[0]`` patches where it follows another one, ``margins[1]`` where it is followed."""
    plan = uhd.plan((400, 900), find("molmo2").replace(margins=(1, 3), merge=1))
    assert plan.grid[1] > 1
    views = [
        torch.full((count, D), float(view.index))
        for view, count in zip(plan.views, feature_lengths(plan), strict=True)
    ]
    first_row = pack_features(views, plan)[27 * 27 :][: plan.packing.map_hw[1], 0].tolist()
    columns = [first_row.count(index) for index in range(1, plan.grid[1] + 1)]
    assert columns == [27 - 3, *[27 - 4] * (plan.grid[1] - 2), 27 - 1]


def test_order_newlines_and_separator():
    """DeepSeek-VL2: overview, separator, map; Phi-4: map cut to its content, separator, overview."""
    marks = vectors()
    for name, overview_first in (("deepseek-vl2", True), ("phi4", False)):
        plan = uhd.plan((700, 1100), name)
        rows, cols = plan.packing.final_hw
        got = pack_features(coordinates(plan), plan, **marks)
        assert len(got) == plan.num_tokens
        own = torch.tensor([[r, c, 1.0] for r in range(rows) for c in range(cols)]).view(rows, cols, D)
        lines = torch.cat([own, marks["newline"].expand(rows, 1, D)], 1).flatten(0, 1)
        side = plan.packing.overview_hw
        index = next(view.index for view in plan.views if view.kind == "overview")
        overview = torch.full((*side, D), -1.0 - index)
        overview = torch.cat([overview, marks["newline"].expand(side[0], 1, D)], 1).flatten(0, 1)
        blocks = [lines, marks["separator"][None], overview]
        assert torch.equal(got, torch.cat(blocks[::-1] if overview_first else blocks)), name


def test_a_separator_ends_the_image():
    marks = vectors()
    cut, uncut = uhd.plan((1200, 900), "unlimited-ocr"), uhd.plan((300, 200), "deepseek-ocr2")
    for plan in (cut, uncut):
        got = pack_features(features_of(plan), plan, **marks)
        assert torch.equal(got[-1], marks["separator"])
        assert (got == marks["separator"]).all(1).sum() == 1
    newlines = (pack_features(features_of(cut), cut, **marks) == marks["newline"]).all(1).sum()
    assert newlines == cut.num_separators - 1 == cut.packing.final_hw[0] + 16


PACKED = sorted(name for name in STRATEGIES if uhd.plan((1200, 1700), name).packing is not None)


@settings(max_examples=150)
@given(st.sampled_from(PACKED), st.tuples(st.integers(1, 2500), st.integers(1, 2500)))
def test_rows_are_what_the_plan_counts(name, image_hw):
    try:
        plan = uhd.plan(image_hw, name)
    except ValueError:
        return
    marks = {key: value for key, value in vectors().items() if key in STRATEGIES[name].config.learned}
    if "separator" not in marks:
        marks["separator"] = marks.get("newline")
    got = pack_features(features_of(plan), plan, **marks)
    assert got.shape == (plan.num_tokens, D)
    assert torch.isfinite(got).all()


def test_learned_names_what_packings_need():
    """A config's ``learned`` is what its plans use over many sizes, no more and no less."""
    for name, entry in STRATEGIES.items():
        used = set()
        for image_hw in [(300, 200), (1200, 1700), (3000, 500)]:
            packing = uhd.plan(image_hw, name).packing or Packing((1, 1))
            used |= {"newline"} if packing.newline or packing.overview_newline else set()
            used |= {"separator"} if packing.separator else set()
        learned = set(entry.config.learned)
        if name in ("llava-onevision-multi-image", "llava-onevision-video"):
            assert learned == {"newline"}  # the newline ends the image, or the video
        else:
            assert learned == used, name
    assert len(PACKED) > 12


def test_an_empty_map_keeps_the_overview():
    """A strip whose map is all padding: 0 rows, so no newlines, and the overview alone remains."""
    plan = uhd.plan((1, 4096), "llava-next")
    assert 0 in plan.packing.kept.size_hw
    views = features_of(plan)
    got = pack_features(views, plan, newline=vectors()["newline"])
    assert torch.equal(got, views[0])
    assert len(got) == plan.num_tokens == 576
    plan = uhd.plan((4096, 1), "llava-next")  # 0 columns: the rows are newlines alone
    rows, cols = plan.packing.kept.size_hw
    assert cols == 0
    got = pack_features(features_of(plan), plan, newline=vectors()["newline"])
    assert torch.equal(got[576:], vectors()["newline"].expand(rows, D))


def test_three_ways_to_give_features():
    plan = uhd.plan((500, 900), "llava-onevision")
    views, newline = features_of(plan), vectors()["newline"]
    want = pack_features(views, plan, newline=newline)
    assert torch.equal(pack_features(torch.cat(views), plan, newline=newline), want)
    assert torch.equal(pack_features(torch.stack(views), plan, newline=newline), want)
    plain = uhd.plan((500, 900), "internvl")
    views = features_of(plain)
    assert torch.equal(pack_features(views, plain), torch.cat(views))


@pytest.mark.parametrize("name", ["llava-onevision-anyres-max-4", "deepseek-vl2", "molmo2", "phi4", "unlimited-ocr"])
def test_gradients_reach_features_and_embeddings(name):
    plan = uhd.plan((1700, 1900), name)
    views = [view.requires_grad_() for view in features_of(plan)]
    packer = FeaturePacker(D, newline=True, separator=True)
    packer(views, plan).square().sum().backward()
    assert all(part.grad.any() for part in views)
    learned = find(name).learned
    for key in ("newline", "separator"):
        assert (getattr(packer, key).grad is not None) == (key in learned)
    newlines = plan.packing.newline * plan.packing.final_hw[0]
    newlines += plan.packing.overview_newline * plan.packing.overview_hw[0]
    if newlines:
        assert torch.allclose(packer.newline.grad, 2 * newlines * packer.newline.detach())


def test_gradients_by_finite_differences():
    """The whole way: overlap, cut, resize, merge, newline and separator in one packing."""
    maps = {"view_hw": (4, 4), "map_hw": (4, 6), "overlap": (1, 1), "kept": Box(1, 0, 4, 6), "resized_hw": (3, 5)}
    plan = SlicePlan(
        image_hw=(10, 20),
        patch_size=14,
        canvases=uhd.plan((300, 600), find("llava-next").for_vision(image_size=56, patch_size=14)).canvases,
        grid=(1, 2),
        num_visual_tokens=15,  # overview 2 x 2 and its newlines, separator, 2 x 3 and its newlines
        num_separators=0,
        strategy="all-steps",
        packing=Packing(**maps, merge=2, newline=True, overview_newline=True, separator="between"),
    )
    inputs = [view.double().requires_grad_() for view in features_of(plan)]
    marks = [vector.double().requires_grad_() for vector in (torch.randn(D), torch.randn(D))]

    def run(newline, separator, *views):
        return pack_features(views, plan, newline=newline, separator=separator)

    assert run(*marks, *inputs).shape == (15, D)
    assert torch.autograd.gradcheck(run, (*marks, *inputs))


def test_half_precision_keeps_its_dtype():
    plan = uhd.plan((500, 900), "llava-onevision-anyres-max-4")
    got = pack_features(features_of(plan, dtype=torch.bfloat16), plan, newline=vectors()["newline"])
    assert got.dtype == torch.bfloat16


def test_wrong_input_is_named():
    plan = uhd.plan((330, 600), "llava-next")
    views, newline = features_of(plan), vectors()["newline"]
    with pytest.raises(ValueError, match=r"needs newline=, a learned \(3,\) embedding, got None.*FeaturePacker"):
        pack_features(views, plan)
    with pytest.raises(ValueError, match=r"needs newline=.*got \(4,\)"):
        pack_features(views, plan, newline=torch.zeros(4))
    with pytest.raises(ValueError, match=r"packs 3 views of \[576, 576, 576\] features, got \[576, 576\]"):
        pack_features(views[:2], plan, newline=newline)
    with pytest.raises(ValueError, match=r"packs 1728 features \[576, 576, 576\], got 1700 packed rows"):
        pack_features(torch.cat(views)[:1700], plan, newline=newline)
    with pytest.raises(ValueError, match="the same D"):
        pack_features([views[0], views[1], views[2][:, :2]], plan, newline=newline)
    broken = SimpleNamespace(**{name: getattr(plan, name) for name in ("views", "packing", "grid", "strategy")})
    broken.num_tokens = plan.num_tokens - 1
    with pytest.raises(ValueError, match=f"gives {plan.num_tokens} tokens, its plan counts {plan.num_tokens - 1}"):
        pack_features(views, broken, newline=newline)
    broken.grid = (1, 1)
    with pytest.raises(ValueError, match="make a map of"):
        pack_features(views, SimpleNamespace(**{**vars(broken), "grid": (2, 1)}), newline=newline)
