"""Each promise on language models of different kinds, built from tiny configs."""

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

import uhd
from tests.hf.tiny import EMBEDS, HOOK, IMAGES, TEXTS, attach, encoder, language_model, model, targets
from tests.tiny import noise
from uhd.hf import UHDForConditionalGeneration, UHDModel, UHDProcessor
from uhd.merge import assemble, merge_samples, separator_embeddings
from uhd.schema import layout, resolve_schema

KINDS = [*EMBEDS, *HOOK]


def by_hand(found, texts, images):
    """The same batch from the library's parts: encoded one by one, laid out, and merged into embeddings."""
    tok, embed = found.processor.tokenizer, found.get_input_embeddings()
    placeholder = tok.convert_tokens_to_ids("<image>")
    rows = [tok.encode(text, add_special_tokens=False) for text in texts]
    schema, pool, samples = found.visual.schema, iter(images), []
    separators = separator_embeddings(embed, resolve_schema(tok, schema, image_token="<image>"))
    for row in rows:
        encoded = [found.visual([next(pool)])[0] for _ in range(row.count(placeholder))]
        samples.append(
            [
                assemble(item.tokens * found.config.visual_scale, layout(item.plan, schema), separators)
                for item in encoded
            ]
        )
    merged = merge_samples(
        rows, samples, embed=embed, image_token_id=placeholder, pad_token_id=tok.pad_token_id, padding_side="left"
    )
    return merged


@pytest.mark.parametrize("kind", EMBEDS)
def test_loss_equals_embedding_by_hand(kind):
    found = model(kind)
    assert found.config.injection_mode == "embeds"
    batch = found.processor(text=TEXTS, images=IMAGES)
    hand = by_hand(found, TEXTS, IMAGES)
    positions = {} if kind == "mamba" else {"position_ids": hand.position_ids}
    with torch.no_grad():
        ours = found(**batch, labels=targets(found, batch))
        theirs = found.language_model(
            inputs_embeds=hand.inputs_embeds, attention_mask=hand.attention_mask, labels=hand.labels, **positions
        )
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(batch["attention_mask"], hand.attention_mask)
    assert (hand.labels != -100).sum() > 8


@pytest.mark.parametrize("kind", HOOK)
def test_the_hook_gives_what_the_model_makes_of_these_rows(kind):
    """By the embedding's weights: image rows are written into a longer table, and ids read them there."""
    found = model(kind)
    assert found.config.injection_mode == "hook"
    batch = found.processor(text=TEXTS, images=IMAGES)
    with torch.no_grad():
        ours = found(**batch)
        rows = torch.cat(ours.image_hidden_states)
        mask = batch["input_ids"] == found.config.image_token_id
        ids = batch["input_ids"].masked_fill(mask, found.config.fill_token_id)
        embed, lm = found.get_input_embeddings(), found.language_model
        embeds = embed(ids)
        embeds[mask] = rows
        forward = embed.forward
        embed.forward = lambda _: embeds
        try:
            theirs = lm(input_ids=ids, attention_mask=batch["attention_mask"], position_ids=position_ids(batch))
        finally:
            embed.forward = forward
        plain = lm(input_ids=ids, attention_mask=batch["attention_mask"], position_ids=position_ids(batch))
    assert torch.equal(ours.logits, theirs.logits)
    assert not torch.allclose(ours.logits, plain.logits, atol=1e-3)


