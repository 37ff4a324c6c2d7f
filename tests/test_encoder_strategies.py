"""Every strategy in the encoder: one argument to swap, counts equal to the plan's, one budget for samples."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import uhd
from tests import tiny
from tests.tiny import PIXELS, assert_same_images, noise, perceiver, refuses
from uhd.cli import main
from uhd.demo import untrained_encoder
from uhd.encoded import EncodedVideo
from uhd.merge import assemble, merge_samples
from uhd.resampler import (
    FeaturePacker,
    MLPProjector,
    PerceiverConfig,
    PerceiverResampler,
    PixelShuffleProjector,
    PoolProjector,
    pack_features,
)
from uhd.schema.counted import PLAIN, Counted, layout_of, slicing_from_dict
from uhd.slicing import (
    PRESETS,
    Box,
    Canvas,
    OwnRule,
    SlicePlan,
    SlicingConfig,
    VideoPlan,
    find,
    plan_images,
    plan_video,
)
from uhd.slicing.plan import Packing
from uhd.slicing.strategies import ALIASES, STRATEGIES
from uhd.token_files import load_tokens, save_tokens

DOCS = Path(__file__).parent.parent / "docs"


def small(name):
    """A strategy for the tiny backbone: views of 56 px, patches of 14."""
    return find(name).for_vision(image_size=56, patch_size=14)


def tiny_encoder(compressor=None, slicing="llava-next", **parts):
    torch.manual_seed(0)
    slicing = small(slicing) if isinstance(slicing, str) else slicing
    return tiny.tiny_encoder(compressor or MLPProjector(32, 24), slicing=slicing, **parts)


IMAGES = [noise(100, 60), noise(30, 200, 1), noise(168, 112, 2)]


@pytest.mark.parametrize("name", [*STRATEGIES, *PRESETS])
def test_every_strategy_encodes(name):
    """At its own view and patch sizes, with a compressor that gives what it counts."""
    encoder = untrained_encoder(strategy=name, depth=1, width=16, out_dim=16)
    with torch.no_grad():
        image = encoder([noise(120, 90)])[0]
    plan = uhd.plan((120, 90), name)
    assert image.plan == encoder.plan((120, 90)) == uhd.plan((120, 90), encoder.slicing)
    assert image.plan.views[0].size_hw == plan.views[0].size_hw
    assert image.layout.num_tokens == image.plan.num_tokens
    assert len(image.tokens) == image.layout.num_visual_tokens
    assert torch.isfinite(image.tokens).all()
    assert image.plan.num_tokens == plan.num_tokens
    if image.plan.num_separators == 0 or image.plan.packing is not None:
        assert torch.equal(assemble(image.tokens, image.layout, {}), image.tokens)


def test_the_code_of_the_documentation_runs(capsys):
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / "strategies.md").read_text(), re.S):
        exec(compile(block, "docs/strategies.md", "exec"), names)
    assert {"730", "1569", "2048"} <= set(capsys.readouterr().out.splitlines())


def test_every_name_reaches_its_strategy():
    assert set(uhd.strategies()) == {*STRATEGIES, *PRESETS, *ALIASES}


@pytest.mark.parametrize("name", sorted({find(name).name for name in [*STRATEGIES, *ALIASES]}))
def test_swapping_is_one_argument(name):
    """The same backbone and resampler under any rule: every view has its latents, the schema's separators count."""
    config = small(name)
    for schema in (None, "llava-uhd"):
        encoder = tiny_encoder(perceiver(), config, schema=schema)
        plan = encoder.plan((70, 60))
        assert plan.packing is None
        assert plan.num_visual_tokens == 4 * plan.num_views
        assert plan.num_separators == layout_of(plan, encoder.schema).num_separators
        assert [view.size_hw for view in plan.views] == [view.size_hw for view in uhd.plan((70, 60), config).views]
        if plan.num_patches > 3000:
            continue
        with torch.no_grad():
            image = encoder([noise(70, 60)])[0]
        assert image.tokens.shape == (plan.num_visual_tokens, 24)
        assert len(image.views) == plan.num_views
        assert slicing_from_dict(json.loads(json.dumps(encoder.slicing.to_dict()))) == encoder.slicing


