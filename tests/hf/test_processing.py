"""The processor and the image processors: shapes, counts that agree everywhere, chat templates, and clear refusals."""

import copy
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

import uhd
from tests.hf.tiny import IMAGES, TEXTS, attach, encoder, language_model, model, tokenizer
from tests.tiny import PIXELS, noise
from uhd.batch import SliceBatch
from uhd.hf import UHDForConditionalGeneration, UHDImageProcessor, UHDImageProcessorPil, UHDProcessor, processing
from uhd.hf.plans import read_plans
from uhd.hf.versions import MARKS_WORDS
from uhd.resampler import PerceiverConfig, PerceiverResampler, PixelShuffleProjector
from uhd.schema import layout
from uhd.slicing import PRESETS
from uhd.vision import ViT, ViTConfig

SLICING = uhd.SlicingConfig.preset("llava-uhd-safe").for_vision(image_size=56, patch_size=14)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [
            {"type": "image", "image": IMAGES[0]},
            {"type": "text", "text": "and"},
            {"type": "image", "image": IMAGES[1]},
            {"type": "text", "text": "differ?"},
        ],
    },
]
TEXT_ONLY_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] | trim }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def images(**changes):
    return UHDImageProcessorPil.from_settings(SLICING.replace(**changes), PIXELS)