def position_ids(batch):
    return (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("kind", KINDS)
def test_text_alone_is_the_bare_model_bit_by_bit(kind):
    found = model(kind)
    ids = found.processor(text=["hello, there"])["input_ids"]
    with torch.no_grad():
        assert torch.equal(found(input_ids=ids).logits, found.language_model(input_ids=ids).logits)
        mask = torch.ones_like(ids)
        ours = found(input_ids=ids, attention_mask=mask, labels=ids)
        theirs = found.language_model(input_ids=ids, attention_mask=mask, labels=ids)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_and_without_cache_and_in_a_padded_batch(kind):
    found = model(kind)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    batch = found.processor(text=TEXTS, images=IMAGES)
    cached = found.generate(**batch, **settings)
    assert torch.equal(cached, found.generate(**batch, **settings, use_cache=False))
    length = batch["input_ids"].shape[1]
    assert torch.equal(cached[:, :length], batch["input_ids"])
    single = []
    for text, images in zip(TEXTS, [IMAGES[:1], None, IMAGES[1:]], strict=True):
        single.append(found.generate(**found.processor(text=text, images=images), **settings)[0, -4:])
    assert torch.equal(cached[:, -4:], torch.stack(single))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_equals_its_samples_alone(kind, side):
    found = model(kind)
    with torch.no_grad():
        batch = found.processor(text=TEXTS, images=IMAGES, padding_side=side)
        together = found(**batch).logits
        for row, (text, images) in enumerate(zip(TEXTS, [IMAGES[:1], None, IMAGES[1:]], strict=True)):
            alone = found(**found.processor(text=text, images=images)).logits[0]
            torch.testing.assert_close(together[row][batch["attention_mask"][row].bool()], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path):
    found = model(kind)
    found.save_pretrained(tmp_path)
    batch = found.processor(text=TEXTS, images=IMAGES)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is UHDForConditionalGeneration
    assert type(processor) is UHDProcessor
    ours, theirs = processor(text=TEXTS, images=IMAGES), again.processor(text=TEXTS, images=IMAGES)
    for name in batch:
        assert torch.equal(batch[name], ours[name])
        assert torch.equal(batch[name], theirs[name])
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, found(**batch).logits)
    loaded, kept = again.config.to_dict(), found.config.to_dict()
    for name in set(kept) - {"text_config", "vision_config", "resampler_config", "architectures", "_name_or_path"}:
        assert loaded[name] == kept[name], name
    assert again.config.vision_config.to_vit() == found.config.vision_config.to_vit()
    assert again.visual.slicing == found.visual.slicing
    assert again.generation_config.eos_token_id == found.generation_config.eos_token_id


def test_auto_classes(tmp_path):
    found = model("llama")
    found.save_pretrained(tmp_path)
    assert type(AutoModelForMultimodalLM.from_pretrained(tmp_path)) is UHDForConditionalGeneration
    trunk = AutoModel.from_pretrained(tmp_path)
    assert type(trunk) is UHDModel
    batch = found.processor(text=TEXTS, images=IMAGES)
    with torch.no_grad():
        hidden = trunk(**batch).last_hidden_state
        logits = found.language_model.lm_head(hidden)
        assert torch.equal(logits, found(**batch).logits)
    fresh = AutoModelForImageTextToText.from_config(found.config)
    assert {name: value.shape for name, value in fresh.state_dict().items()} == {
        name: value.shape for name, value in found.state_dict().items()
    }
    assert all(value.isfinite().all() for value in fresh.state_dict().values())


def test_hook_and_embeds_agree_on_a_model_that_takes_both():
    torch.manual_seed(3)
    lm = language_model("gemma2")
    by_hook = attach(encoder(), lm, mode="hook")
    by_embeds = model("gemma2")
    batch = by_embeds.processor(text=TEXTS, images=IMAGES)
    with torch.no_grad():
        torch.testing.assert_close(by_hook(**batch).logits, by_embeds(**batch).logits, rtol=0, atol=0)
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(by_hook.generate(**batch, **settings), by_embeds.generate(**batch, **settings))


