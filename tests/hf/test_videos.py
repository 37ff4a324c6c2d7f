"""Videos as inputs of the processor and the model: forms, order among text and images, counts, budgets, refusals."""

import base64
import io
import pathlib
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoVideoProcessor

import uhd
from tests.hf.test_models import position_ids
from tests.hf.test_processing import TEXT_ONLY_TEMPLATE
from tests.hf.tiny import (
    COMPRESSORS,
    IMAGES,
    WIDTH,
    attach,
    attached,
    encoder,
    language_model,
    model,
    packed_encoder,
    shared,
    targets,
    tokenizer,
)
from tests.tiny import noise, silent
from uhd.hf import UHDProcessor, UHDVideoProcessor
from uhd.hf.plans import read_plans
from uhd.hf.video_processing import arrange_videos
from uhd.merge import assemble

GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
LONG = [noise(60, 100, seed) for seed in range(3)]
SHORT = [noise(90, 50, 7)]
TEXTS = ["a<video>b", "hello", "x<image>y<video>z<video>?<image>"]
VIDEOS = [LONG, SHORT, LONG[:2]]
STILLS = IMAGES[:2]


def fill(found, texts, images, videos):
    """The whole prompt by hand: the encoder's rows at the places of their tokens, one after the other."""
    batch = found.processor(text=texts, images=images, videos=videos)
    with torch.no_grad():
        separators = found._separators()
        scale = found.config.visual_scale
        stills, clips = found.visual(images), found.visual.encode_videos(videos)
        rows = {
            found.config.image_token_id: iter([assemble(i.tokens * scale, i.layout, separators) for i in stills]),
            found.config.video_token_id: iter([assemble(v.tokens * scale, v.layout, separators) for v in clips]),
        }
        tok, embed = found.processor.tokenizer, found.get_input_embeddings()
        samples = []
        for text in texts:
            parts = [
                next(rows[one]) if one in rows else embed(torch.tensor([one]))
                for one in tok.encode(text, add_special_tokens=False)
            ]
            samples.append(torch.cat(parts))
        length = max(map(len, samples))
        pad = embed(torch.tensor([tok.pad_token_id]))
        embeds = torch.stack([torch.cat([pad.expand(length - len(rows_), -1), rows_]) for rows_ in samples])
    return batch, embeds