class TestImageProcessor:
    def test_both_classes_make_the_pixels_of_the_library(self):
        plans = [uhd.plan(image.shape[:2], SLICING) for image in IMAGES]
        want = SliceBatch.from_images(IMAGES, plans)
        pil = images()(IMAGES)
        default = UHDImageProcessor.from_settings(SLICING, PIXELS)(IMAGES)
        assert isinstance(pil["pixel_values"], np.ndarray)
        assert pil["pixel_values"].dtype == np.float32
        assert torch.equal(torch.from_numpy(pil["pixel_values"]), want.normalized(PIXELS).patches)
        for name, value in default.items():
            assert torch.equal(value, torch.from_numpy(pil[name])), name
        raw = images()(IMAGES, do_rescale=False, do_normalize=False, return_tensors="pt")
        assert torch.equal(raw["pixel_values"], want.patches)
        assert raw["pixel_values"].dtype == torch.uint8

    def test_shapes(self):
        found = UHDImageProcessor.from_settings(SLICING, PIXELS)(IMAGES)
        plans = [uhd.plan(image.shape[:2], SLICING) for image in IMAGES]
        assert found["pixel_values"].shape == (sum(item.num_patches for item in plans), 588)
        assert found["grids"].tolist() == [list(view.patches_hw) for item in plans for view in item.views]
        assert found["num_patches"].tolist() == [item.num_views for item in plans]
        assert read_plans(found["image_plans"]) == tuple(plans)
        assert found["image_sizes"].tolist() == [[100, 60], [30, 200], [20, 11]]
        assert found["num_image_tokens"].tolist() == [item.num_tokens for item in plans]

    def test_a_call_may_change_the_plan_and_the_model_follows(self):
        found = model("llama")
        small = found.processor(text="<image>", images=IMAGES[1], max_slices=2)
        tight = found.processor(text="<image>", images=IMAGES[1], max_tokens=9)
        whole = found.processor(text="<image>", images=IMAGES[0], crop_to_patches=False)
        plain = found.processor(text="<image>", images=IMAGES[0], crop_to_patches=True)
        assert found.processor(text="<image>", images=IMAGES[1])["num_patches"].tolist() == [4]
        assert small["num_patches"].tolist() == [3]
        assert tight["num_patches"].tolist() == [1]
        assert tight["input_ids"].shape[1] <= 9
        assert whole["num_patches"].tolist() == [1]
        assert read_plans(whole["image_plans"])[0].grid is None
        assert plain["num_patches"].tolist() == [3]
        for batch in (small, tight, whole, plain):
            assert found(**batch).logits.shape[1] == batch["input_ids"].shape[1]

    def test_what_is_taken_as_an_image(self, tmp_path):
        picture_ = Image.fromarray(IMAGES[0])
        picture_.save(tmp_path / "a.png")
        buffer = io.BytesIO()
        picture_.save(buffer, "PNG")
        want = images()([IMAGES[0]])["pixel_values"]
        kinds = [picture_, tmp_path / "a.png", str(tmp_path / "a.png"), buffer.getvalue(), torch.from_numpy(IMAGES[0])]
        for kind in kinds:
            assert np.array_equal(images()([kind])["pixel_values"], want)
        assert np.array_equal(images()(picture_)["pixel_values"], want)

    def test_save_and_load_keep_the_plan(self, tmp_path):
        images(max_slices=3).save_pretrained(tmp_path)
        for backend, kind in (("pil", UHDImageProcessorPil), ("torchvision", UHDImageProcessor)):
            again = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
            assert type(again) is kind
            assert again.plan((500, 300)) == uhd.plan((500, 300), SLICING.replace(max_slices=3))
            assert again.to_dict()["slicing"] == images(max_slices=3).to_dict()["slicing"]

    @pytest.mark.parametrize(
        "kwargs, message",
        [
            ({"do_normalize": False}, "do_rescale=True and do_normalize=False: set both"),
            ({"resample": 0}, "resample must be one of"),
            ({"do_resize": True}, "do_resize does not apply"),
            ({"do_center_crop": True}, "do_center_crop does not apply"),
        ],
    )
    def test_settings_that_do_not_apply_are_refused(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            images()(IMAGES, **kwargs)

    def test_uncut_needs_the_released_rule(self):
        paper = uhd.SlicingConfig.preset("llava-uhd-paper").for_vision(image_size=56, patch_size=14)
        with pytest.raises(ValueError, match="uncut images need the slicing rule 'released'"):
            UHDImageProcessorPil.from_settings(paper, PIXELS)(IMAGES, crop_to_patches=False)


def preset_model(name):
    """A model whose encoder has the preset's token counts."""
    slicing = uhd.SlicingConfig.preset(name)
    vision = ViT(ViTConfig(patch_size=14, width=8, depth=1, heads=1, mlp_width=8, image_size=slicing.image_size))
    if slicing.tokens_per_view is None:
        compressor = PixelShuffleProjector(8, 32, factor=slicing.merge)
    else:
        compressor = PerceiverResampler(PerceiverConfig(width=32, vision_width=8, num_heads=1))
    parts = {"slicing": slicing, "schema": name, "pixels": PIXELS}
    return attach(uhd.VisualEncoder(vision, compressor, **parts), match_scale=False)


@pytest.mark.parametrize("name", PRESETS)
def test_token_counts_agree_everywhere(name):
    found = preset_model(name)
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(np.log(1), np.log(6000), (2000, 2))).astype(int)
    sizes[:200, 1] = sizes[:200, 0]  # squares, where grids tie
    want = [uhd.plan(tuple(size), uhd.SlicingConfig.preset(name)) for size in sizes.tolist()]
    counts = [item.num_tokens for item in want]
    schema = uhd.SpatialSchema.preset(name)
    assert [layout(item, schema).num_tokens for item in want] == counts
    assert uhd.plan_many(sizes, uhd.SlicingConfig.preset(name))["num_tokens"].tolist() == counts
    assert found.num_image_tokens(sizes.tolist()) == counts
    told = found.processor._get_num_multimodal_tokens(image_sizes=sizes.tolist())
    assert told["num_image_tokens"] == counts
    assert told["num_image_patches"] == [item.num_patches for item in want]
    assert told["num_image_patches"][:9] == [
        found.processor.image_processor.get_number_of_image_patches(h, w, {}) for h, w in sizes[:9].tolist()
    ]
    for height, width in [(30, 700), (640, 640), (900, 500)]:
        batch = found.processor(text=found.config.image_token, images=noise(height, width))
        [count] = found.num_image_tokens([(height, width)])
        assert batch["input_ids"].shape == (1, count)
        [features] = found.get_image_features(**batch).pooler_output
        assert len(features) == count