class TestGeneration:
    def test_images_are_encoded_once(self, monkeypatch):
        found = model("llama")
        calls = []
        encode = found.visual.encode_packed
        monkeypatch.setattr(
            found.visual, "encode_packed", lambda *args, **how: calls.append(1) or encode(*args, **how)
        )
        found.generate(**found.processor(text=TEXTS, images=IMAGES), max_new_tokens=6, num_beams=2)
        assert len(calls) == 1

    def test_without_a_cache_the_whole_prompt_is_read_again(self):
        found = model("llama")
        batch = found.processor(text=TEXTS, images=IMAGES)
        lengths = []
        embed = found.get_input_embeddings()
        handle = embed.register_forward_hook(lambda module, args, output: lengths.append(args[0].shape))
        settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        try:
            found.generate(**batch, **settings, use_cache=False)
        finally:
            handle.remove()
        length = batch["input_ids"].shape[1]
        assert lengths[-3:] == [(3, length), (3, length + 1), (3, length + 2)]

    def test_dict_output_beams_and_restored_prompt(self):
        found = model("llama")
        batch = found.processor(text=TEXTS, images=IMAGES)
        out = found.generate(
            **batch, max_new_tokens=3, num_beams=2, num_return_sequences=2, return_dict_in_generate=True
        )
        length = batch["input_ids"].shape[1]
        assert torch.equal(out.sequences[::2, :length], batch["input_ids"])
        assert torch.equal(out.sequences[1::2, :length], batch["input_ids"])

    def test_streaming(self):
        found = model("llama")
        seen = []

        class Collect:
            def put(self, value):
                seen.append(value.flatten())

            def end(self):
                seen.append(None)

        batch = found.processor(text=TEXTS[:1], images=IMAGES[:1])
        out = found.generate(**batch, max_new_tokens=4, do_sample=False, streamer=Collect())
        assert seen[-1] is None
        assert torch.equal(torch.cat(seen[1:-1]), out[0, batch["input_ids"].shape[1] :])

    def test_generation_config_is_the_models_own(self):
        found = model("llama")
        batch = found.processor(text=TEXTS[:1], images=IMAGES[:1])
        before = found.generation_config.max_new_tokens
        try:
            found.generation_config.max_new_tokens = 2
            assert found.generate(**batch, do_sample=False).shape[1] == batch["input_ids"].shape[1] + 2
        finally:
            found.generation_config.max_new_tokens = before

    def test_too_many_positions_are_refused_before_anything_runs(self):
        found = model("gpt2")
        batch = found.processor(text=[TEXTS[1], TEXTS[0]], images=IMAGES[:1])
        length, images = int(batch["attention_mask"][1].sum()), found.num_image_tokens([(100, 60)])[0]
        with pytest.raises(
            ValueError, match=f"sample 1 has {length} positions \\({images} of them images or videos\\) and 180"
        ):
            found.generate(**batch, max_new_tokens=180)
        long = found.processor(text="a" * 190 + "<image>", images=IMAGES[:1])
        with pytest.raises(ValueError, match=f"sample 0 has {190 + images} positions .* has 192"):
            found(**long)
        with pytest.raises(ValueError, match="sample 0 .* has 192"):
            found.generate(**found.processor(text="a" * 190), max_length=400)