@pytest.mark.parametrize("latents", [4, 100, 170])
def test_an_overview_that_costs_less_keeps_the_first_latents(latents, tmp_path):
    """OpenAI: 85 tokens of an overview and 170 of a tile, with one resampler; fewer latents bound both."""
    compressor = PerceiverResampler(
        PerceiverConfig(
            width=24, vision_width=32, num_heads=2, num_latents=latents, query_position=False, key_position="direct"
        )
    )
    encoder = tiny_encoder(compressor, "openai-high-detail")
    image = noise(70, 60)
    plan = encoder.plan((70, 60))
    assert [view.num_tokens for view in plan.views] == [min(85, latents)] + [latents] * 4
    assert (plan.num_tokens == uhd.plan((70, 60), small("openai-high-detail")).num_tokens) == (latents == 170)
    encoder.save_pretrained(tmp_path)
    again = uhd.VisualEncoder.from_pretrained(tmp_path)
    with torch.no_grad():
        (found,), (alone,), (loaded,) = encoder([image]), tiny_encoder(compressor, "siglip")([image]), again([image])
        both = encoder([image, noise(40, 30, 1)])
        batch = encoder.prepare([image])
        raw, lengths = encoder.encode_packed(batch.patches, batch.grids)
    assert len(found.tokens) == plan.num_tokens == found.layout.num_tokens
    whole = raw.split(lengths)
    assert torch.equal(found.tokens, torch.cat([whole[0][:85], *whole[1:]]))
    assert alone.tokens.shape == (latents, 24)  # no other rule leaves latents out
    assert torch.equal(loaded.tokens, found.tokens)
    assert torch.allclose(both[0].tokens, found.tokens, atol=1e-5)
    assert [len(view) for view in found.views] == [view.num_tokens for view in plan.views]


def test_every_rule_is_encoded_with_its_own_filter():
    image = noise(300, 200)
    rules = {"lanczos": "smolvlm", "bilinear": "llama4", "bicubic": "internvl"}
    for filter_name, name in rules.items():
        own = tiny_encoder(perceiver(), name).prepare([image]).patches
        for other in rules:
            pixels = replace(PIXELS, resample=other)
            given_one = tiny_encoder(perceiver(), name, pixels=pixels).prepare([image]).patches
            assert torch.equal(own, given_one) == (other == filter_name)


def test_next_tokens_are_the_packed_projections():
    """LLaVA-NeXT end to end: the projector on every view by itself, then the packing with the learned newline."""
    encoder = tiny_encoder()
    with torch.no_grad():
        image = encoder([IMAGES[2]])[0]
        batch = encoder.prepare([IMAGES[2]])
        assert image.plan.grid == (2, 2)
        views = [
            encoder.compressor(encoder.vision(part, [g]), [g])
            for part, g in zip(batch.normalized(PIXELS).split(), batch.grids, strict=True)
        ]
        want = pack_features(views, image.plan, newline=encoder.packer.newline)
    assert torch.allclose(image.tokens, want, atol=1e-5)
    rows, cols = image.plan.packing.final_hw
    assert image.tokens.shape == (16 + rows * (cols + 1), 24)
    newlines = (image.tokens == encoder.packer.newline).all(1).nonzero().flatten()
    assert newlines.tolist() == [16 + cols + row * (cols + 1) for row in range(rows)]
    assert image.layout.symbols == ("image",)
    with pytest.raises(ValueError, match="are packed, not one view's each"):
        image.views  # noqa: B018


def test_packed_tokens_merge_into_a_batch():
    """Counted by the merging of samples, as any image's."""
    encoder = tiny_encoder()
    embed = nn.Embedding(10, 24)
    with torch.no_grad():
        rows = [assemble(image.tokens, image.layout, {}) for image in encoder(IMAGES[:2])]
        batch = merge_samples([[1, 9, 2], [9, 3]], [rows[:1], rows[1:]], embed=embed, image_token_id=9, pad_token_id=0)
    assert batch.visual_mask.sum(1).tolist() == [
        encoder.plan((100, 60)).num_tokens,
        encoder.plan((30, 200)).num_tokens,
    ]
    refuses("packed rows", assemble, rows[0][:-1], encoder(IMAGES[:1])[0].layout, {})