class TestProcessor:
    def test_expansion_padding_and_nesting(self):
        processor = model("llama").processor
        flat = processor(text=TEXTS, images=IMAGES)
        nested = processor(text=TEXTS, images=[[IMAGES[0]], [], IMAGES[1:]])
        assert all(torch.equal(flat[name], nested[name]) for name in flat)
        counts = (flat["input_ids"] == processor.image_token_id).sum(1).tolist()
        sizes = model("llama").num_image_tokens([image.shape[:2] for image in IMAGES])
        assert counts == [sizes[0], 0, sizes[1] + sizes[2]]
        assert flat["attention_mask"][0, 0] == 0  # on the left
        right = processor(text=TEXTS, images=IMAGES, padding_side="right")
        assert right["attention_mask"][0].tolist() == flat["attention_mask"][0].flip(0).tolist()
        assert set(flat) == {
            "input_ids",
            "attention_mask",
            "pixel_values",
            "grids",
            "num_patches",
            "image_plans",
            "image_sizes",
        }
        assert set(flat) <= set(processor.model_input_names) | {"num_image_tokens"}

    def test_text_alone_and_images_alone(self):
        processor = model("llama").processor
        assert set(processor(text="hello")) == {"input_ids", "attention_mask"}
        assert set(processor(text=["hello"], images=[])) == {"input_ids", "attention_mask"}
        assert "input_ids" not in processor(images=IMAGES)

    @pytest.mark.parametrize(
        "text, given, message",
        [
            (TEXTS, IMAGES[:2], "sample 2 has 2 <image> and 1 images are left for it; in all 3 <image> and 2 images"),
            (["a<image>", "b"], IMAGES, "2 samples have 1 <image> (per sample: [1, 0]) and there are 3 images"),
            ("no place", IMAGES[:1], "1 samples have 0 <image> (per sample: [0]) and there are 1 images"),
            (["a", "b<image>"], None, "sample 1 has 1 <image> and 0 images are left for it"),
            (TEXTS, [IMAGES[:1], IMAGES[1:2], IMAGES[2:]], "sample 1 has 0 <image> and 1 images"),
            (TEXTS, [IMAGES[:1], IMAGES[1:]], "got 3 texts and lists of images for 2"),
            ([1, 2], None, "text must be a string or a list of strings"),
            (None, None, "neither text nor images"),
        ],
    )
    def test_wrong_numbers_of_images(self, text, given, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            model("llama").processor(text=text, images=given)

    def test_truncation_never_cuts_an_image(self):
        processor = model("llama").processor
        count = model("llama").num_image_tokens([(100, 60)])[0]
        text = ["short", "ab<image>" + "c" * 40]
        kept = processor(text=text, images=IMAGES[:1], truncation=True, max_length=count + 2)
        assert (kept["input_ids"] == processor.image_token_id).sum() == count
        with pytest.raises(ValueError, match=f"sample 1 needs {count} positions for its images and {count - 3} are"):
            processor(text=text, images=IMAGES[:1], truncation=True, max_length=count - 1)

    def test_a_tokenizer_without_image_token(self):
        with pytest.raises(ValueError, match="has no image token '<image>': add it with"):
            UHDProcessor(images(), tokenizer())

    def test_a_template_that_takes_text_only(self):
        tok = tokenizer()
        tok = type(tok)(tokenizer_object=tok.backend_tokenizer, pad_token="<pad>", eos_token="</s>")
        tok.chat_template = TEXT_ONLY_TEMPLATE
        found = UHDForConditionalGeneration.from_vision_and_lm(encoder(), language_model("llama"), tok)
        text = found.processor.apply_chat_template(CHAT, add_generation_prompt=True)
        assert text == "[system]Be brief.[user]<image>\nand<image>\ndiffer?[assistant]"
        batch = found.processor.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True, return_dict=True)
        want = found.processor(text=text, images=IMAGES[:2])
        assert all(torch.equal(batch[name], want[name]) for name in want)
        two = found.processor.apply_chat_template([CHAT, CHAT[:1]], tokenize=True, return_dict=True)
        assert two["input_ids"].shape[0] == 2
        assert two["num_patches"].shape == (2,)
        with pytest.raises(ValueError, match="got type 'audio'"):
            found.processor.apply_chat_template([{"role": "user", "content": [{"type": "audio"}]}])

    def test_a_template_that_knows_images(self):
        processor = model("llama").processor
        text = processor.apply_chat_template(CHAT, add_generation_prompt=True)
        assert text == "System: Be brief.\nUser: <image>\nand<image>\ndiffer?\nAssistant:"
        batch = processor.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True, return_dict=True)
        want = processor(text=text, images=IMAGES[:2])
        assert all(torch.equal(batch[name], want[name]) for name in want)

    def test_raw_pixels_give_the_same_logits(self):
        found = model("llama")
        raw = found.processor(text=TEXTS, images=IMAGES, do_rescale=False, do_normalize=False)
        with torch.no_grad():
            assert torch.equal(found(**raw).logits, found(**found.processor(text=TEXTS, images=IMAGES)).logits)

    def test_save_and_load(self, tmp_path):
        processor = model("llama").processor
        processor.save_pretrained(tmp_path)
        again = UHDProcessor.from_pretrained(tmp_path)
        assert (again.image_token, again.image_token_id) == ("<image>", processor.image_token_id)
        assert again.chat_template == processor.chat_template


