"""Our models in vLLM: what its processor makes of a prompt beside ours, and its answers beside ``generate``'s."""

import json
import os
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

import uhd
from tests.hf.tiny import attach, attached, encoder
from tests.tiny import picture
from uhd.hf.plans import read_plans
from uhd.nano.task import scene

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm", exc_type=ImportError)
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.cache import MultiModalProcessorOnlyCache

    from uhd.serving.vllm import register
    from uhd.serving.vllm_inputs import costliest_hw

    register()

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ("nano", "llava-next", "llava-onevision", "internvl", "qwen2-vl", "openai-high-detail", "smolvlm")
RAW = {"do_rescale": False, "do_normalize": False}


PICTURES = [picture(60, 130, 0), picture(200, 50, 1), picture(56, 56, 2)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model of a strategy and its folder, saved once."""
    made = {}

    def of(name):
        if name not in made:
            model = uhd.load_nano() if name == "nano" else attached(name)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = model, str(folder)
        return made[name]

    return of


def engine_s(folder, **settings):
    """vLLM's processor of a folder, and the cache that it keeps items in."""
    config = ModelConfig(model=folder, tokenizer=folder, dtype="float32", enforce_eager=True, **settings)
    return MULTIMODAL_REGISTRY.create_processor(config), MultiModalProcessorOnlyCache(config)


def processed(processor, text, cache=None, kwargs=None, **media):
    items = processor.info.parse_mm_data({name: given for name, given in media.items() if given})
    return processor(text, mm_items=items, hf_processor_mm_kwargs=kwargs or {}, cache=cache)


def fields(found, kind):
    """Of each item, its tensors."""
    return [{name: elem.data for name, elem in item.items()} for item in found["mm_kwargs"].get(kind, [])]


def ours(batch, kind):
    """The same of a batch of our processor."""
    plans = read_plans(batch[f"{kind}_plans"])
    rows, views = {"image": ("pixel_values", "grids"), "video": ("pixel_values_videos", "video_grids")}[kind]
    frames = [getattr(plan, "plans", (plan,)) for plan in plans]
    cut = {
        rows: batch[rows].split([plan.num_patches for plan in plans]),
        views: batch[views].split([sum(len(frame.views) for frame in some) for some in frames]),
    }
    own = {name: batch[name] for name in ("num_patches", "image_sizes") if kind == "image"}
    texts = [row[row != 0] for row in batch[f"{kind}_plans"]]
    return [
        {**{name: part[place] for name, part in {**cut, **own}.items()}, f"{kind}_plans": texts[place]}
        for place in range(len(plans))
    ]


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("name", NAMES)
def test_prompts_and_tensors_are_those_of_our_processor(saved, name):
    model, folder = saved(name)
    processor, cache = engine_s(folder)
    for shown in ([], PICTURES[:1], PICTURES[1:], PICTURES, [PICTURES[2], PICTURES[0]]):
        text = "a" + "<image>b" * len(shown) + "?"
        batch = model.processor(text=text, images=[shown] if shown else None, **RAW)
        for kept in (None, cache, cache):  # what an earlier prompt left there, and then all of it
            found = processed(processor, text, kept, image=shown)
            assert found["prompt_token_ids"] == batch["input_ids"][0].tolist()
            if shown:
                assert_same(fields(found, "image"), ours(batch, "image"))
                places = found["mm_placeholders"]["image"]
                plans = read_plans(batch["image_plans"])
                assert [place.length for place in places] == [plan.num_tokens for plan in plans]


@pytest.mark.parametrize("name", ["nano", "llava-onevision", "internvl"])
def test_videos_too(saved, name):
    model, folder = saved(name)
    processor, cache = engine_s(folder)
    clip = np.stack([np.asarray(picture(60, 130, seed)) for seed in range(3)])
    text = "a<video>b<image>?"
    batch = model.processor(text=text, images=PICTURES[:1], videos=[clip], **RAW)
    for kept in (None, cache, cache):
        found = processed(processor, text, kept, image=PICTURES[:1], video=[clip])
        assert found["prompt_token_ids"] == batch["input_ids"][0].tolist()
        assert_same(fields(found, "video"), ours(batch, "video"))


def test_keywords_of_a_request(saved):
    model, folder = saved("nano")
    processor, cache = engine_s(folder)
    for slices in (None, 1, 2):
        kwargs = {} if slices is None else {"max_slices": slices}
        batch = model.processor(text="<image>", images=PICTURES[:1], **RAW, **kwargs)
        found = processed(processor, "<image>", cache, kwargs, image=PICTURES[:1])
        assert found["prompt_token_ids"] == batch["input_ids"][0].tolist()
        assert_same(fields(found, "image"), ours(batch, "image"))


def test_encoded_images_stand_as_they_were_encoded(saved, tmp_path):
    model, folder = saved("nano")
    processor, _ = engine_s(folder, enable_mm_embeds=True)
    uhd.save_tokens(tmp_path / "a.safetensors", model.visual(PICTURES[:2]), schema=model.visual.schema)
    encoded = uhd.load_tokens(tmp_path / "a.safetensors")
    found = processed(processor, "<image>x<image>", image=encoded)
    batch = model.processor(text="<image>x<image>", images=[encoded])
    assert found["prompt_token_ids"] == batch["input_ids"][0].tolist()
    parts = [item["image_tokens"] for item in fields(found, "image")]
    assert torch.equal(torch.cat(parts), batch["image_tokens"])
    assert len(parts[0]) == len(encoded[0].tokens)
    with pytest.raises(ValueError, match="without their plans cannot be laid out"):
        processed(processor, "<image>", image=[encoded[0].tokens])
    with pytest.raises(ValueError, match="encode all of them, or none"):
        processed(processor, "<image><image>", image=[encoded[0], PICTURES[0]])


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_kept_for_the_costliest_image(saved, name):
    model, folder = saved(name)
    processor, _ = engine_s(folder)
    most = processor.info.get_mm_max_tokens_per_item(100_000, {"image": 1, "video": 1})
    rng = np.random.default_rng(0)
    sizes = [(int(h), int(w)) for h, w in rng.integers(8, 500, (300, 2))]
    assert most["image"] >= max(model.processor.image_processor.plan(size).num_tokens for size in sizes)
    dummy = processor.get_dummy_mm_inputs({"image": 2, "video": 1})["mm_placeholders"]
    assert [place.length for place in dummy["image"]] == [most["image"]] * 2
    assert len(dummy["video"]) == 1
    assert costliest_hw(model.visual.slicing) == processor.info.costliest(512)[0]


def test_what_vllm_cannot_do_is_refused_by_name(saved, tmp_path):
    _, folder = saved("nano")
    processor, _ = engine_s(folder)
    for kwargs in ({"max_tokens": 60}, {"multi_image": True}, {"images_kwargs": {"max_tokens": 60}}):
        with pytest.raises(ValueError, match="plans all images of a prompt together"):
            processed(processor, "<image>", None, kwargs, image=PICTURES[:1])
    bounded = uhd.load_nano()
    bounded.processor.image_processor.max_tokens = 60
    numbered = attach(encoder(schema="minicpm-v-2.6"))
    for name, model, words in (
        ("bounded", bounded, "max_tokens=60 plans all images"),
        ("numbered", numbered, "numbers the images of a prompt"),
        ("hooked", attach(encoder(), mode="hook"), "injection_mode 'hook'"),
    ):
        model.save_pretrained(tmp_path / name)
        with pytest.raises(Exception, match=words):
            processed(engine_s(str(tmp_path / name))[0], "<image>", image=PICTURES[:1])


def answers(folder, prompts, tmp_path, length):
    (tmp_path / "prompts").write_bytes(pickle.dumps(prompts))
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.serving.vllm_answers", folder, str(tmp_path / "prompts"), str(length)]
    out = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})
    assert out.returncode == 0, out.stderr[-4000:]
    return json.loads(next(line for line in out.stdout.splitlines() if line.startswith("ANSWERS"))[8:])


