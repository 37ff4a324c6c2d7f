"""The model under other people's tools: pipelines, streamers, beams, device maps, torch.compile, torch.export."""

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import TextIteratorStreamer, pipeline

from tests.hf.test_models import by_hand
from tests.hf.tiny import IMAGES, TEXTS, model
from uhd.hf import UHDForConditionalGeneration

SETTINGS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.mark.parametrize("kind", ["llama", "gemma4_text"])
def test_the_pipeline_answers_as_generate_does(kind):
    found = model(kind)
    picture = Image.fromarray(IMAGES[0])
    pipe = pipeline("image-text-to-text", model=found, processor=found.processor)
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "hi"}]}]
    answer = pipe(text=chat, generate_kwargs=SETTINGS)[0]["generated_text"][-1]
    batch = found.processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = found.generate(**batch, **SETTINGS)[0, batch["input_ids"].shape[1] :]
    assert answer == {"role": "assistant", "content": found.processor.decode(ids, skip_special_tokens=True)}


def test_text_streams_as_it_is_generated():
    found = model("llama")
    batch = found.processor(text=TEXTS[:1], images=IMAGES[:1])
    streamer = TextIteratorStreamer(found.processor.tokenizer, skip_prompt=True)
    ids = found.generate(**batch, **SETTINGS, streamer=streamer)[0, batch["input_ids"].shape[1] :]
    assert "".join(streamer) == found.processor.decode(ids)


def test_beam_search_equals_the_bare_model_on_merged_embeddings():
    found = model("llama")
    settings = {**SETTINGS, "num_beams": 3, "num_return_sequences": 3}
    batch, hand = found.processor(text=TEXTS, images=IMAGES), by_hand(found, TEXTS, IMAGES)
    ours = found.generate(**batch, **settings)
    theirs = found.language_model.generate(
        inputs_embeds=hand.inputs_embeds, attention_mask=hand.attention_mask, **settings
    )
    assert torch.equal(ours[:, -4:], theirs)


# some releases take the meta device of offloaded weights for the model's
@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the .input_ids. being on a device:UserWarning")
@pytest.mark.parametrize(
    "device_map",
    ["cpu", "auto", {"visual": "cpu", "language_model": "disk"}, {"visual": "disk", "language_model": "cpu"}],
)
def test_device_maps(device_map, tmp_path):
    found = model("llama")
    found.save_pretrained(tmp_path / "model")
    again = UHDForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    batch = found.processor(text=TEXTS, images=IMAGES)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits.cpu(), found(**batch).logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(again.generate(**batch, **SETTINGS).cpu(), found.generate(**batch, **SETTINGS))


def test_the_vision_side_compiles_as_one_graph():
    found = model("llama")
    batch = found.processor(images=IMAGES[2:])
    grids = batch["grids"].tolist()
    compiled = torch.compile(found.visual.encode_packed, backend="eager", fullgraph=True)
    with torch.no_grad():
        want, lengths = found.visual.encode_packed(batch["pixel_values"], grids)
        got, others = compiled(batch["pixel_values"], grids)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert others == lengths


class FixedGrids(nn.Module):
    """The vision side for views of these grids; docs/training.md shows the same."""

    def __init__(self, visual, grids):
        super().__init__()
        self.visual, self.grids = visual, grids

    def forward(self, patches):
        return self.visual.encode_packed(patches, self.grids)[0]


def test_the_vision_side_exports_for_fixed_grids():
    found = model("llama")
    batch, other = (found.processor(images=[picture]) for picture in (IMAGES[0], 255 - IMAGES[0]))
    grids = batch["grids"].tolist()
    with torch.no_grad():
        program = torch.export.export(FixedGrids(found.visual, grids), (batch["pixel_values"],))
        got = program.module()(other["pixel_values"])
        torch.testing.assert_close(got, found.visual.encode_packed(other["pixel_values"], grids)[0])


def test_the_whole_model_does_not_export_because_counts_are_read_from_tensors():
    """How many views an image has, and of which grids, decides shapes; it is in the batch, so a trace cannot know it.

    Should this fail, torch.export has learned it: say so in docs/training.md.
    """
    found = model("llama")
    batch = dict(found.processor(text=TEXTS[:1], images=IMAGES[:1]))
    with torch.no_grad(), pytest.raises(Exception, match=r"data-dependent|not supported for tensor subclasses"):
        torch.export.export(found, (), batch)


def test_images_need_the_whole_prompt_at_once():
    """What splits a prompt is refused by name, before anything is encoded."""
    found = model("nemotron_h")
    batch = found.processor(text=TEXTS[0], images=IMAGES[:1])
    with pytest.raises(ValueError, match="leave prefill_chunk_size out"):
        found.generate(**batch, max_new_tokens=2, prefill_chunk_size=4)