class TestKeywordsOfACall:
    """Each is heeded, or refused with a sentence."""

    def test_background(self):
        clear = Image.fromarray(np.zeros((60, 100, 4), np.uint8))
        processor = model("llama").processor
        for of in (processor.image_processor, lambda image, **how: processor(images=image, **how)):
            white, black = of(clear)["pixel_values"], of(clear, background=[0, 0, 0])["pixel_values"]
            assert white.min() > black.max()
        clip = processor(videos=[[clear, clear]], background=[0, 0, 0])["pixel_values_videos"]
        assert torch.equal(clip.amax(), black.amax())

    def test_max_pixels(self):
        processor = model("llama").processor
        for call in (processor.image_processor, lambda image, **how: processor(images=image, **how)):
            with pytest.raises(ValueError, match="max_pixels"):
                call(IMAGES[0], max_pixels=100)

    @pytest.mark.parametrize(
        "given",
        [
            {"do_resize": True},
            {"size": {"height": 30, "width": 20}},
            {"crop_size": {"height": 30, "width": 20}},
            {"do_pad": True},
            {"pad_size": {"height": 30, "width": 20}},
            {"input_data_format": "channels_last"},
        ],
    )
    def test_sizes_are_the_plans(self, given):
        [name] = given
        with pytest.raises(ValueError, match=f"{name} does not apply"):
            model("llama").processor.image_processor(IMAGES[0], **given)

    @pytest.mark.parametrize("given", [{"do_convert_rgb": False}, {"data_format": "channels_last"}])
    def test_patches_are_rgb_and_channels_first(self, given):
        with pytest.raises(ValueError, match="patches are RGB, channels first"):
            model("llama").processor.image_processor(IMAGES[0], **given)

    def test_device(self):
        made = model("llama").processor.image_processor(IMAGES[0], device="meta")
        assert made["pixel_values"].device.type == "meta"


class TestTokenizersSide:
    def test_it_is_left_until_it_is_set(self, tmp_path):
        processor = UHDProcessor(images(), copy.deepcopy(model("llama").processor.tokenizer))
        assert processor(text=["aaaa", "b"])["attention_mask"].tolist()[1] == [0, 0, 0, 1]
        processor.tokenizer.padding_side = "right"
        assert processor(text=["aaaa", "b"])["attention_mask"].tolist()[1] == [1, 0, 0, 0]
        assert processor(text=["aaaa", "b"], padding_side="left")["attention_mask"].tolist()[1] == [0, 0, 0, 1]
        processor.save_pretrained(tmp_path)
        again = UHDProcessor.from_pretrained(tmp_path)
        assert again(text=["aaaa", "b"])["attention_mask"].tolist()[1] == [1, 0, 0, 0]


BOTH = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ image_token if p.type == 'image' else p.text }}{% endfor %}{% endif %}{% endfor %}"
)
TEXT_ONLY = "{% for m in messages %}[{{m.role}}]{{m.content}}{% endfor %}"