def test_a_saved_encoder_takes_another_strategy(tmp_path):
    """New newlines are announced; those that were saved are kept for the way back."""
    tiny_encoder(slicing=SlicingConfig(image_size=56)).save_pretrained(tmp_path)
    swapped = uhd.VisualEncoder.from_pretrained(tmp_path, slicing=small("llava-next"))
    assert swapped.note == "packer.newline: new, UNTRAINED weights, since the saved encoder had another slicing"
    assert swapped.schema == PLAIN
    swapped.note = ""
    swapped.save_pretrained(tmp_path)
    back = uhd.VisualEncoder.from_pretrained(tmp_path, slicing=SlicingConfig(image_size=56))
    assert (back.note, back.schema.name) == ("", "llava-uhd")
    assert torch.equal(back.packer.newline, swapped.packer.newline)
    both = uhd.VisualEncoder.from_pretrained(tmp_path, slicing=small("deepseek-vl2"))
    assert both.note.startswith("packer.separator: new, UNTRAINED")
    assert torch.equal(both.packer.newline, swapped.packer.newline)
    with torch.no_grad():
        assert torch.equal(
            back(IMAGES)[0].tokens, tiny_encoder(slicing=SlicingConfig(image_size=56))(IMAGES)[0].tokens
        )


def whole_and_middle(image_hw):
    """A user's own rule: the whole image and its middle, the middle's map cut and ended by newlines."""
    views = (Box(0, 0, 56, 56),)
    whole = Canvas("overview", (56, 56), (56, 56), (1, 1), views, (56, 56), 16)
    half = Box(0, 0, max(image_hw[0] // 2, 1), image_hw[1])
    detail = Canvas("slice", (56, 56), (56, 56), (1, 1), views, (56, 56), 16, source=half)
    packing = Packing((4, 4), map_hw=(4, 4), kept=Box(1, 0, 4, 4), newline=True)
    return SlicePlan(image_hw, 14, (whole, detail), (1, 1), 16 + 12, 3, "whole-and-middle", packing)


def test_what_strategy_gave_can_be_encoded_with_and_saved(tmp_path):
    encoder = tiny_encoder(slicing=uhd.strategy("llava-uhd"), check_image_size=False, compressor=perceiver())
    assert encoder.slicing.name == "llava-uhd"
    encoder.save_pretrained(tmp_path)
    assert uhd.VisualEncoder.from_pretrained(tmp_path).slicing == encoder.slicing


def test_a_function_is_a_strategy(tmp_path):
    refuses(r"needs newline=.*FeaturePacker", tiny_encoder(slicing=whole_and_middle), IMAGES)
    encoder = tiny_encoder(slicing=whole_and_middle, packer=FeaturePacker(24))
    image = encoder(IMAGES[:1])[0]
    assert image.tokens.shape == (31, 24)
    encoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"slicing function of the caller's own, 'whole_and_middle': pass slicing="):
        uhd.VisualEncoder.from_pretrained(tmp_path)
    again = uhd.VisualEncoder.from_pretrained(tmp_path, slicing=whole_and_middle)
    assert again.note == ""
    assert torch.equal(again(IMAGES[:1])[0].tokens, image.tokens)
    counted = tiny_encoder(perceiver(), whole_and_middle, schema="llava-uhd")
    assert counted.slicing == Counted(OwnRule(whole_and_middle), 4, counted.schema)
    assert counted(IMAGES[:1])[0].layout.symbols == ("s0", "\n", "overview")
    counted.save_pretrained(tmp_path)
    refuses("caller's own", uhd.VisualEncoder.from_pretrained, tmp_path)


def test_parts_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"plans for image_size=448, patch_size=14.*uhd.strategy\('internvl-dynamic-448-max12'\)"
    ) as told:
        tiny_encoder(slicing=find("internvl"))
    assert "slicing.for_vision(image_size=56, patch_size=14)" in str(told.value)
    assert tiny_encoder(slicing=find("internvl"), check_image_size=False).slicing.tile == 448
    refuses(r"slicing.for_vision\(image_size=None, patch_size=14\)", tiny_encoder, slicing=find("qwen3-vl"))
    refuses("counts 4 tokens, the compressor gave 16: take a compressor", tiny_encoder(slicing="internvl"), IMAGES)
    refuses("has its own packing, so schema 'llava-uhd' cannot", tiny_encoder(schema="llava-uhd"), IMAGES)
    tiny_encoder().save_pretrained(tmp_path)
    refuses("^no strategy named 'lava'", uhd.VisualEncoder.from_pretrained, tmp_path, slicing="lava")
    with pytest.raises(ValueError, match="no strategy named 'llava-nest': did you mean 'llava-next'"):
        uhd.VisualEncoder(tiny_encoder().vision, MLPProjector(32, 24), slicing="llava-nest", pixels=PIXELS)

    with pytest.raises(ValueError, match="'deepseek-vl2-384' needs learned embeddings, the packer has no separator"):
        tiny_encoder(slicing="deepseek-vl2", packer=FeaturePacker(24))

    class Widthless(nn.Module):
        tokens_per_view = None

    refuses(r"needs learned embeddings \(newline\).*packer=uhd.resampler.FeaturePacker", tiny_encoder, Widthless())

    def separated(image_hw):
        return replace(whole_and_middle(image_hw).overview_alone(), num_separators=2)

    with pytest.raises(ValueError, match="with 2 separators, schema 'plain' has 0: give the encoder the schema"):
        tiny_encoder(slicing=separated)(IMAGES)
    encoder = tiny_encoder()
    refuses("planned already", encoder, encoder.prepare(IMAGES), max_tokens=50)


