"""Every slicing strategy behind the transformers face: one argument on the encoder, the same counts everywhere."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText, AutoProcessor

import uhd
from tests.hf.tiny import (
    COMPRESSORS,
    IMAGES,
    TEXTS,
    WIDTH,
    attach,
    attached,
    encoder,
    language_model,
    model,
    packed_encoder,
    shared,
    targets,
)
from tests.test_encoder_strategies import whole_and_middle
from tests.tiny import noise, silent
from uhd.hf import UHDConfig, UHDForConditionalGeneration, UHDImageProcessorPil, UHDProcessor, UHDVideoProcessor
from uhd.hf.plans import read_plans, write_plans
from uhd.merge import assemble
from uhd.resampler import FeaturePacker, MLPProjector, PerceiverConfig, PerceiverResampler, PixelShuffleProjector
from uhd.schema.counted import own_function
from uhd.slicing import find, plan_images, plan_video
from uhd.slicing.sample import plan_sample
from uhd.slicing.strategies import STRATEGIES

GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
LEARNED = ("llava-next", "llava-onevision", "deepseek-vl2")


def encoded(found, images, **kwargs):
    """What the model must merge: the encoder's tokens at the model's scale."""
    with torch.no_grad():
        return [item.tokens * found.config.visual_scale for item in found.visual(images, **kwargs)]


@pytest.mark.parametrize("name", COMPRESSORS)
def test_what_is_merged_is_what_the_encoder_gives(name):
    found = shared(name)
    batch = found.processor(text=TEXTS, images=IMAGES)
    with torch.no_grad():
        out = found(**batch)
    want = encoded(found, IMAGES)
    assert len(out.image_hidden_states) == 3
    for got, tokens in zip(out.image_hidden_states, want, strict=True):
        torch.testing.assert_close(got, tokens, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(out.logits).all()
    counts = [len(tokens) for tokens in want]
    positions = (batch["input_ids"] == found.config.image_token_id).sum(1).tolist()
    assert positions == [counts[0], 0, counts[1] + counts[2]]
    sizes = [image.shape[:2] for image in IMAGES]
    assert found.num_image_tokens(sizes) == counts
    told = found.processor._get_num_multimodal_tokens(image_sizes=sizes)
    assert told["num_image_tokens"] == counts
    assert sum(told["num_image_patches"]) == len(batch["pixel_values"])
    assert read_plans(batch["image_plans"]) == tuple(found.visual.plan(size) for size in sizes)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_gradients_reach_the_projector_and_the_learned_embeddings(name):
    found = attached(name).train()
    batch = found.processor(text=TEXTS, images=IMAGES)
    found(**batch, labels=targets(found, batch)).loss.backward()
    assert silent(found.visual) == []
    assert (found.visual.packer is not None) == (name in LEARNED)


@pytest.mark.parametrize("name", ["llava-next", "deepseek-vl2", "internvl", "openai-high-detail", "qwen2-vl"])
def test_save_and_load(name, tmp_path):
    found = attached(name)
    found.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is UHDProcessor
    assert type(processor.video_processor) is UHDVideoProcessor
    assert again.visual.slicing == again.config.slicing == found.visual.slicing
    assert saved["slicing_config"] == json.loads(json.dumps(found.visual.slicing.to_dict()))
    assert set(again.state_dict()) == set(found.state_dict())
    batch, same = processor(text=TEXTS, images=IMAGES), found.processor(text=TEXTS, images=IMAGES)
    assert all(torch.equal(batch[key], same[key]) for key in same)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, found(**same).logits)
    video = again.processor(text="<video>", videos=[IMAGES[:1] * 2])
    assert torch.equal(again.generate(**video, **GREEDY), found.generate(**video, **GREEDY))


def test_loading_makes_learned_embeddings_that_are_missing(tmp_path):
    """As transformers does with any weight that a checkpoint lacks."""
    found = attached("llava-next")
    state = {key: value for key, value in found.state_dict().items() if "packer" not in key}
    found.save_pretrained(tmp_path, state_dict=state)
    again = UHDForConditionalGeneration.from_pretrained(tmp_path)
    newline = again.visual.packer.newline
    assert 0.3 < newline.norm() < 3
    assert not torch.equal(newline, found.visual.packer.newline)


def test_embeddings_that_the_strategy_does_not_use_are_kept(tmp_path):
    """So that a strategy can be swapped and swapped back."""
    found = attached(encoder(packer=FeaturePacker(WIDTH, separator=True)))
    found.save_pretrained(tmp_path)
    again = UHDForConditionalGeneration.from_pretrained(tmp_path)
    for kind in ("newline", "separator"):
        assert torch.equal(getattr(again.visual.packer, kind), getattr(found.visual.packer, kind))


def test_swapping_the_strategy_is_one_argument_on_the_encoder(tmp_path):
    """From the adaptive planner to others and back, with the same weights."""
    encoder().save_pretrained(tmp_path)
    lengths = {}
    for name in (None, "internvl", "llava-1.5", "smolvlm"):
        rule = None if name is None else packed_encoder(name).slicing
        eyes = uhd.VisualEncoder.from_pretrained(tmp_path, slicing=rule)
        found = attached(eyes)
        batch = found.processor(text="<image>", images=IMAGES[0])
        lengths[name] = found(**batch).logits.shape[1]
        assert lengths[name] == eyes.plan((100, 60)).num_tokens
    assert len(set(lengths.values())) > 2


def test_a_hook_and_a_schema_around_views():
    eyes = packed_encoder("internvl", PixelShuffleProjector(32, WIDTH, factor=2), schema="llava-uhd")
    found = attached(eyes, "gemma4_text")
    assert found.config.injection_mode == "hook"
    batch = found.processor(text=TEXTS, images=IMAGES)
    with torch.no_grad():
        out, items = found(**batch), found.visual(IMAGES)
    separators = found._separators()
    for got, item in zip(out.image_hidden_states, items, strict=True):
        assert item.layout.symbols[1] in (",", "\n")
        want = assemble(item.tokens * found.config.visual_scale, item.layout, separators)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert found.generate(**batch, **GREEDY).shape[1] == batch["input_ids"].shape[1] + 4


class TestOwnFunction:
    def test_it_runs_and_is_not_saved(self, tmp_path):
        found = attached(packed_encoder(whole_and_middle, packer=FeaturePacker(WIDTH)), unsaved=True)
        batch = found.processor(text=TEXTS, images=IMAGES)
        with torch.no_grad():
            got = found(**batch).image_hidden_states
        for one, tokens in zip(got, encoded(found, IMAGES), strict=True):
            torch.testing.assert_close(one, tokens, rtol=1e-4, atol=1e-5)
        assert found.generate(**batch, **GREEDY).shape[0] == 3
        message = "a function of your own, 'whole_and_middle', which cannot be saved"
        for save in (found, found.processor, found.processor.image_processor, found.processor.video_processor):
            with pytest.raises(ValueError, match=message):
                save.save_pretrained(tmp_path / "refused")
        assert "whole_and_middle" in repr(found.processor)
        assert own_function(found.config.slicing_config) == "whole_and_middle"
        with pytest.raises(ValueError, match="caller's own, 'whole_and_middle'"):
            found.config.slicing  # noqa: B018

    def test_counted_by_a_compressor(self, tmp_path):
        perceiver = PerceiverResampler(PerceiverConfig(width=WIDTH, vision_width=32, num_heads=2, num_latents=4))
        eyes = packed_encoder(whole_and_middle, perceiver, schema="llava-uhd")
        with pytest.raises(ValueError, match="which cannot be saved: give it a name with uhd.register_strategy"):
            attached(eyes)
        found = attached(eyes, unsaved=True)
        batch = found.processor(text="<image>", images=IMAGES[0])
        assert batch["input_ids"].shape[1] == 4 + 1 + 4
        assert found(**batch).logits.shape[1] == 9
        with pytest.raises(ValueError, match="which cannot be saved"):
            found.save_pretrained(tmp_path)


class TestBudget:
    def test_images_of_a_sample_share_it(self):
        found = shared("llava-next")
        sizes = [image.shape[:2] for image in IMAGES[1:]]
        own = plan_images(sizes, found.visual.slicing)
        budget = sum(item.num_tokens for item in own) - 1
        batch = found.processor(text=TEXTS, images=IMAGES, max_tokens=budget)
        plans = read_plans(batch["image_plans"])
        assert plans[1:] == plan_images(sizes, found.visual.slicing, max_tokens=budget) != own
        assert plans[0] == found.visual.plan((100, 60))  # another sample's
        with torch.no_grad():
            states = found(**batch).image_hidden_states[1:]
        for got, want in zip(states, encoded(found, IMAGES[1:], max_tokens=budget), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="cost at least 32 tokens under .*, max_tokens is 20: raise it to 32"):
            found.processor(text="<image><image>", images=IMAGES[1:], max_tokens=20)

    def test_images_and_videos_share_it(self):
        found = shared("llava-onevision")
        frames = [noise(60, 80, seed) for seed in range(3)]
        ask = {"text": "<video>and<image>", "images": IMAGES[:1], "videos": [frames]}
        whole = found.visual.plan((100, 60)).num_tokens
        assert whole > 40
        free = found.processor(**ask)
        tight = found.processor(**ask, max_tokens=13 + whole - 1)
        images, videos = plan_sample([(100, 60)], [((60, 80), 3)], found.visual.slicing, max_tokens=13 + whole - 1)
        assert read_plans(tight["image_plans"]) == images != read_plans(free["image_plans"])
        assert read_plans(tight["video_plans"]) == videos == read_plans(free["video_plans"])
        assert videos[0].num_tokens == 13
        assert found(**tight).logits.shape[1] == tight["input_ids"].shape[1]
        message = "1 image and 1 video of 3 frames cost at least 29 tokens under .*, max_tokens is 20: raise it to 29"
        with pytest.raises(ValueError, match=message):
            found.processor(**ask, max_tokens=20)
        with pytest.raises(ValueError, match=re.escape("max_tokens is [20, 30] for images and videos")):
            found.processor(**ask, images_kwargs={"max_tokens": 20}, videos_kwargs={"max_tokens": 30})

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(20, 900), st.integers(20, 900)), max_size=3),
        st.lists(st.tuples(st.tuples(st.integers(20, 900), st.integers(20, 900)), st.integers(1, 3)), max_size=2),
        st.sampled_from(["llava-uhd-safe", "internvl", "llava-onevision", "llava-next", "deepseek-vl2"]),
        st.sampled_from(["video", "single", "rule"]),
        st.floats(0.1, 1.2),
    )
    def test_a_sample_costs_no_more_than_it(self, images, videos, name, frames, share):
        plans, clips = plan_sample(images, videos, find(name), frames=frames)
        assert plans == plan_images(images, name)
        assert clips == tuple(plan_video(size, number, name, frames=frames) for size, number in videos)
        full = sum(item.num_tokens for item in (*plans, *clips))
        budget = max(int(share * full), 1)
        try:
            less, shorter = plan_sample(images, videos, find(name), frames=frames, max_tokens=budget)
        except ValueError as problem:
            least = int(re.search(r"cost at least (\d+) tokens", str(problem))[1])
            assert least > budget
            plan_sample(images, videos, find(name), frames=frames, max_tokens=least)
            return
        assert sum(item.num_tokens for item in (*less, *shorter)) <= budget
        assert [item.num_frames for item in shorter] == [number for _, number in videos]
        if budget >= full:
            assert (less, shorter) == (plans, clips)


def test_several_images_of_a_sample_as_the_strategy_does():
    found = attached("llava-onevision")
    batch = found.processor(text=TEXTS, images=IMAGES, multi_image=True)
    with torch.no_grad():
        states = found(**batch).image_hidden_states
    assert [len(state) for state in states] == [found.visual.plan((100, 60)).num_tokens, 17, 17]
    for got, want in zip(states[1:], encoded(found, IMAGES[1:], multi_image=True), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    found.processor.image_processor.multi_image = True
    same = found.processor(text=TEXTS, images=IMAGES)
    assert all(torch.equal(batch[key], same[key]) for key in batch)
    direct = found.processor.image_processor([IMAGES[:1], IMAGES[1:]])
    assert torch.equal(direct["image_plans"], batch["image_plans"])
    flat = found.processor.image_processor(IMAGES)  # every image by itself
    assert flat["num_image_tokens"].tolist() == found.num_image_tokens([image.shape[:2] for image in IMAGES])


def test_fewer_slices_and_none():
    found = shared("internvl")
    full = found.processor(text="<image>", images=IMAGES[1])
    fewer = found.processor(text="<image>", images=IMAGES[1], max_slices=2)
    uncut = found.processor(text="<image>", images=IMAGES[1], crop_to_patches=False)
    views = [int(batch["num_patches"][0]) for batch in (full, fewer, uncut)]
    assert views[0] > views[1] == 3 > views[2] == 1
    for batch in (fewer, uncut):
        assert found(**batch).logits.shape[1] == batch["input_ids"].shape[1]
    with pytest.raises(ValueError, match="max_slices must be a positive int, got 0; 1 never cuts"):
        found.processor(text="<image>", images=IMAGES[1], max_slices=0)
    with pytest.raises(ValueError, match="'llava15-pad-336' have no number of slices that max_slices=2"):
        shared("llava-1.5").processor(text="<image>", images=IMAGES[1], max_slices=2)


def test_encoded_images_of_a_strategy():
    found = shared("llava-next")
    with torch.no_grad():
        items = found.visual(IMAGES)
        batch = found.processor(text=TEXTS, images=items)
        pixels = found(**found.processor(text=TEXTS, images=IMAGES)).logits
        torch.testing.assert_close(found(**batch).logits, pixels, rtol=1e-4, atol=1e-4)
        plain = {name: batch[name] for name in ("input_ids", "attention_mask")}
        torch.testing.assert_close(found(**plain, image_tokens=items).logits, pixels, rtol=1e-4, atol=1e-4)
    short = {**batch, "image_tokens": batch["image_tokens"][:-1]}
    with pytest.raises(ValueError, match=r"got \d+ image_tokens, their plans count"):
        found(**short)
    with pytest.raises(ValueError, match="encoded image 0 is laid out by schema 'llava-uhd', the model by 'plain'"):
        found(**plain, image_tokens=model("llama").visual(IMAGES))


class TestDisagreement:
    def test_a_prompt_of_another_strategy(self):
        found, other = shared("llava-next"), shared("llava-1.5")
        mine, theirs = (each.processor(text="<image>", images=IMAGES[0]) for each in (found, other))
        ids = {name: theirs[name] for name in ("input_ids", "attention_mask")}
        message = rf"sample 0 has 16 image positions, its 1 images take {mine['input_ids'].shape[1]}"
        with pytest.raises(ValueError, match=message):
            found(**{**mine, **ids})

    def test_a_batch_that_does_not_fit_its_plans(self):
        found = shared("llava-next")
        batch = found.processor(text="<image>", images=IMAGES[0])
        with pytest.raises(ValueError, match="num_patches says"):
            found(**{**batch, "num_patches": batch["num_patches"] + 1})
        with pytest.raises(ValueError, match="rows and columns differ"):
            found(**{**batch, "grids": batch["grids"] + 1})
        with pytest.raises(ValueError, match=r"plans have \d+ patches, got \d+"):
            found(**{**batch, "pixel_values": batch["pixel_values"][:-1]})
        with pytest.raises(ValueError, match="a row of the plans is not one"):
            found(**{**batch, "image_plans": batch["image_plans"][:, :-9]})
        with pytest.raises(ValueError, match=r"plans are \(I, L\) uint8"):
            found(**{**batch, "image_plans": batch["image_plans"].float()})
        clip = write_plans([found.visual.plan_video((60, 80), 2)])
        with pytest.raises(ValueError, match="image_plans hold the plan of a video"):
            found(**{**batch, "image_plans": torch.from_numpy(clip)})

    def test_a_batch_without_its_plans_is_planned_again(self):
        found = shared("llava-next")
        batch = dict(found.processor(text=TEXTS, images=IMAGES))
        want = found(**batch).logits
        plans = batch.pop("image_plans")
        assert torch.equal(found(**batch).logits, want)
        del batch["image_sizes"]
        with pytest.raises(ValueError, match="images need image_plans"):
            found(**batch)
        tight = dict(found.processor(text="<image>", images=IMAGES[1], max_tokens=20))
        del tight["image_plans"]
        with pytest.raises(ValueError, match="their processor plans otherwise than this model"):
            found(**tight)
        assert len(plans) == 3

    def test_a_packing_whose_embeddings_the_model_has_not(self):
        found = shared("llava-1.5")
        rule = packed_encoder("llava-next").slicing.to_dict()
        batch = found.processor(text="<image>", images=IMAGES[0], slicing=rule)
        with pytest.raises(ValueError, match="needs newline=, a learned"):
            found(**batch)

    def test_processors_of_two_slicings(self):
        processor = shared("llava-next").processor
        other = UHDVideoProcessor.of(shared("internvl").processor.image_processor)
        with pytest.raises(ValueError, match="image and video processor have other slicings"):
            UHDProcessor(processor.image_processor, processor.tokenizer, other)


def test_ranks_without_images_give_learned_embeddings_a_gradient():
    """Also where images are there and their plans have no newline."""
    found = attached("llava-next").train()
    found.encode_without_images = True
    for batch in (
        found.processor(text="hello"),
        found.processor(text="<video>", videos=[[IMAGES[0]]]),  # the overview alone, which has no newline
    ):
        found.zero_grad()
        found(**batch, labels=targets(found, batch)).loss.backward()
        assert [name for name, p in found.visual.named_parameters() if p.grad is None] == []
        assert not found.visual.packer.newline.grad.any()


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(sorted(STRATEGIES)),
    st.lists(st.tuples(st.integers(40, 1500), st.integers(40, 1500)), min_size=1, max_size=3),
    st.integers(1, 3),
)
def test_plans_as_tensors_come_back(name, sizes, num_frames):
    plans = []
    for size in sizes:
        try:
            plans += [uhd.plan(size, name), plan_video(size, num_frames, name)]
        except ValueError:  # a size that the rule refuses, or a rule without an overview
            continue
    rows = write_plans(plans)
    assert rows.dtype == np.uint8
    assert read_plans(torch.from_numpy(rows)) == tuple(plans)
    assert read_plans(write_plans(plans[::-1])) == tuple(plans[::-1])


def test_equal_frames_are_written_once():
    short, long = (write_plans([plan_video((480, 640), number, "llava-onevision")]).shape[1] for number in (2, 500))
    assert long - short == 2 * 498


def test_the_config_reads_any_strategy():
    rule = packed_encoder("llava-next").slicing
    config = UHDConfig(slicing_config=rule.to_dict(), text_config=language_model("llama").config)
    assert config.slicing == rule
    for name, position in (("uhd-plus", "direct"), ("llava-uhd", "interpolated")):
        config = UHDConfig(slicing_config=find(name).to_dict(), text_config=language_model("llama").config)
        assert config.resampler_config.settings["fitted_position"] == position  # of a resampler to be trained
    with pytest.raises(ValueError, match="unknown rule 'never'"):
        UHDConfig(slicing_config={"rule": "never"}, text_config=language_model("llama").config)


def test_the_image_processor_takes_names_and_settings():
    for given_ in ("llava-next", uhd.strategy("llava-next")):
        images = UHDImageProcessorPil(slicing=given_)
        assert images.plan((500, 300)) == uhd.plan((500, 300), "llava-next")
        assert images.plan((500, 300), slicing="internvl") == uhd.plan((500, 300), "internvl")
    with pytest.raises(ValueError, match="no strategy named 'llava-nest': did you mean 'llava-next'"):
        UHDImageProcessorPil(slicing="llava-nest").plan((500, 300))


def test_a_slicing_for_another_backbone_is_refused():
    """As by the encoder: views of 448 px would be seen by a model of 56 px, without a word."""
    processor = shared("internvl").processor
    for name, got in (("internvl", "image_size=448, patch_size=14"), ("qwen3-vl", "image_size=None, patch_size=16")):
        with pytest.raises(ValueError, match=rf"{got}; this processor's model has image_size=56, patch_size=14"):
            processor(text="<image>", images=IMAGES[0], slicing=name)
        with pytest.raises(ValueError, match=r"\.for_vision\(image_size=56, patch_size=14\)"):
            processor(text="<video>", videos=[IMAGES[:1]], slicing=name)
    with pytest.raises(ValueError, match=r"uhd\.strategy\('internvl\+max_tiles=2'\)"):  # settings are not lost
        processor(text="<image>", images=IMAGES[0], slicing="internvl+max_tiles=2")
    fitted = find("llava-1.5").for_vision(image_size=56, patch_size=14)
    assert processor(text="<image>", images=IMAGES[0], slicing=fitted)["num_patches"].tolist() == [1]
    assert processor(text="<image>", images=IMAGES[0], slicing="qwen2-vl")["num_patches"].tolist() == [1]


def test_an_array_of_images_is_its_images():
    processor = shared("internvl").processor
    images = np.stack([noise(40, 50, seed) for seed in range(2)])
    want = processor(text=["<image>", "a<image>"], images=list(images))
    for array in (images, torch.from_numpy(images).permute(0, 3, 1, 2)):
        got = processor(text=["<image>", "a<image>"], images=array)
        assert all(torch.equal(got[key], want[key]) for key in want)


def test_an_encoder_that_is_narrower_is_refused():
    with pytest.raises(ValueError, match="gives tokens of width 24, the language model embeds in 32"):
        attach(packed_encoder("llava-next", MLPProjector(32, 24)))