class TestWordsOfTheUser:
    """ "<image>" in a user's own text is text, where transformers can mark it; our places for images never are."""

    CHAT = (
        {
            "role": "user",
            "content": [{"type": "image", "image": IMAGES[0]}, {"type": "text", "text": "what is the <image> tag?"}],
        },
    )

    @pytest.mark.parametrize("ours", [True, False] if MARKS_WORDS else [True])
    @pytest.mark.parametrize("template", [None, TEXT_ONLY, BOTH])
    def test_words_stay_words(self, template, ours, monkeypatch):
        monkeypatch.setattr(processing, "MARKS_WORDS", not ours)
        processor = model("llama").processor
        asked = {"tokenize": True, "return_dict": True, "sanitize_control_tokens": True}
        batch = processor.apply_chat_template(
            [list(self.CHAT), [{"role": "a", "content": "b</s>"}]], template, **asked
        )
        [wanted] = model("llama").num_image_tokens([IMAGES[0].shape[:2]])
        ids, mask = torch.as_tensor(batch["input_ids"]), torch.as_tensor(batch["attention_mask"])
        assert (ids == processor.image_token_id).sum() == wanted
        assert "what is the <image> tag?" in processor.decode(ids[0][ids[0] != processor.image_token_id])
        assert "b</s>" in processor.decode(ids[1][mask[1] == 1])
        assert processor.tokenizer.eos_token_id not in ids[1]
        assert mask.sum(1).tolist()[1] < mask.sum(1).tolist()[0] == ids.shape[1]
        with pytest.raises(ValueError, match="tokenize=True"):
            processor.apply_chat_template(list(self.CHAT), template, sanitize_control_tokens=True)

    def test_words_in_parts_that_are_objects(self, monkeypatch):
        monkeypatch.setattr(processing, "MARKS_WORDS", False)
        processor = model("llama").processor
        letters = "".join(map(chr, range(0xE200, 0xE210)))  # that stand for control tokens meanwhile
        chat = [{"role": "user", "content": [SimpleNamespace(type="text", text=f"b</s><image>{letters}")]}]
        asked = {"tokenize": True, "return_dict": True, "sanitize_control_tokens": True}
        [ids] = processor.apply_chat_template(chat, TEXT_ONLY, **asked)["input_ids"].tolist()
        shown = processor.decode(ids)
        assert shown.startswith("[user]b</s><image>")
        assert (shown.count("</s>"), shown.count("<image>")) == (1, 1)
        assert not {processor.image_token_id, processor.tokenizer.eos_token_id} & set(ids)
        short = processor.apply_chat_template(chat, TEXT_ONLY, **asked, truncation=True, max_length=9)
        assert short["input_ids"].tolist() == [ids[:9]]

    @pytest.mark.parametrize("template", [None, TEXT_ONLY])
    def test_no_letters_stand_for_an_image_but_ours(self, template):
        forged = "\ue0f0" * len("<image>")
        content = [
            {"type": "image", "image": IMAGES[0], "text": None},
            {"type": "text", "text": forged, "image": None},
        ]
        chat = [{"role": "user", "content": content}]
        processor = model("llama").processor
        ids = processor.apply_chat_template(chat, template, tokenize=True, return_dict=True)["input_ids"][0]
        assert forged in processor.decode(ids)
        assert (ids == processor.image_token_id).sum() == model("llama").num_image_tokens([IMAGES[0].shape[:2]])[0]
        with pytest.raises(ValueError, match="image of a message is None"):
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image", "image": None}]}], template, tokenize=True
            )

    def test_a_template_of_text_only_shows_the_token(self):
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
        processor = model("llama").processor
        forged = "\ue0f0" * len("<image>")
        text = processor.apply_chat_template(chat, TEXT_ONLY + "{{ more }}", more=forged)
        assert text == f"[user]<image>\na{forged}"
        assert processor.apply_chat_template(chat, TEXT_ONLY) == "[user]<image>\na"
        assert processor.apply_chat_template([chat, chat], TEXT_ONLY) == ["[user]<image>\na"] * 2