def test_a_schema_goes_around_the_views_of_any_projector():
    """InternVL's slices with "," and newlines of the language model between them; counted in the plan."""
    encoder = tiny_encoder(PixelShuffleProjector(32, 24, factor=2), "internvl", schema="llava-uhd")
    with torch.no_grad():
        image = encoder([noise(112, 56)])[0]
    assert image.layout.symbols == ("s0", "\n", "s1", "\n", "overview")
    assert (image.plan.num_separators, image.plan.num_tokens, len(image.tokens)) == (2, 14, 12)
    plain = tiny_encoder(PixelShuffleProjector(32, 24, factor=2), "internvl").plan((112, 56))
    assert plain == uhd.plan((112, 56), small("internvl"))


def test_the_demo_shows_an_encoder_of_any_strategy(tmp_path, capsys):
    for name in ("llava-next", "llama4"):
        encoder = tiny_encoder(PoolProjector(32, 24, factor=getattr(small(name), "merge", 1)), name)
        encoder.save_pretrained(tmp_path)
        assert main(["demo", "--encoder", str(tmp_path), "-o", str(tmp_path / "demo.png")]) == 0
        out = capsys.readouterr().out
        assert ("newlines included" in out) == (name == "llava-next")
        assert f"{encoder.plan((1008, 672)).num_tokens} positions" in out


# several images and videos


def test_onevision_video_end_to_end():
    """Every frame pooled, one newline after the last; equal to the frames one by one."""
    encoder = tiny_encoder(slicing="llava-onevision")
    frames = [noise(60, 80, seed) for seed in range(3)]
    with torch.no_grad():
        video, short = encoder.encode_videos([frames, frames[:1]])
        each = tiny_encoder(slicing=small("llava-onevision-video"))(frames)
    assert video.plan.num_tokens == 3 * 4 + 1 == len(video.tokens) == video.layout.num_tokens
    assert len(short.tokens) == 5
    want = torch.cat([*(frame.tokens for frame in each), encoder.packer.newline[None]])
    assert torch.allclose(video.tokens, want, atol=1e-5)
    assert video.layout.symbols == ("image", "image", "image", "newline")
    assert torch.equal(assemble(video.tokens, video.layout, {}), video.tokens)
    assert torch.allclose(short.tokens[:4], video.tokens[:4], atol=1e-5)
    real = plan_video((480, 640), 8, "llava-onevision")
    assert (real.num_tokens, real.num_frames, real.num_patches) == (1569, 8, 8 * 729)
    assert VideoPlan.from_dict(json.loads(json.dumps(real.to_dict()))) == real


