"""Outputs are the language model's own, under its own names, with images and videos last."""

import dataclasses
import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

from tests.hf.tiny import IMAGES, TEXTS, attach, encoder, language_model, model, targets
from uhd.hf.versions import CACHE_NAMES

MEDIA = ["image_outputs", "video_outputs", "image_hidden_states", "video_hidden_states"]
ASKED = {
    "llama": {"output_hidden_states": True, "output_attentions": True},
    "mixtral": {"output_router_logits": True},
    "mamba": {"output_hidden_states": True},
    "gemma3n_text": {},
    "nemotron_h": {},
}


def names(output):
    return [field.name for field in dataclasses.fields(output)]


@pytest.mark.parametrize("kind", ASKED)
def test_no_field_of_the_language_model_is_lost(kind):
    eyes = attach(encoder(), kind)
    lm = eyes.language_model
    if "output_attentions" in ASKED[kind]:
        lm.set_attn_implementation("eager")
    ids = torch.tensor([[5, 6, 7, 8]])
    for ours, theirs in ((eyes, lm), (eyes.base_model, lm.base_model)):
        asked = ASKED[kind] if ours is eyes or kind == "llama" else {}
        with torch.no_grad():
            got, want = ours(input_ids=ids, use_cache=True, **asked), theirs(input_ids=ids, use_cache=True, **asked)
        assert set(got.keys()) == set(want.keys())
        assert names(got)[-4:] == MEDIA
        assert set(names(got)) == {*names(want), *MEDIA}
        for name, value in want.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(got[name], value), name


@pytest.mark.parametrize("kind", ["llama", "mixtral", "nemotron_h"])
def test_loss_then_logits_then_the_rest(kind):
    eyes = model(kind)
    for text, images in (("hello", None), (TEXTS[0], IMAGES[:1])):
        batch = eyes.processor(text=text, images=images)
        with torch.no_grad():
            plain = eyes(**batch)
            labels = targets(eyes, batch)
            trained, loose = eyes(**batch, labels=labels), eyes(**batch, labels=labels, return_dict=False)
        assert plain[0] is plain.logits
        assert trained[0] is trained.loss
        assert trained[1] is trained.logits
        assert (list(trained)[-1] == "image_hidden_states") == (images is not None)
        assert isinstance(loose, tuple)
        assert torch.equal(loose[0], trained.loss)
        assert len(loose) == len(trained.to_tuple())


def test_an_output_can_be_taken_apart_and_built_again():
    eyes = model("llama")
    batch = eyes.processor(text=TEXTS[0], images=IMAGES[:1])
    with torch.no_grad():
        output = eyes(**batch, use_cache=False)
    leaves, spec = pytree.tree_flatten(output)
    copies = {
        "pytree": pytree.tree_unflatten([leaf + 1 for leaf in leaves], spec),
        "replace": dataclasses.replace(output, logits=output.logits + 1),
        "keywords": type(output)(**output),
        "pickle": pickle.loads(pickle.dumps(output)),
    }
    for how, copy in copies.items():
        assert type(copy) is type(output), how
        assert list(copy) == list(output), how
    assert torch.equal(copies["pytree"].image_hidden_states[0], output.image_hidden_states[0] + 1)
    assert torch.equal(copies["replace"].logits, output.logits + 1)
    assert torch.equal(copies["pickle"].logits, output.logits)


def test_media_are_no_predictions():
    ignored = model("llama").config.keys_to_ignore_at_inference
    assert set(MEDIA) <= set(ignored)
    assert "logits" not in ignored


def test_the_trunk_is_the_same_model_without_its_head():
    eyes = model("gemma2")
    batch = eyes.processor(text=TEXTS, images=IMAGES)
    trunk = eyes.base_model
    with torch.no_grad():
        hidden = trunk(**batch)
        logits = eyes(**batch).logits
        head = eyes.get_output_embeddings()(hidden.last_hidden_state)
    capped = eyes.config.text_config.final_logit_softcapping
    torch.testing.assert_close(capped * torch.tanh(head / capped), logits)
    assert [len(rows) for rows in hidden.image_hidden_states] == eyes.num_image_tokens(
        [(100, 60), (30, 200), (20, 11)]
    )
    assert {id(p) for p in trunk.parameters()} == {id(p) for p in eyes.parameters()}
    assert trunk.base_model is trunk


def test_a_wrapped_forward_does_not_reach_the_trunk():
    """Mixed precision and device placement replace a model's ``forward``; the trunk has one of its own."""
    eyes = model("llama")
    batch = eyes.processor(text="hello")
    eyes.forward = lambda **_: None
    try:
        with torch.no_grad():
            assert eyes.base_model(**batch).last_hidden_state.shape[-1] == 32
    finally:
        del eyes.forward


def spellings(output):
    return [name for name in CACHE_NAMES if getattr(output, name, None) is not None]


@pytest.mark.filterwarnings("ignore:.* is deprecated. use .cache. instead:FutureWarning")
@pytest.mark.parametrize("kind", ["llama", "mamba", "gemma4_text", "nemotron_h"])
def test_a_loop_over_forward_under_every_name_of_the_cache(kind):
    """Every name that the language model's own output has for its cache; a padded batch, one new token at a time."""
    eyes = model(kind)
    texts, images = TEXTS[:2], IMAGES[:1]
    batch = eyes.processor(text=texts, images=images)
    new = 4
    want = eyes.generate(**batch, max_new_tokens=new, min_new_tokens=new, do_sample=False)[:, -new:]
    with torch.no_grad():
        known = spellings(eyes.language_model(torch.tensor([[5, 6]]), use_cache=True))
        assert known
        for name in known:
            output, mask, steps = eyes(**batch, use_cache=True), batch["attention_mask"], []
            for _ in range(new):
                steps.append(output.logits[:, -1:].argmax(-1))
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                given = {name: getattr(output, name), "attention_mask": mask}
                output = eyes(input_ids=steps[-1], use_cache=True, **given)
            assert torch.equal(torch.cat(steps, 1), want), name


def test_a_cache_is_given_once():
    eyes = model("llama")
    cache = spellings(language_model("llama")(torch.tensor([[1, 2]]), use_cache=True))
    assert cache
    with pytest.raises(ValueError, match="the cache was given as cache and as past_key_values: give it once"):
        eyes(input_ids=torch.tensor([[1]]), past_key_values=object(), cache=object())
