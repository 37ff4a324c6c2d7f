"""Conversations that go on from a cache: images in it are neither asked for nor encoded again."""

import copy

import pytest
import torch
from transformers import DynamicCache

from tests.hf.tiny import IMAGES, attach, encoder, model, packed_encoder, tokenizer
from uhd.hf.versions import cache_name, take_cache

TURNS = [("look <image> here", 1), (" and", 0), (" then <image>!", 1), (" so", 0), ("?", 0)]
HOW = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
KINDS = ("llama", "gpt2", "gemma3_text", "mamba", "nemotron_h", "gemma4_text")


@pytest.fixture
def encoded(monkeypatch):
    """Patches of every call of the encoder, by kind of model."""

    def watch(found):
        counts = []
        whole = found.visual.encode
        monkeypatch.setattr(
            found.visual, "encode", lambda batch, **how: counts.append(len(batch.patches)) or whole(batch, **how)
        )
        return counts

    return watch


def new_ids(found, text, images):
    """Ids of one turn, and what the processor made of its images."""
    batch = dict(found.processor(text=text, images=images or None, add_special_tokens=False))
    batch.pop("attention_mask")
    return batch.pop("input_ids"), batch


@pytest.mark.parametrize("given", ["new", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_five_turns_encode_each_image_once(kind, given, encoded):
    found = attach(encoder(), kind)
    counts = encoded(found)
    ids, cache, used, answers, stops = torch.zeros(1, 0, dtype=torch.long), None, [], [], []
    for text, images in TURNS:
        used += [IMAGES[len(used)]] * images
        turn, fresh = new_ids(found, text, used[len(used) - images :])
        ids = torch.cat([ids, turn], dim=1)
        visual = fresh
        if given == "all" and used:
            visual = new_ids(found, "<image>" * len(used), used)[1]
        filled = {} if cache is None else {cache_name(found.language_model): cache}
        out = found.generate(input_ids=ids, **visual, **filled, **HOW)
        assert out.sequences[:, : ids.shape[1]].tolist() == ids.tolist()
        stops.append(ids.shape[1])
        answers.append(out.sequences[0, ids.shape[1] :].tolist())
        ids, cache = out.sequences, take_cache(dict(out))
    assert counts == [len(new_ids(found, "<image>", [image])[1]["pixel_values"]) for image in used]
    whole = []
    for stop, seen in zip(stops, (1, 1, 2, 2, 2), strict=True):
        visual = new_ids(found, "<image>" * seen, used[:seen])[1]
        whole.append(found.generate(input_ids=ids[:, :stop], **visual, **HOW).sequences[0, stop:].tolist())
    assert answers == whole


@pytest.mark.parametrize("kind", ["llama", "mamba", "gemma4_text"])
def test_what_is_new_alone(kind):
    """As in transformers: ids of what is new, with a mask of all that a cache with positions holds."""
    found = model(kind)
    first, visual = new_ids(found, "ab<image>", IMAGES[:1])
    out = found.generate(input_ids=first, **visual, **HOW)
    turn, visual = new_ids(found, "c<image>d", IMAGES[1:2])
    new = torch.cat([out.sequences[:, -1:], turn], dim=1)
    whole = torch.cat([out.sequences, turn], dim=1)
    mask = {} if kind == "mamba" else {"attention_mask": torch.ones_like(whole)}
    cache = {cache_name(found.language_model): take_cache(dict(out))}
    got = found.generate(input_ids=new, **visual, **mask, **cache, **HOW)
    both = new_ids(found, "<image><image>", IMAGES[:2])[1]
    wanted = found.generate(input_ids=whole, **both, **HOW)
    assert got.sequences[:, : new.shape[1]].tolist() == new.tolist()
    assert got.sequences[:, new.shape[1] :].tolist() == wanted.sequences[:, whole.shape[1] :].tolist()
    if kind == "mamba":  # the state goes on being known by what it has seen
        more = torch.cat([wanted.sequences, turn[:, :1]], dim=1)
        cache = {cache_name(found.language_model): take_cache(dict(got))}
        again = found.generate(input_ids=more, **cache, **HOW).sequences
        assert again.tolist() == found.generate(input_ids=more, **both, **HOW).sequences.tolist()


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "rwkv"])
def test_copies_of_a_state_go_on_exactly(kind):
    """Some language models forget what they have seen where they are given more than one id of what follows."""
    found = model(kind)
    first, visual = new_ids(found, "ab<image>", IMAGES[:1])
    out = found.generate(input_ids=first, **visual, **HOW)
    both = new_ids(found, "<image><image>", IMAGES[:2])[1]
    scores = {**HOW, "output_logits": True}
    for text, images in (("words", IMAGES[:0]), ("c<image>", IMAGES[1:2])):
        turn, fresh = new_ids(found, text, images)
        whole = torch.cat([out.sequences, turn], dim=1)
        wanted = found.generate(input_ids=whole, **(both if len(images) else visual), **scores).logits
        cache = {cache_name(found.language_model): copy.deepcopy(take_cache(dict(out)))}
        got = found.generate(input_ids=whole, **fresh, **cache, **scores).logits
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kind", ["llama", "gemma4_text"])
def test_batches_with_padding_go_on(kind, encoded):
    found = attach(encoder(), kind)
    counts = encoded(found)
    texts = ["a<image>b", "long text", "<image><image>"]
    batch = found.processor(text=texts, images=[[IMAGES[0]], [], list(IMAGES[1:3])], padding=True)
    out = found.generate(**batch, **HOW)
    turn = found.processor(text=["x<image>"] * 3, images=[[image] for image in IMAGES], add_special_tokens=False)
    ids = torch.cat([out.sequences, turn["input_ids"]], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(ids[:, batch["attention_mask"].shape[1] :])], dim=1)
    fresh = {name: turn[name] for name in turn if name not in ("input_ids", "attention_mask")}
    cache = {cache_name(found.language_model): take_cache(dict(out))}
    got = found.generate(input_ids=ids, attention_mask=mask, **fresh, **cache, **HOW).sequences
    images = [IMAGES[0], IMAGES[0], IMAGES[1], IMAGES[1], IMAGES[2], IMAGES[2]]
    visual = new_ids(found, "<image>" * 6, images)[1]
    assert got.tolist() == found.generate(input_ids=ids, attention_mask=mask, **visual, **HOW).sequences.tolist()
    assert counts[0] + counts[1] == counts[2] == len(visual["pixel_values"])