def test_onevision_images_of_one_sample():
    encoder = tiny_encoder(slicing="llava-onevision")
    with torch.no_grad():
        images = encoder(IMAGES, multi_image=True)
        alone = encoder(IMAGES[:1], multi_image=True)[0]
    assert [len(image.tokens) for image in images] == [17, 17, 17]
    assert all(torch.equal(image.tokens[-1], encoder.packer.newline) for image in images)
    assert alone.plan == encoder.plan((100, 60))  # one image is cut as ever
    assert [p.num_tokens for p in plan_images([(480, 640)] * 2, "llava-onevision", multi_image=True)] == [730, 730]
    cropping = [len(plan_images([(900, 700)] * n, "deepseek-vl2", multi_image=True)[0].views) for n in (1, 2, 3)]
    assert cropping[0] == cropping[1] > cropping[2] == 2


@pytest.mark.parametrize("frames", ["video", "single", "rule"])
@pytest.mark.parametrize("schema", ["llava-uhd", "minicpm-v-2.6"])
def test_videos_under_the_adaptive_planner(frames, schema):
    encoder = tiny_encoder(perceiver(), SlicingConfig(image_size=56), schema=schema)
    with torch.no_grad():
        video = encoder.encode_videos([[noise(120, 80, seed) for seed in range(2)]], frames=frames)[0]
        images = encoder([noise(120, 80, seed) for seed in range(2)])
    assert video.layout.num_tokens == video.plan.num_tokens
    assert len(video.tokens) == video.layout.num_visual_tokens
    if frames == "rule":
        assert torch.allclose(video.tokens, torch.cat([image.tokens for image in images]), atol=1e-5)
    else:
        assert len(video.tokens) == 8
    separators = {
        symbol: torch.randn(24) for symbol in set(video.layout.symbols) if not re.match(r"s\d|overview", symbol)
    }
    assert assemble(video.tokens, video.layout, separators).shape == (video.plan.num_tokens, 24)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("internvl", 256),
        ("llama4", 144),
        ("deepseek-vl2", 14 * 15),
        ("phi4", 16 * 17),
        ("unlimited-ocr", 16 * 17 + 1),
        ("molmo2", 14 * 14),
        ("idefics2-split", 64),
    ],
)
def test_single_views_of_rules_with_an_overview(name, tokens):
    """The overview alone is encoded; its own newlines and separator at the end stay."""
    frame = find(name).single_view((900, 1400))
    assert (frame.num_views, frame.num_tokens) == (1, tokens)
    assert frame.views[0].kind == "overview"
    encoder = untrained_encoder(strategy=name, depth=1, width=16, out_dim=16)
    with torch.no_grad():
        video = encoder.encode_videos([[noise(900, 1400)]])[0]
    assert video.plan.plans == (frame,)
    assert len(video.tokens) == frame.num_tokens


def test_videos_are_checked():
    encoder = tiny_encoder(slicing="llava-onevision")
    with pytest.raises(ValueError, match=r"video 1 has 2 frames of the sizes \[\(20, 30\), \(30, 20\)\]"):
        encoder.encode_videos([[noise(20, 30)], [noise(20, 30), noise(30, 20)]])
    refuses("video 0 has 0 frames", encoder.encode_videos, [[]])
    assert encoder.encode_videos([]) == []
    refuses("num_frames must be a positive int, got 0", plan_video, (20, 30), 0)
    refuses("frames must be one of 'video', 'single', 'rule', got 'all'", plan_video, (20, 30), 2, frames="all")
    refuses("num_frames must be a positive int, got 2.5", plan_video, (20, 30), 2.5)
    refuses("give at most 5 frames, or raise it", plan_video, (480, 640), 8, "llava-onevision", max_tokens=1000)
    assert plan_video((480, 640), 5, "llava-onevision", max_tokens=1000).num_tokens == 981
    with pytest.raises(ValueError, match="max_tokens is 100: raise it to 197 at least, which is one frame"):
        plan_video((480, 640), 8, "llava-onevision", max_tokens=100)
    with pytest.raises(ValueError, match="^1 video of 8 frames cost at least 2048 tokens .*give fewer frames, or"):
        plan_video((720, 1280), 8, "internvl", frames="rule", max_tokens=100)
    with pytest.raises(TypeError, match=r"video 0 is a ndarray of shape \(20, 30, 3\): expected a list of frames"):
        encoder.encode_videos([noise(20, 30)])
    refuses('has no overview.*frames="rule"', plan_video, (3000, 3000), 2, "mllama")
    assert uhd.plan((3000, 3000), "mllama").overview_alone() is None
    refuses("not the dictionary of a VideoPlan", VideoPlan.from_dict, {"newline": True})


