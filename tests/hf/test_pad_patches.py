"""``pad_patches``: an image a row and sizes beside it, for trainers that cut a batch by its images."""

import numpy as np
import pytest
import torch

from tests.hf.tiny import COMPRESSORS, IMAGES, TEXTS, attach, encoder, model, shared
from uhd.hf import UHDImageProcessorPil, UHDProcessor

PADDED = {"pad_patches": True}
TOKENIZED = {"padding": True, "return_tensors": "pt"}


def fresh():
    found = attach(encoder(), "llama")
    found.processor.image_processor.pad_patches = True
    return found


@pytest.mark.parametrize("name", ["perceiver", *COMPRESSORS])
@pytest.mark.parametrize("raw", [False, True])
def test_a_row_an_image_gives_what_packed_patches_give(name, raw):
    found = model("llama") if name == "perceiver" else shared(name)
    how = {"do_rescale": False, "do_normalize": False} if raw else {}
    packed = found.processor(text=TEXTS, images=IMAGES, **how)
    padded = found.processor(text=TEXTS, images=IMAGES, **PADDED, **how)
    assert set(padded) == {"input_ids", "attention_mask", "pixel_values", "image_sizes"}
    rows, counts = padded["pixel_values"], [found.visual.plan(image.shape[:2]).num_patches for image in IMAGES]
    assert rows.shape == (3, max(counts), packed["pixel_values"].shape[1])
    assert rows.dtype == packed["pixel_values"].dtype
    assert len(set(counts)) > 1 or name == "llava-1.5"
    with torch.no_grad():
        want, got = found(**packed), found(**padded)
        assert torch.equal(got.logits, want.logits)
        for one, other in zip(got.image_hidden_states, want.image_hidden_states, strict=True):
            assert torch.equal(one, other)
    asked = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(found.generate(**padded, **asked), found.generate(**packed, **asked))


def test_it_can_be_cut_by_images():
    found = model("llama")
    batch = found.processor(text=TEXTS, images=IMAGES, **PADDED)
    with torch.no_grad():
        whole = found(**batch).logits
        last = {
            name: value[1:] if name in ("pixel_values", "image_sizes") else value[2:] for name, value in batch.items()
        }
        torch.testing.assert_close(found(**last).logits, whole[2:], rtol=1e-5, atol=1e-5)
        text = {
            name: value[:0] if name in ("pixel_values", "image_sizes") else value[1:2] for name, value in batch.items()
        }
        torch.testing.assert_close(found(**text).logits, whole[1:2], rtol=1e-5, atol=1e-5)
        features = found.get_image_features(batch["pixel_values"][:1], image_sizes=batch["image_sizes"][:1])
        assert len(features.pooler_output) == 1


def test_the_setting_is_saved_and_leaves_text_to_the_call(tmp_path):
    fresh().save_pretrained(tmp_path)
    processor = UHDProcessor.from_pretrained(tmp_path)
    assert processor.image_processor.pad_patches is True
    chat = [[{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "?" * length}]}]
            for length, image in enumerate(IMAGES)]  # fmt: skip
    found = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)
    assert [type(ids) for ids in found["input_ids"]] == [list] * 3
    assert len({len(ids) for ids in found["input_ids"]}) == 3
    assert all(processor.tokenizer.pad_token_id not in ids for ids in found["input_ids"])
    assert found["pixel_values"].dim() == 3
    for asked in (TOKENIZED, {"text_kwargs": TOKENIZED}):
        assert processor(text=TEXTS, images=IMAGES, **asked)["input_ids"].shape[0] == 3


def test_a_sample_without_images_among_others():
    found = model("llama")
    some = found.processor(text=TEXTS, images=[IMAGES[:1], None, IMAGES[1:]])
    assert torch.equal(some["pixel_values"], found.processor(text=TEXTS, images=IMAGES)["pixel_values"])


def test_numpy_rows():
    pil = UHDImageProcessorPil(slicing=model("llama").config.slicing_config, pad_patches=True)
    found = pil(IMAGES)
    assert isinstance(found["pixel_values"], np.ndarray)
    assert found["pixel_values"].ndim == 3
    assert pil.to_dict()["pad_patches"] is True


@pytest.mark.parametrize(
    "asked, why",
    [
        ({"max_tokens": 1000}, "max_tokens plans a sample's images together"),
        ({"multi_image": True}, "multi_image plans a sample's images together"),
        ({"max_slices": 2}, r"image \d is planned otherwise"),
        ({"crop_to_patches": False}, r"image \d is planned otherwise"),
    ],
)
def test_what_sizes_do_not_tell_is_refused(asked, why):
    processor = model("llama").processor
    with pytest.raises(ValueError, match=f"from its size alone, and {why}: leave max_tokens"):
        processor(text=TEXTS, images=IMAGES, **PADDED, **asked)
    mine = fresh().processor
    for name, value in asked.items():
        setattr(mine.image_processor, name, value)
    with pytest.raises(ValueError, match=why):
        mine(text=TEXTS, images=IMAGES)
    with pytest.raises(ValueError, match=why):
        mine.image_processor([IMAGES])


def test_a_model_refuses_what_does_not_fit_its_plans():
    found = fresh()
    batch = found.processor(text=TEXTS, images=IMAGES, **TOKENIZED)
    rows, sizes = batch["pixel_values"], batch["image_sizes"]
    for wrong, why in (
        ({"image_sizes": None}, "images need image_plans"),
        ({"image_sizes": sizes[:2]}, r"pixel_values \(3, \d+, 588\) hold an image a row, image_sizes are of 2 images"),
        ({"pixel_values": rows[:, :-1]}, "of 3 images of at most"),
        ({"image_sizes": sizes[[2, 2, 2]]}, "a row of pixel_values holds more patches than the plan"),
        ({"num_patches": torch.tensor([1, 1, 1])}, "num_patches says"),
    ):
        with pytest.raises(ValueError, match=why):
            found(**{**batch, **wrong})
    found.visual.slicing = found.visual.slicing.replace(max_slices=2)
    with pytest.raises(ValueError, match="their processor plans otherwise"):
        found(**batch)