def generated(model, text, length, **media):
    batch = model.processor(text=text, **media)
    ids = model.generate(**batch, do_sample=False, max_new_tokens=length)[0, batch["input_ids"].shape[1] :].tolist()
    return ids


@pytest.mark.slow
def test_the_nano_answers_as_generate_does(saved, tmp_path):
    model, folder = saved("nano")
    drawn = [scene(4_000_000, index).image for index in range(100)]
    clip = np.stack([np.asarray(drawn[0].convert("RGB"))] * 3)
    asked = [("<begin><image>all?", {"image": [one]}) for one in drawn]
    asked += [("<begin><image><image>all?", {"image": drawn[:2]}), ("<begin>all?", {})]
    asked += [("<begin><video>all?", {"video": [clip]})]
    wanted = [
        generated(model, text, 60, **{f"{kind}s": given for kind, given in media.items()}) for text, media in asked
    ]
    asked += [("<begin><image>all?", {"image": [one]}) for one in model.visual(drawn[:3])]
    wanted += wanted[:3]
    prompts = [{"prompt": text, "multi_modal_data": media} for text, media in asked]
    assert answers(folder, prompts, tmp_path, 60) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava-next", "llava-onevision", "internvl"])
def test_strategies_with_a_packing_answer_as_generate_does(name, tmp_path):
    model = attached(name, head_dim=32)
    model.save_pretrained(tmp_path / "folder")
    asked = [("<image>x", PICTURES[:1]), ("a<image>b<image>", PICTURES[1:]), ("hello", None)]
    wanted = [generated(model, text, 8, images=[shown] if shown else None) for text, shown in asked]
    prompts = [{"prompt": text, "multi_modal_data": {"image": shown} if shown else {}} for text, shown in asked]
    assert answers(str(tmp_path / "folder"), prompts, tmp_path, 8) == wanted