@pytest.mark.parametrize("bad", [0, -1, 99.5, "100", True])
def test_a_budget_is_a_positive_whole_number(bad):
    for call in (
        lambda: plan_images([], max_tokens=bad),
        lambda: plan_images([(1008, 672)], max_tokens=bad),
        lambda: plan_video((20, 30), 2, max_tokens=bad),
        lambda: plan_video((20, 30), 2, frames="rule", max_tokens=bad),
    ):
        refuses(f"max_tokens must be a positive int or None, got {bad!r}", call)


def test_videos_as_arrays():
    encoder = tiny_encoder(slicing="llava-onevision")
    frames = [noise(20, 30, seed) for seed in range(3)]
    want = encoder.encode_videos([frames])[0].tokens
    for video in (np.stack(frames), torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)):
        assert torch.equal(encoder.encode_videos([video])[0].tokens, want)


BUDGETED = [
    "llava-uhd-safe",
    "minicpm-v-4.6",
    "llava-uhd-paper",
    "internvl",
    "llava-onevision",
    "llava-next",
    "deepseek-vl2",
]
BUDGETED += ["phi4", "llama4", "cohere2", "ovis2", "perception-lm", "smolvlm", "unlimited-ocr", "lfm2-vl", "mllama"]
sizes = st.lists(st.tuples(st.integers(20, 3000), st.integers(20, 3000)), min_size=1, max_size=5)