@pytest.mark.parametrize("name", [*COMPRESSORS, None])
def test_text_images_and_videos_stand_in_the_prompts_order(name):
    """Logits equal to the language model's on embeddings put together one by one."""
    found = model("gemma2") if name is None else shared(name)
    batch, embeds = fill(found, TEXTS, STILLS, VIDEOS)
    assert batch["input_ids"].shape == embeds.shape[:2]
    with torch.no_grad():
        mine = {"attention_mask": batch["attention_mask"], "position_ids": position_ids(batch)}
        want = found.language_model(inputs_embeds=embeds, **mine).logits
        out = found(**batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(out.logits[real], want[real], rtol=1e-3, atol=1e-4)
    assert [len(state) for state in out.video_hidden_states] == [
        found.visual.plan_video(frames[0].shape[:2], len(frames)).num_tokens for frames in VIDEOS
    ]
    assert len(out.image_hidden_states) == 2


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_batch_equals_its_samples_and_generates(name):
    found = shared(name)
    batch = found.processor(text=TEXTS, images=STILLS, videos=VIDEOS)
    together = found.generate(**batch, **GREEDY)
    assert torch.equal(together, found.generate(**batch, **GREEDY, use_cache=False))
    assert torch.equal(together[:, :-4], batch["input_ids"])
    with torch.no_grad():
        logits = found(**batch).logits
    samples = [(None, VIDEOS[:1]), (None, None), (STILLS, VIDEOS[1:])]
    for row, (text, (images, videos)) in enumerate(zip(TEXTS, samples, strict=True)):
        alone = found.processor(text=text, images=images, videos=videos)
        with torch.no_grad():
            own = found(**alone).logits[0]
        torch.testing.assert_close(logits[row, -len(own) :], own, rtol=1e-3, atol=1e-4)
        assert torch.equal(found.generate(**alone, **GREEDY)[0, -4:], together[row, -4:])


@pytest.mark.parametrize("frames", ["video", "single", "rule"])
def test_features_are_the_encoders(frames):
    for found in (shared("llava-onevision"), shared("internvl"), model("llama")):
        batch = found.processor(videos=VIDEOS, frames=frames)
        told = batch.pop("num_video_tokens", None)
        with torch.no_grad():
            got = found.get_video_features(**batch)
            want = found.visual.encode_videos(VIDEOS, frames=frames)
        scale, separators = found.config.visual_scale, found._separators()
        assert told is None
        for state, item in zip(got.pooler_output, want, strict=True):
            rows = assemble(item.tokens * scale, item.layout, separators)
            torch.testing.assert_close(state, rows, rtol=1e-4, atol=1e-5)
        assert got.last_hidden_state.shape == (len(batch["pixel_values_videos"]), found.visual.vision.config.width)


def test_every_form_of_a_video_is_the_same(tmp_path):
    processor = shared("llava-onevision").processor
    array = np.stack(LONG)
    paths = []
    for number, frame in enumerate(LONG):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(frame).save(paths[-1])
    want = processor(text="<video>", videos=[LONG])
    forms = [
        LONG,
        tuple(LONG),
        [Image.fromarray(frame) for frame in LONG],
        [torch.from_numpy(frame) for frame in LONG],
        paths,
        [str(path) for path in paths],
        [path.read_bytes() for path in paths],
        [io.BytesIO(path.read_bytes()) for path in paths],
        [{"bytes": bytearray(path.read_bytes()), "path": None} for path in paths],
        [base64.b64encode(path.read_bytes()).decode() for path in paths],
        array,
        torch.from_numpy(array),
        array.transpose(0, 3, 1, 2),
        array.astype(np.float32) / 255,
    ]
    for form in forms:
        for given in (form, [form], [[form]]):
            got = processor(text="<video>", videos=given)
            assert all(torch.equal(got[key], want[key]) for key in want), type(form)
    both = processor(text=["<video>", "<video>"], videos=np.stack([array, array]))
    assert torch.equal(both["video_plans"], want["video_plans"].repeat(2, 1))


def test_nesting_by_samples():
    processor = shared("llava-onevision").processor
    flat = processor(text=TEXTS, images=STILLS, videos=VIDEOS)
    for videos in (
        [[LONG], [], [SHORT, LONG[:2]]],
        [[np.stack(LONG)], [], [np.stack(SHORT), np.stack(LONG[:2])]],
        [LONG, [], [SHORT, LONG[:2]]],
    ):
        nested = processor(text=TEXTS, images=[[], [], STILLS], videos=videos)
        assert all(torch.equal(flat[key], nested[key]) for key in flat)
    assert arrange_videos([[], []]) == ([], [0, 0])
    assert set(processor(text="hello", videos=[])) == {"input_ids", "attention_mask"}


def test_keys_and_shapes():
    found = shared("llava-onevision")
    batch = found.processor(text=TEXTS, images=STILLS, videos=VIDEOS)
    keys = {"pixel_values_videos", "video_grids", "video_plans"}
    assert keys < set(batch) <= set(found.processor.model_input_names)
    plans = read_plans(batch["video_plans"])
    assert [plan.num_frames for plan in plans] == [3, 1, 2]
    assert batch["pixel_values_videos"].shape == (sum(plan.num_patches for plan in plans), 588)
    assert batch["video_grids"].tolist() == [[4, 4]] * 6
    counts = (batch["input_ids"] == found.config.video_token_id).sum(1).tolist()
    assert counts == [13, 0, 5 + 9]
    told = found.processor._get_num_multimodal_tokens(video_sizes=[(3, 60, 100), (1, 90, 50), (2, 60, 100)])
    assert told["num_video_tokens"] == [13, 5, 9]
    kinds = found.processor(text=TEXTS, images=STILLS, videos=VIDEOS, return_mm_token_type_ids=True)
    marked = torch.as_tensor(kinds["mm_token_type_ids"])
    assert torch.equal(marked == 2, batch["input_ids"] == found.config.video_token_id)
    raw = found.processor(text=TEXTS, images=STILLS, videos=VIDEOS, do_rescale=False, do_normalize=False)
    assert raw["pixel_values_videos"].dtype == torch.uint8
    with torch.no_grad():
        assert torch.equal(found(**raw).logits, found(**batch).logits)


def test_frames_are_chosen_at_equal_distances():
    processor = shared("llava-onevision").processor
    frames = [noise(60, 80, seed) for seed in range(7)]
    want = processor(text="<video>", videos=[frames[0], frames[2], frames[4]])
    for given in (frames, np.stack(frames)):
        got = processor(text="<video>", videos=given, num_frames=3)
        assert all(torch.equal(got[key], want[key]) for key in want)
        assert len(processor(text="<video>", videos=given, num_frames=3, do_sample_frames=False)["video_grids"]) == 7
    with pytest.raises(ValueError, match="video 0 has 7 frames, num_frames is 8: ask for at most 7"):
        processor(text="<video>", videos=frames, num_frames=8)
    with pytest.raises(ValueError, match="fps=2 needs a file, the speed of the frames of video 0 is not known"):
        processor(text="<video>", videos=frames, fps=2)
    with pytest.raises(ValueError, match="give num_frames or fps, got num_frames=2 and fps=1"):
        processor(text="<video>", videos=frames, fps=1, num_frames=2)


def test_a_file_is_decoded_by_transformers(monkeypatch):
    """Decoding itself needs a decoder; what is asked of it and what becomes of its frames is ours."""
    frames = np.stack([noise(60, 80, seed) for seed in range(6)])
    asked = []

    def fetch(self, source, sample_indices_fn):
        asked.append(source)
        metadata = type("Metadata", (), {"total_num_frames": 6, "fps": 3.0})()
        return frames[sample_indices_fn(metadata=metadata)], metadata

    monkeypatch.setattr(UHDVideoProcessor, "fetch_videos", fetch)
    processor = shared("llava-onevision").processor
    for settings, chosen in (({}, [0, 1, 2, 3, 4, 5]), ({"num_frames": 2}, [0, 3]), ({"fps": 1}, [0, 3])):
        got = processor(text=["<video>", "<video>"], videos=["clip.mp4", "https://host/other.webm?x=1"], **settings)
        want = processor(text=["<video>", "<video>"], videos=[frames[chosen], frames[chosen]])
        assert all(torch.equal(got[key], want[key]) for key in want)
    assert asked[:2] == ["clip.mp4", "https://host/other.webm?x=1"]


@pytest.mark.parametrize(
    ("text", "videos", "message"),
    [
        (TEXTS[:1], None, "sample 0 has 1 <video> and 0 videos are left for it"),
        ("none", [LONG], "1 samples have 0 <video> (per sample: [0]) and there are 1 videos"),
        (
            ["<video>", "<video>"],
            [LONG],
            "sample 1 has 1 <video> and 0 videos are left for it; in all 2 <video> and 1",
        ),
        (["<video>", "b"], [[LONG], [SHORT]], "sample 1 has 0 <video> and 1 videos"),
        (["<video>"], [[LONG], [SHORT]], "got 1 texts and lists of videos for 2"),
        ("<video>", [[*LONG, noise(50, 60)]], "video 0 has 4 frames of the sizes [(50, 60), (60, 100)]"),
        (["<video>", "<video>"], [LONG, []], "video 1 has 0 frames"),
        ("<video>", np.zeros((2, 2), np.uint8), "a video is a list of frames, an array"),
        ("<video>", 3, "got int"),
        ("<video>", "photo.png", "got str"),
        ("<video>", [[[[LONG]]]], "videos are nested too deeply, or mixed with frames"),
        ("<video>", [Image.new("RGB", (5, 4)), LONG], "mixed with frames: got Image where a video is expected"),
        ("<video>", [LONG[0], LONG], "nested too deeply, or mixed with frames: got ndarray"),
    ],
)
def test_what_is_refused(text, videos, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        shared("llava-onevision").processor(text=text, videos=videos)


def test_an_encoded_image_is_no_video():
    found = shared("llava-onevision")
    with pytest.raises(ValueError, match="got EncodedImage where a video is expected"):
        found.processor(text="<video>", videos=found.visual(IMAGES[:1]))


def test_settings_that_do_not_apply():
    processor = shared("llava-onevision").processor
    with pytest.raises(ValueError, match="frames must be one of 'video', 'single', 'rule', got 'all'"):
        processor(text="<video>", videos=[LONG], frames="all")
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"num_frames must be at least 1, got {count}"):
            processor(text="<video>", videos=[LONG], num_frames=count)
    with pytest.raises(ValueError, match=r"text must be a string or a list of strings, at least one, got \[\]"):
        processor(text=[])
    with pytest.raises(ValueError, match="return_metadata does not apply"):
        processor(text="<video>", videos=[LONG], return_metadata=True)
    with pytest.raises(ValueError, match="do_resize does not apply"):
        processor.video_processor([LONG], do_resize=True)
    with pytest.raises(ValueError, match="takes text, images and videos, got audio"):
        processor(text="x", audio=[0.0])
    count = 13
    with pytest.raises(ValueError, match=f"sample 0 needs {count} positions for its videos and {count - 1} are left"):
        processor(text="a<video>", videos=[LONG], truncation=True, max_length=count)


def test_a_model_that_disagrees():
    found = shared("llava-onevision")
    batch = found.processor(text="<video>", videos=[LONG])
    with pytest.raises(ValueError, match="sample 0 has 13 video positions and there are 0 videos"):
        found(input_ids=batch["input_ids"])
    other = found.processor(text="<video>", videos=[LONG[:2]])
    with pytest.raises(ValueError, match=r"sample 0 has 13 video positions, its 1 videos take 9 \(\[9\]\)"):
        found(**{**other, "input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]})
    with pytest.raises(ValueError, match="the batch has 1 videos, its samples' video positions"):
        found(**{**batch, "input_ids": batch["input_ids"][:, :0], "attention_mask": batch["attention_mask"][:, :0]})
    for name in ("video_plans", "video_grids"):
        with pytest.raises(ValueError, match=f"videos need {name}: pass everything"):
            found(**{key: value for key, value in batch.items() if key != name})
    with pytest.raises(ValueError, match="the 1 videos' plans have 3 views, there are 2 grids"):
        found(**{**batch, "video_grids": batch["video_grids"][1:]})
    image = found.processor(text="<image>", images=STILLS[0])
    with pytest.raises(ValueError, match="video_plans hold the plan of an image"):
        found(**{**batch, "video_plans": image["image_plans"]})
    with pytest.raises(ValueError, match="ends with a newline, this model's strategy has none"):
        shared("llava-1.5")(**batch)
    with pytest.raises(ValueError, match="pass either input_ids"):
        found(**{key: value for key, value in batch.items() if key != "input_ids"})


def test_labels_and_gradients():
    found = attached("llava-onevision").train()
    batch = found.processor(text=["<video>ab", "<video>c"], videos=[LONG, SHORT], padding_side="right")
    want = found(**batch, labels=targets(found, batch)).loss
    with pytest.warns(UserWarning, match="labels were given at positions of images or videos"):
        got = found(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))
    assert torch.equal(got.loss, want)  # positions of videos are no targets
    got.loss.backward()
    assert silent(found.visual) == []
    assert found.visual.packer.newline.grad.any()


def test_a_hook_takes_videos():
    found = attached("llava-onevision", "gemma4_text")
    assert found.config.injection_mode == "hook"
    batch = found.processor(text=TEXTS, images=STILLS, videos=VIDEOS)
    said = found.generate(**batch, **GREEDY)
    alone = found.processor(text=TEXTS[0], videos=VIDEOS[:1])
    assert torch.equal(found.generate(**alone, **GREEDY)[0, -4:], said[0, -4:])
    moved = found.processor(text=TEXTS[0], videos=[LONG[::-1]])
    assert not torch.allclose(found(**moved).logits, found(**alone).logits, atol=1e-4)


def test_encoded_videos():
    for found in (shared("llava-onevision"), model("llama")):
        with torch.no_grad():
            clips, stills = found.visual.encode_videos(VIDEOS), found.visual(STILLS)
            want = found(**found.processor(text=TEXTS, images=STILLS, videos=VIDEOS)).logits
            batch = found.processor(text=TEXTS, images=stills, videos=clips)
            torch.testing.assert_close(found(**batch).logits, want, rtol=1e-4, atol=1e-4)
            mixed = found.processor(text=TEXTS, images=STILLS, videos=clips)
            torch.testing.assert_close(found(**mixed).logits, want, rtol=1e-4, atol=1e-4)
            plain = {name: batch[name] for name in ("input_ids", "attention_mask")}
            got = found(**plain, image_tokens=stills, video_tokens=clips).logits
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match=r"got \d+ video_tokens, their plans count"):
            found(**{**batch, "video_tokens": batch["video_tokens"][1:]})
        with pytest.raises(ValueError, match="got 1 encoded videos among 3"):
            found.processor(text=TEXTS, images=STILLS, videos=[*clips[:1], *VIDEOS[1:]])


def test_save_and_load(tmp_path):
    found = attached("llava-onevision")
    found.processor.video_processor.frames = "single"
    found.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(processor) is UHDProcessor
    assert (processor.video_token, processor.video_token_id) == ("<video>", found.config.video_token_id)
    videos = AutoVideoProcessor.from_pretrained(tmp_path)
    assert type(videos) is UHDVideoProcessor
    assert videos.frames == "single"
    ask = {"text": TEXTS, "images": STILLS, "videos": VIDEOS}
    batch, want = processor(**ask), found.processor(**ask)
    assert all(torch.equal(batch[key], want[key]) for key in want)
    assert torch.equal(again.generate(**batch, **GREEDY), found.generate(**want, **GREEDY))
    direct = videos(VIDEOS)
    assert all(torch.equal(direct[key], want[key]) for key in ("pixel_values_videos", "video_grids", "video_plans"))


class TestChat:
    def chat(self, *parts):
        return [{"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]}]

    def test_the_plain_template(self):
        processor = shared("llava-onevision").processor
        chat = self.chat({"type": "image", "image": STILLS[0]}, {"type": "video", "video": LONG})
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        assert text == "User: <image>\n<video>\nwhat?\nAssistant:"
        batch = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
        want = processor(text=text, images=STILLS[:1], videos=[LONG])
        assert all(torch.equal(batch[key], want[key]) for key in want)

    @pytest.mark.parametrize(
        "template",
        [
            TEXT_ONLY_TEMPLATE,
            "{% for message in messages %}[{{ message.role }}]{% if message.content is string %}{{ message.content }}"
            "{% else %}{% for part in message.content %}{% if part.type == 'image' %}<image>"
            "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}",
        ],
        ids=["text", "images"],
    )
    def test_templates_that_know_no_videos(self, template):
        found = attach(encoder(), chat_template=template)
        chats = [
            self.chat({"type": "video", "video": LONG}, {"type": "image", "image": STILLS[0]}),
            self.chat({"type": "text", "text": "no"}),
        ]
        texts = found.processor.apply_chat_template(chats)
        assert texts[0] == "[user]<video>\n<image>\nwhat?"
        batch = found.processor.apply_chat_template(chats, tokenize=True, return_dict=True)
        want = found.processor(text=texts, images=[STILLS[:1], []], videos=[[LONG], []])
        assert all(torch.equal(batch[key], want[key]) for key in want)


class TestTokens:
    def test_a_tokenizer_without_a_video_token(self):
        processor = shared("internvl").processor
        tok = type(tokenizer())(tokenizer_object=tokenizer().backend_tokenizer, pad_token="<pad>", eos_token="</s>")
        tok.add_special_tokens({"extra_special_tokens": ["<image>"]})
        bare = UHDProcessor(processor.image_processor, tok)
        assert (bare.video_token, bare.video_token_id) == (None, None)
        assert bare(text="<image>", images=STILLS[0])["input_ids"].shape[1] > 4
        with pytest.raises(ValueError, match="has no video token: add one with"):
            bare(text="<video>", videos=[LONG])
        with pytest.raises(ValueError, match="got type 'video'"):
            bare.apply_chat_template(
                [{"role": "user", "content": [{"type": "video"}]}], chat_template=TEXT_ONLY_TEMPLATE
            )

    def test_it_can_be_chosen(self):
        found = attach(encoder(), video_token="<clip>")
        assert found.config.video_token == found.processor.video_token == "<clip>"
        batch = found.processor(text="<clip>", videos=[SHORT])
        assert found(**batch).video_hidden_states[0].shape == (4, WIDTH)
        with pytest.raises(ValueError, match="'<image>' stands for something else already"):
            attach(encoder(), image_token="<image>", video_token="<image>")

    def test_a_config_without_one_takes_no_videos(self):
        found = attached("internvl")
        batch = found.processor(text="<video>", videos=[SHORT])
        found.config.video_token_id = None
        with pytest.raises(ValueError, match="the batch has 1 videos, its samples' video positions"):
            found(**batch)


def test_videos_without_text_and_rules_without_overview():
    processor = shared("llava-onevision").processor
    batch = processor(images=STILLS, videos=VIDEOS)
    assert {"pixel_values", "pixel_values_videos"} < set(batch)
    assert "input_ids" not in batch
    mllama = UHDVideoProcessor(slicing="mllama")
    with pytest.raises(ValueError, match='has no overview, so there is no single view: use frames="rule"'):
        mllama.plan((3000, 3000), 2)
    plan = mllama.plan((3000, 3000), 2, frames="rule")
    assert plan.plans == (uhd.plan((3000, 3000), "mllama"),) * 2
    assert mllama.plan((3000, 3000), 2, frames="rule", max_slices=2).num_tokens <= plan.num_tokens


def test_a_budget_is_of_every_sample():
    found = shared("internvl")
    ask = {"text": ["<video>", "<video><video>"], "videos": VIDEOS, "frames": "rule"}
    free = read_plans(found.processor(**ask)["video_plans"])
    budget = min(free[0].num_tokens, free[1].num_tokens + free[2].num_tokens) - 1
    tight = found.processor(**ask, max_tokens=budget)
    plans = read_plans(tight["video_plans"])
    assert plans[0].num_tokens <= budget >= plans[1].num_tokens + plans[2].num_tokens
    assert plans[0] != free[0]
    assert found(**tight).logits.shape[1] == tight["input_ids"].shape[1]
    direct = found.processor.video_processor([VIDEOS[:1], VIDEOS[1:]], frames="rule", max_tokens=budget)
    assert torch.equal(direct["video_plans"], tight["video_plans"])


def test_a_longer_clip_than_the_positions_is_refused_before_it_runs():
    found = attached("llava-1.5", max_position_embeddings=64)
    batch = found.processor(text="<video>", videos=[LONG * 2])
    with pytest.raises(ValueError, match=r"sample 0 has 96 positions \(96 of them images or videos\)"):
        found(**batch)
    assert packed_encoder("llava-1.5").plan_video((60, 100), 6).num_tokens == 96


def test_the_page_on_images_and_videos_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    page = (pathlib.Path(__file__).parents[2] / "docs/models.md").read_text()
    eyes = packed_encoder("llava-1.5")
    names = {
        "lm": language_model("llama", max_position_embeddings=1024),
        "tokenizer": tokenizer(),
        "vision": eyes.vision,
        "pixels": eyes.pixels,
        "photo": STILLS[0],
        "page": STILLS[1],
        "frames": LONG,
        "folder": str(tmp_path / "eyes"),
    }
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(compile(block, "docs/models.md", "exec"), names)
    assert names["answer"].shape[0] == 2
    assert names["batch"]["video_plans"].shape[0] == 1
    with torch.no_grad():
        asked = names["eyes"].processor(text="<image>", images=STILLS[0])
        assert torch.equal(names["again"](**asked).logits, names["eyes"].eval()(**asked).logits)
