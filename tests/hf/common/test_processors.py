"""What transformers asks of processors, beyond what its own suites run here: see .ci/suites."""

import copy
import dataclasses
import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoProcessor, AutoVideoProcessor
from transformers.video_utils import VideoMetadata

from tests.hf.common.eyes import IMAGES, TEXTS, shared
from uhd.hf import UHDImageProcessorPil, image_processing, video_processing

PARTS = "{% for m in messages %}{{ m['content'][0]['text'] }}|{% endfor %}"
ASKS = (
    "{% for m in messages %}{% if bold %}*{% endif %}{% for p in m['content'] %}"
    "{{ image_token if p['type'] == 'image' else p['text'] }}{% endfor %}{% endfor %}"
)
STRINGS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
ADDRESSES = (
    "{% for m in messages %}{% for p in m.content %}{{ p.type }}={{ p.url or p.text }};{% endfor %}{% endfor %}"
)
HELLO = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]


@pytest.mark.parametrize(
    "template, want", [(PARTS, "hello|"), (STRINGS, "user: hello"), (ASKS, "hello"), (None, "hello")]
)
def test_text_in_parts_goes_through_any_template(template, want):
    processor = shared("llama").processor
    assert want in processor.apply_chat_template(HELLO, template)
    assert len(processor.apply_chat_template([HELLO] * 2, template)) == 2


def test_a_templates_variables_are_heeded():
    processor = shared("llama").processor
    chat = [{"role": "user", "content": [{"type": "image", "image": IMAGES[0]}, {"type": "text", "text": "a"}]}]
    assert processor.apply_chat_template(chat, ASKS, bold=True) == "*<image>a"
    assert processor.apply_chat_template(chat, ASKS, image_token="<image>") == "<image>a"
    assert processor.apply_chat_template(chat, ASKS, image_token="[i]") == "[i]a"
    batch = processor.apply_chat_template(chat, ASKS, tokenize=True, return_dict=True)
    assert torch.equal(torch.as_tensor(batch["input_ids"]), processor(text="<image>a", images=IMAGES[0])["input_ids"])


def test_messages_and_parts_may_be_objects():
    @dataclasses.dataclass
    class Part:
        image_url: dict
        type: str = "image_url"

    @dataclasses.dataclass
    class Message:
        content: list
        role: str = "user"

    chat = [Message([Part({"url": "https://a/b.png"}), {"type": "text", "text": "c"}])]
    processor = shared("llama").processor
    assert processor.apply_chat_template(chat, STRINGS) == "user: <image>\nc"
    if hasattr(processor, "_normalize_conversations"):  # older releases take dictionaries only
        assert processor.apply_chat_template(chat, ADDRESSES) == "image=https://a/b.png;text=c;"


@pytest.mark.parametrize("part", ["image_processor", "video_processor", None])
def test_a_dictionary_is_the_same_before_saving_and_after_loading(part, tmp_path):
    whole = copy.deepcopy(shared("llama").processor)
    whole.image_processor.background = (1, 2, 3)
    given = whole if part is None else getattr(whole, part)
    given.save_pretrained(tmp_path)
    auto = {"image_processor": AutoImageProcessor, "video_processor": AutoVideoProcessor}.get(part, AutoProcessor)
    again = auto.from_pretrained(tmp_path)
    assert again.to_dict() == given.to_dict()
    assert json.loads(again.to_json_string()) == json.loads(given.to_json_string())
    if part is not None:
        assert json.loads(json.dumps(given.to_dict())) == given.to_dict()


@pytest.mark.parametrize("factor", [1 / 127.5, -1.0])
def test_pixels_are_rescaled_as_asked(factor):
    raw = UHDImageProcessorPil()(IMAGES[0], do_rescale=False, do_normalize=False)["pixel_values"]
    got = UHDImageProcessorPil(image_mean=(0.1, 0.2, 0.3))(IMAGES[0], rescale_factor=factor)["pixel_values"]
    mean = np.repeat([0.1, 0.2, 0.3], raw.shape[1] // 3)
    np.testing.assert_allclose(got, (raw * factor - mean) / 0.5, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("told", [{"fps": 4, "total_num_frames": 8}, VideoMetadata(total_num_frames=8, fps=4)])
def test_decoded_frames_have_the_speed_that_they_are_told(told):
    processor = shared("llama").processor
    frames = [np.full((30, 40, 3), 20 * place, np.uint8) for place in range(8)]
    places = processor.video_processor.sample_frames(VideoMetadata(total_num_frames=8, fps=4), fps=1.5)
    assert len(places) == 3  # of two seconds
    want = processor(text="<video>", videos=[frames[place] for place in places])
    for metadata in (told, [told], [[told]], {"fps": told["fps"]}):
        got = processor(text="<video>", videos=[frames], fps=1.5, video_metadata=metadata)
        assert all(torch.equal(got[name], want[name]) for name in want)
    with pytest.raises(ValueError, match="video 0 has 7 frames, its video_metadata says 8"):
        processor(text="<video>", videos=[frames[:7]], fps=1, video_metadata=told)
    with pytest.raises(ValueError, match="got 1 videos and video_metadata of 2"):
        processor(text="<video>", videos=[frames], fps=1, video_metadata=[told, told])


def test_the_processor_is_what_trainers_and_transformers_look_for():
    processor = shared("llama").processor
    assert processor.pad_token_id == processor.tokenizer.pad_token_id is not None
    assert "audio" not in inspect.signature(type(processor).__call__).parameters
    batch = processor(text=TEXTS[0] + "<video>", images=IMAGES[0], videos=[[IMAGES[1]]])
    assert set(batch) == set(processor.model_input_names)
    for module, name in ((image_processing, "UHDImageProcessor"), (video_processing, "UHDVideoProcessor")):
        assert getattr(module, name).valid_kwargs is getattr(module, f"{name}Kwargs")
    with pytest.raises(ValueError, match="tokens in the prompts should be the same as the number of images"):
        processor(text=TEXTS[:1], images=[[IMAGES[0]], [IMAGES[1]]])


WITHOUT = """
import importlib.metadata, importlib.util, sys
find, version = importlib.util.find_spec, importlib.metadata.version
def gone(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.util.find_spec = lambda name, *more: None if name == "torchvision" else find(name, *more)
importlib.metadata.version = lambda name: gone(name) if name == "torchvision" else version(name)
sys.modules["torchvision"] = None
from transformers import AutoProcessor
import uhd.hf
found = uhd.hf.UHDProcessor.from_pretrained(sys.argv[1])
import numpy
print(found(text="<image>", images=numpy.zeros((30, 40, 3), "uint8"))["input_ids"].shape)
"""


def test_torchvision_is_not_needed(tmp_path):
    processor = shared("llama").processor
    processor.save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", WITHOUT, tmp_path], capture_output=True, text=True)
    want = processor(text="<image>", images=np.zeros((30, 40, 3), np.uint8))["input_ids"].shape
    assert str(want) in done.stdout, done.stderr[-2000:]