class TestPrecomputed:
    def test_a_file_of_uhd_encode_goes_straight_in(self, tmp_path):
        found = model("llama")
        with torch.no_grad():
            uhd.save_tokens(tmp_path / "t.safetensors", found.visual(IMAGES), schema=found.visual.schema)
        loaded = uhd.load_tokens(tmp_path / "t.safetensors")
        pixels = found.processor(text=TEXTS, images=IMAGES)
        batch = found.processor(text=TEXTS, images=loaded)
        assert torch.equal(batch["input_ids"], pixels["input_ids"])
        assert "pixel_values" not in batch
        with torch.no_grad():
            want = found(**pixels).logits
            torch.testing.assert_close(found(**batch).logits, want, rtol=1e-4, atol=1e-5)
            text = {name: pixels[name] for name in ("input_ids", "attention_mask")}
            torch.testing.assert_close(found(**text, image_tokens=loaded).logits, want, rtol=1e-4, atol=1e-5)
        settings = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(found.generate(**batch, **settings), found.generate(**pixels, **settings))

    def test_the_overview_may_have_been_encoded_first(self):
        first = attach(encoder(schema=uhd.SpatialSchema(overview="first")))
        assert first.visual.slicing.overview_first
        pixels = first.processor(text=TEXTS, images=IMAGES)
        with torch.no_grad():
            batch = first.processor(text=TEXTS, images=first.visual(IMAGES))
            torch.testing.assert_close(first(**batch).logits, first(**pixels).logits, rtol=1e-4, atol=1e-5)

    def test_another_schema_is_refused(self):
        found = model("llama")
        with torch.no_grad():
            other = encoder(schema="llava-uhd-paper")(IMAGES[:1])
        batch = found.processor(text=TEXTS[:1], images=IMAGES[:1])
        with pytest.raises(ValueError, match="laid out by schema 'llava-uhd-paper', the model by 'llava-uhd'"):
            found(input_ids=batch["input_ids"], image_tokens=other)

    def test_encoded_and_plain_images_do_not_mix(self):
        found = model("llama")
        with torch.no_grad(), pytest.raises(ValueError, match="1 encoded images among 2"):
            found.processor(text="<image><image>", images=[found.visual(IMAGES[:1])[0], IMAGES[1]])

    def test_pixels_beside_tokens_are_refused_and_no_tokens_are_none(self):
        found = model("llama")
        pixels = found.processor(text=TEXTS, images=IMAGES)
        with torch.no_grad():
            encoded = found.visual(IMAGES)
            tokens = found.processor(text=TEXTS, images=encoded)
            both = r"images come as pixels or as visual tokens, got pixel_values, {}: leave one of them out"
            with pytest.raises(ValueError, match=both.format("image_tokens")):
                found(**pixels, image_tokens=encoded)
            with pytest.raises(ValueError, match=both.format("image_tokens")):
                found(**pixels, image_tokens=tokens["image_tokens"])
            with pytest.raises(
                ValueError, match="videos come as pixels or as visual tokens, got pixel_values_videos,"
            ):
                found.get_video_features(pixels["pixel_values"], video_tokens=torch.zeros(1, 1))
            assert torch.equal(found(**pixels, image_tokens=[]).logits, found(**pixels).logits)
            text = found.processor(text="a b")
            want = found(**text).logits
            assert torch.equal(found(**text, image_tokens=[], video_tokens=()).logits, want)
            with pytest.raises(ValueError, match=r"sample 0 has \d+ image positions and there are 0 images"):
                found(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], image_tokens=[])


class TestSchemas:
    @pytest.mark.parametrize("schema", ["minicpm-v-2.6", "llava-uhd-better", "llava-uhd-paper"])
    def test_numbered_images_markers_and_learned_separators(self, schema, tmp_path):
        found = attach(encoder(schema=schema))
        token = found.config.image_token
        batch = found.processor(text=[f"{token}and{token}"], images=IMAGES[:2])
        if schema == "minicpm-v-2.6":
            assert token == "<|image_pad|>"
            first, second = found(**batch).image_hidden_states
            numbers = found._separators()
            assert torch.equal(first[1], numbers["0"])
            assert torch.equal(second[1], numbers["1"])
        if schema == "llava-uhd-better":
            assert found.learned_separators.shape == (3, 32)
            found(**batch).logits.sum().backward()
            assert found.learned_separators.grad.abs().sum() > 0
        found.save_pretrained(tmp_path)
        again = UHDForConditionalGeneration.from_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(again(**batch).logits, found(**batch).logits)

    def test_more_images_than_numbers(self):
        found = attach(encoder(schema="minicpm-v-2.6"), numbered_images=1)
        token = found.config.image_token
        batch = found.processor(text=token * 2, images=[noise(20, 20), noise(20, 20)])
        with pytest.raises(ValueError, match="no embedding for the symbol '1'"):
            found(**batch)