@settings(max_examples=120, deadline=None)
@given(sizes, st.sampled_from(BUDGETED), st.floats(0.05, 1.1))
@example([(20, 897)], "phi4", 0.5)  # with one slice the rule refuses a picture as flat as this
@example([(2146, 633)], "llava-uhd", 0.915)  # a cap of as many slices as it has gives fewer
def test_one_budget_for_all_images(sizes_hw, name, share):
    own = [uhd.plan(size_hw, name) for size_hw in sizes_hw]
    budget = max(int(share * sum(plan.num_tokens for plan in own)), 1)
    try:
        found = plan_images(sizes_hw, name, max_tokens=budget)
    except ValueError as problem:
        least = int(re.search(r"cost at least (\d+) tokens", str(problem))[1])
        assert least > budget
        assert sum(plan.num_tokens for plan in plan_images(sizes_hw, name, max_tokens=least)) == least
        return
    total = sum(plan.num_tokens for plan in found)
    assert total <= budget
    assert found == plan_images(sizes_hw, name, max_tokens=budget)
    assert [plan.image_hw for plan in found] == sizes_hw
    assert all(a.num_tokens <= b.num_tokens for a, b in zip(found, own, strict=True))
    if budget >= sum(plan.num_tokens for plan in own):
        assert list(found) == own
    else:  # more budget never gives any image less
        more = plan_images(sizes_hw, name, max_tokens=budget + budget // 3)
        assert all(a.num_tokens <= b.num_tokens for a, b in zip(found, more, strict=True))
    for a, b in zip(found, own, strict=True):
        if a != b:  # reduced to fewer slices, and nothing else about it
            assert sum(v.kind == "slice" for v in a.views) < sum(v.kind == "slice" for v in b.views)
    if len(found) == 1 and name in PRESETS:
        assert found[0] == uhd.plan(sizes_hw[0], name, max_tokens=budget)


def test_the_costliest_shrinks_first_and_of_equals_the_last():
    page, strip = (1344, 1344), (336, 700)
    own = [uhd.plan(size_hw).num_tokens for size_hw in (page, page, strip)]
    assert own[0] > own[2]
    found = [p.num_tokens for p in plan_images([page, page, strip], max_tokens=sum(own) - 1)]
    assert found[0] == own[0]
    assert found[1] < own[1]
    assert found[2] == own[2]
    video = plan_video(page, 3, frames="rule", max_tokens=3 * own[0] - 1)
    assert [p.num_tokens for p in video.plans] == [own[0], own[0], found[1]]


def plan_least(size_hw, name):
    """What an image costs at the least, as its refusal says."""
    with pytest.raises(ValueError, match="cost at least") as told:
        plan_images([size_hw], name, max_tokens=1)
    return int(re.search(r"at least (\d+) tokens", str(told.value))[1])


@pytest.mark.parametrize("name", BUDGETED)
def test_every_step_of_an_image_costs_less(name):
    for size_hw in ((2304, 2304), (700, 2900)):
        steps = [uhd.plan(size_hw, name).num_tokens]
        least = plan_least(size_hw, name)
        while steps[-1] > least:
            steps.append(plan_images([size_hw], name, max_tokens=steps[-1] - 1)[0].num_tokens)
        assert steps == sorted(set(steps), reverse=True)
        assert steps[-1] == least
        assert len(steps) > 1


def test_the_budget_of_one_image_is_that_of_its_plan():
    page = (889, 2458)  # six slices; five under a cap of six
    own = uhd.plan(page)
    assert (own.grid, uhd.plan(page, max_tokens=own.num_tokens - 1).grid) == ((2, 3), (1, 5))
    for budget in range(64, own.num_tokens + 1, 13):
        assert plan_images([page], max_tokens=budget) == (uhd.plan(page, max_tokens=budget),)


def test_a_budget_counts_what_the_encoder_counts():
    encoder = tiny_encoder(perceiver(), "internvl", schema="llava-uhd")
    own = sum(image.plan.num_tokens for image in encoder(IMAGES))
    with torch.no_grad():
        images = encoder(IMAGES, max_tokens=own // 2)
    assert sum(image.layout.num_tokens for image in images) <= own // 2
    assert all(image.layout.num_tokens == image.plan.num_tokens for image in images)
    function = tiny_encoder(slicing=whole_and_middle, packer=FeaturePacker(24))
    reduced = function(IMAGES, max_tokens=80)
    assert [len(image.tokens) for image in reduced] == [31, 31, 16]


def test_video_files_round_trip(tmp_path):
    encoder = tiny_encoder(slicing="llava-onevision")
    with torch.no_grad():
        video = encoder.encode_videos([[noise(40, 60, seed) for seed in range(2)]])[0]
        image = encoder(IMAGES[:1])[0]
    save_tokens(tmp_path / "t.safetensors", [image, video], schema=encoder.schema)
    one, two = load_tokens(tmp_path / "t.safetensors")
    assert isinstance(two, EncodedVideo)
    assert_same_images([image, video], [one, two])


def test_the_command_encodes_by_any_strategy(tmp_path, capsys):
    paths = []
    for seed in range(2):
        paths.append(str(tmp_path / f"{seed}.png"))
        Image.fromarray(noise(60, 90, seed)).save(paths[-1])
    out = tmp_path / "t.safetensors"
    assert main(["encode", paths[0], "-o", str(out), "--strategy", "llava_next"]) == 0
    assert len(load_tokens(out)[0].tokens) == uhd.plan((60, 90), "llava-next").num_tokens
    assert main(["encode", *paths, "-o", str(out), "--video", "--strategy", "llava-onevision"]) == 0
    assert len(load_tokens(out)[0].tokens) == 2 * 196 + 1
    assert "393 tokens in all" in capsys.readouterr().out
    tiny_encoder().save_pretrained(tmp_path / "encoder")
    assert main(["encode", *paths, "-o", str(out), "--encoder", str(tmp_path / "encoder")]) == 0
    assert [item.plan.strategy for item in load_tokens(out)] == ["llava-next-anyres-336"] * 2
    assert (
        main(["encode", paths[0], "-o", str(out), "--encoder", str(tmp_path / "encoder"), "--strategy", "phi4"]) == 1
    )
    assert "a compressor that gives as many" in capsys.readouterr().err  # its views fit, its counts do not