def test_encoded_images_and_videos_go_on():
    found = attach(packed_encoder("llava-onevision"))
    clip = [IMAGES[0], IMAGES[0]]
    batch = dict(found.processor(text="<video>a<image>", videos=[clip], images=[IMAGES[1]]))
    out = found.generate(**batch, **HOW)
    tokens = found.visual([IMAGES[2]])
    turn = dict(found.processor(text="b<image>", images=tokens, add_special_tokens=False))
    ids = torch.cat([out.sequences, turn["input_ids"]], dim=1)
    cache = {cache_name(found.language_model): take_cache(dict(out))}
    new = {name: turn[name] for name in turn if name not in ("input_ids", "attention_mask")}
    got = found.generate(input_ids=ids, **new, **cache, **HOW).sequences
    whole = found.processor(text="<video><image><image>", videos=[clip], images=[IMAGES[1], IMAGES[2]])
    whole = {name: whole[name] for name in whole if name not in ("input_ids", "attention_mask")}
    assert got.tolist() == found.generate(input_ids=ids, **whole, **HOW).sequences.tolist()


def test_what_does_not_fit_a_cache_is_refused():
    found = model("llama")
    ids, visual = new_ids(found, "ab<image>", IMAGES[:1])
    out = found.generate(input_ids=ids, **visual, **HOW)
    cache = {cache_name(found.language_model): take_cache(dict(out))}
    held = out.sequences.shape[1] - 1
    with pytest.raises(ValueError, match=rf"the cache holds {held} positions, and there are {ids.shape[1]} ids"):
        found.generate(input_ids=ids, **visual, **cache, **HOW)
    turn, _ = new_ids(found, "<image>", IMAGES[1:2])
    whole = torch.cat([out.sequences, turn], dim=1)
    with pytest.raises(ValueError, match="image positions and there are 0 images"):
        found.generate(input_ids=whole, **cache, **HOW)
    with pytest.raises(ValueError, match="sample 0 has .* image positions, its 1 images take"):
        found.generate(input_ids=whole, **new_ids(found, "<image>", IMAGES[2:3])[1], **cache, **HOW)
    other = torch.cat([new_ids(found, "<image><image>", [IMAGES[0], IMAGES[1]])[0], turn], dim=1)
    visual = new_ids(found, "<image>" * 3, [IMAGES[0], IMAGES[1], IMAGES[1]])[1]
    with pytest.raises(ValueError, match="the cache ends within image 1 of sample 0"):
        found.generate(input_ids=other, **visual, **cache, **HOW)


def test_an_empty_cache_is_none():
    found = model("llama")
    ids, visual = new_ids(found, "ab<image>", IMAGES[:1])
    empty = {cache_name(found.language_model): DynamicCache(config=found.language_model.config)}
    wanted = found.generate(input_ids=ids, **visual, **HOW).sequences.tolist()
    assert found.generate(input_ids=ids, **visual, **empty, **HOW).sequences.tolist() == wanted
    assert tokenizer().pad_token_id not in wanted[0]
