"""What is decided when eyes are attached, what is saved of it, and what is refused."""

import json
import re

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
)

import uhd
from tests.hf.tiny import IMAGES, TEXTS, WIDTH, encoder, language_model, model, tokenizer
from tests.tiny import noise
from uhd.hf import UHDConfig, UHDForConditionalGeneration, UHDProcessor, UHDVisionConfig
from uhd.pixels import PixelSettings
from uhd.resampler import MLPProjector
from uhd.slicing import SlicingConfig
from uhd.vision import ViTConfig

attach = UHDForConditionalGeneration.from_vision_and_lm


def rms(x):
    return x.detach().float().pow(2).mean().sqrt()


class TestParts:
    def test_the_parts_are_taken_as_they_are(self):
        eyes, lm, tok = encoder(), language_model("gemma2"), tokenizer()
        before = {name: value.clone() for name, value in [*eyes.state_dict().items(), *lm.state_dict().items()]}
        size, attention = len(tok), lm.config._attn_implementation
        found = attach(eyes, lm, tok)
        assert found.visual is eyes
        assert found.language_model is lm
        assert found.get_input_embeddings() is lm.get_input_embeddings()
        after = dict([*eyes.state_dict().items(), *lm.state_dict().items()])
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert len(tok) == size
        assert found.config.text_config is lm.config
        assert lm.config._attn_implementation == attention
        assert found.config.image_token_id == size == len(found.processor.tokenizer) - 2
        assert found.get_input_embeddings().weight.shape[0] == size  # not resized for the image token

    @pytest.mark.parametrize("kind", ["llama", "gemma2"])
    def test_visual_tokens_get_the_rms_of_the_embeddings(self, kind, tmp_path):
        found = model(kind)
        embeddings = rms(found.get_input_embeddings()(torch.arange(found.config.text_config.vocab_size)))
        features = found.get_image_features(**found.processor(images=IMAGES)).pooler_output
        raw, tokens = [], []
        for rows, item in zip(features, found.visual(IMAGES), strict=True):
            raw.append(item.tokens)
            tokens += [rows[slice(*item.layout.span(view.index))] for view in item.plan.views]
        raw, tokens = torch.cat(raw), torch.cat(tokens)
        assert 0.8 < rms(tokens) / embeddings < 1.25
        torch.testing.assert_close(tokens, raw * found.config.visual_scale, rtol=1e-4, atol=1e-5)
        found.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["visual_scale"] == found.config.visual_scale
        off = attach(encoder(), language_model(kind), tokenizer(), match_scale=False)
        assert off.config.visual_scale == 1.0

    def test_separators_are_the_language_models_own(self):
        found = model("gemma2")
        comma, newline = (found.processor.tokenizer.convert_tokens_to_ids(piece) for piece in (",", "Ċ"))
        assert found.config.separator_ids == {",": [comma], "\n": [newline]}
        batch = found.processor(text="<image>", images=noise(56, 112))
        [rows] = found(**batch).image_hidden_states
        embedded = found.get_input_embeddings()(torch.tensor([comma, newline]))
        assert torch.equal(rows[4], embedded[0])  # "," after the first slice of 4 tokens
        assert torch.equal(rows[9], embedded[1])

    def test_separators_may_be_chosen(self, tmp_path):
        found = attach(encoder(), language_model("llama"), tokenizer(), separator_ids={",": [7, 9]})
        assert found.config.separator_ids[","] == [7, 9]
        found.save_pretrained(tmp_path)
        again = UHDForConditionalGeneration.from_pretrained(tmp_path)
        weight = again.get_input_embeddings().weight
        torch.testing.assert_close(again._separators()[","], weight[[7, 9]].mean(0))

    def test_an_image_token_in_the_vocabulary_is_used(self):
        core = tokenizer().backend_tokenizer.to_str()
        from tokenizers import Tokenizer

        tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(core), pad_token="<pad>", eos_token="</s>")
        tok.add_special_tokens({"extra_special_tokens": ["<im>"]})
        lm = language_model("llama")
        lm.resize_token_embeddings(len(tok))
        found = attach(encoder(), lm, tok, image_token="<im>")
        assert found.config.image_token_id == tok.convert_tokens_to_ids("<im>") < lm.config.vocab_size
        batch = found.processor(text="a<im>b", images=IMAGES[0])
        assert found(**batch).logits.isfinite().all()

    def test_a_quantised_encoder_works_and_is_not_saved(self, tmp_path):
        found = attach(encoder().requires_grad_(False), language_model("llama"), tokenizer())
        batch = found.processor(text=TEXTS, images=IMAGES)
        wanted = found(**batch).logits
        found.visual.quantize()
        torch.testing.assert_close(found(**batch).logits, wanted, rtol=0, atol=0.1 * wanted.abs().max().item())
        with pytest.raises(ValueError, match=r"save it before encoder.quantize"):
            found.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())

    def test_a_part_of_the_callers_own_works_and_is_not_saved(self, tmp_path):
        class Means(nn.Module):
            patch_size, out_dim = 14, 3

            def forward(self, patches, grids):
                return patches.unflatten(1, (3, -1)).mean(2)

        pixels = PixelSettings(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        slicing = SlicingConfig(image_size=56, patch_size=14, tokens_per_view=None)
        eyes = uhd.VisualEncoder(Means(), MLPProjector(3, WIDTH), slicing=slicing, pixels=pixels)
        with pytest.raises(ValueError, match="the vision is a Means, which uhd cannot build again: register"):
            attach(eyes, language_model("llama"), tokenizer())
        found = attach(eyes, language_model("llama"), tokenizer(), unsaved=True)
        assert found(**found.processor(text=TEXTS, images=IMAGES)).logits.isfinite().all()
        with pytest.raises(ValueError, match="the vision is a Means, which uhd cannot build again"):
            found.save_pretrained(tmp_path)

    def test_dtypes_of_both_sides_are_kept(self, tmp_path):
        lm = AutoModelForCausalLM.from_config(language_model("llama").config, dtype=torch.bfloat16)
        found = attach(encoder(), lm, tokenizer())
        batch = found.processor(text=TEXTS, images=IMAGES)
        with torch.no_grad():
            logits = found(**batch).logits
        assert logits.dtype == torch.bfloat16
        found.save_pretrained(tmp_path)
        again = UHDForConditionalGeneration.from_pretrained(tmp_path)
        assert next(again.visual.parameters()).dtype == torch.float32
        assert again.language_model.dtype == torch.bfloat16
        with torch.no_grad():
            assert torch.equal(again(**batch).logits, logits)
        half = UHDForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        with torch.no_grad():
            assert half(**batch).logits.dtype == torch.bfloat16  # the resampler's table is of that dtype as well


class TestRefused:
    def test_parts_that_do_not_fit(self):
        lm, tok = language_model("llama"), tokenizer()
        with pytest.raises(ValueError, match="tokens of width 64, the language model embeds in 32"):
            attach(encoder(width=64), lm, tok)
        with pytest.raises(TypeError, match=r"must be a uhd\.VisualEncoder, got ViT"):
            attach(encoder().vision, lm, tok)
        with pytest.raises(TypeError, match="must be a transformers PreTrainedModel, got Linear"):
            attach(encoder(), nn.Linear(2, 2), tok)
        bert = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
        with pytest.raises(ValueError, match="BertModel is not a causal language model"):
            attach(encoder(), bert, tok)
        with pytest.raises(ValueError, match="pads with id 259 .* embeds 100 ids"):
            attach(
                encoder(), language_model("llama", vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=1), tok
            )
        with pytest.raises(ValueError, match=re.escape("the separator ',' has the ids (999,), the language model")):
            attach(encoder(), lm, tok, separator_ids={",": 999})
        with pytest.raises(ValueError, match="the schema writes '<image>' itself"):
            attach(encoder(schema="minicpm-v-2.6"), lm, tok, image_token="<image>")

    def test_scales_that_cannot_be_matched(self):
        eyes = encoder()
        nn.init.zeros_(eyes.compressor.proj)
        with pytest.raises(ValueError, match=r"that of the encoder's tokens 0\.0: their scales cannot be matched"):
            attach(eyes, language_model("llama"), tokenizer())

    def test_a_config_of_another_version(self, tmp_path):
        model("llama").save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "uhd_format": 2}))
        for load in (AutoConfig, AutoModelForImageTextToText):
            with pytest.raises(ValueError, match="has uhd_format 2, this version of uhd reads and writes 1"):
                load.from_pretrained(tmp_path)

    def test_a_model_without_processor(self):
        fresh = UHDForConditionalGeneration(model("llama").config.__class__(**model("llama").config.to_dict()))
        with pytest.raises(ValueError, match="has no processor"):
            fresh.processor  # noqa: B018

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda b: b.pop("pixel_values"), "sample 0 has 24 image positions and there are 0 images"),
            (lambda b: b.pop("grids"), "images need grids: pass everything"),
            (lambda b: b.pop("num_patches"), "images need num_patches"),
            (lambda b: [b.pop("image_plans"), b.pop("image_sizes")], r"images need image_plans \(or image_sizes\)"),
            (
                lambda b: b.update(input_ids=b["input_ids"].masked_fill(b["input_ids"] > 259, 5)),
                "the batch has 3 images, its samples' image positions .* take 0 of them",
            ),
            (
                lambda b: b.update(input_ids=b["input_ids"][:, :-2]),
                "sample 0 has 22 image positions, its 1 images take 24",
            ),
            (
                lambda b: b.update(num_patches=b["num_patches"] + 1),
                "plans have .* views, num_patches says",
            ),
            (lambda b: b.update(grids=b["grids"].flip(0)), "or their rows and columns differ"),
        ],
    )
    def test_images_and_prompts_that_do_not_match(self, change, message):
        batch = dict(model("llama").processor(text=TEXTS, images=IMAGES, padding_side="left"))
        count = model("llama").num_image_tokens([image.shape[:2] for image in IMAGES])
        change(batch)
        batch.pop("attention_mask")
        message = message.replace("24", str(count[0])).replace("22", str(count[0] - 1))
        with pytest.raises(ValueError, match=message):
            model("llama")(**batch)

    @pytest.mark.parametrize(
        ("kind", "message"),
        [("llama", "embeds 260 ids and not the image token 260.* or resize"), ("gemma3n_text", "reads the ids")],
    )
    def test_images_have_no_place_among_some_embeddings(self, kind, message):
        found = model(kind)
        batch = dict(found.processor(text=TEXTS, images=IMAGES))
        embeds = found.get_input_embeddings()(torch.tensor([[1, 2]]))
        if kind == "llama":
            want = found.language_model(inputs_embeds=embeds).logits
            assert torch.equal(found(inputs_embeds=embeds).logits, want)
        batch.pop("input_ids")
        with pytest.raises(ValueError, match=message):
            found(inputs_embeds=embeds, **batch)


class TestConfig:
    def test_vision_fields_are_those_of_the_vit(self):
        config = ViTConfig(patch_size=7, width=8, depth=3, heads=2, mlp_width=9, position_grid_hw=(2, 3))
        found = UHDVisionConfig.from_vit(config)
        assert found.to_vit() == config
        assert (found.hidden_size, found.num_hidden_layers) == (8, 3)

    def test_defaults_build(self):
        config = UHDConfig()
        assert config.resampler_config.settings["width"] == config.text_config.hidden_size
        assert config.slicing.image_size == 336
        assert UHDConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()

    def test_positions_of_many_kinds(self):
        assert model("gpt2").config.max_positions == 192
        assert model("mamba").config.max_positions is None

    def test_resizing_the_vocabulary(self, tmp_path):
        found = attach(encoder(), language_model("llama"), tokenizer())
        found.resize_token_embeddings(300)
        assert found.config.text_config.vocab_size == found.language_model.config.vocab_size == 300
        batch = found.processor(text=TEXTS, images=IMAGES)
        assert found(**batch).logits.shape[-1] == 300
        found.save_pretrained(tmp_path)
        again = UHDForConditionalGeneration.from_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(again(**batch).logits, found(**batch).logits)

    def test_attention_of_the_language_model_is_passed_on(self, tmp_path):
        found = attach(encoder(), language_model("llama"), tokenizer())
        batch = found.processor(text=TEXTS, images=IMAGES)
        found.save_pretrained(tmp_path)
        with torch.no_grad():
            want, real = found(**batch).logits, batch["attention_mask"].bool()
            for how in ("eager", {"text_config": "eager"}):
                again = UHDForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=how)
                assert again.language_model.config._attn_implementation == "eager"
                torch.testing.assert_close(again(**batch).logits[real], want[real], rtol=1e-3, atol=1e-4)
            again.set_attn_implementation({"text_config": "sdpa"})
            assert again.language_model.config._attn_implementation == "sdpa"
            assert torch.equal(again(**batch).logits, want)


class TestLiveEncoder:
    """What is set on the encoder inside a model is what is planned with and saved."""

    def fresh(self):
        return attach(encoder(), language_model("llama"), tokenizer())

    def test_a_slicing_pixels_and_a_note_set_later_are_saved(self, tmp_path):
        found = self.fresh()
        before = found.processor(text="<image>", images=IMAGES[1])["num_patches"].tolist()
        found.visual.slicing = found.visual.slicing.replace(max_slices=2)
        found.visual.pixels = found.visual.pixels.replace(backend="fast", background=(0, 9, 0))
        found.visual.note = "set later"
        batch = found.processor(text="<image>", images=IMAGES[1])
        assert batch["num_patches"].tolist() < before
        assert len(found.get_image_features(**batch).pooler_output[0]) == batch["input_ids"].shape[1]
        found.save_pretrained(tmp_path)
        again = UHDForConditionalGeneration.from_pretrained(tmp_path)
        assert again.visual.slicing == found.visual.slicing
        assert again.visual.pixels == found.visual.pixels
        assert again.visual.note == "set later"
        for processor in (again.processor, UHDProcessor.from_pretrained(tmp_path)):
            assert processor.image_processor.pixel_backend == "fast"
            assert tuple(processor.image_processor.background) == (0, 9, 0)
            for name, value in processor(text="<image>", images=IMAGES[1]).items():
                assert torch.equal(value, batch[name]), name

    def test_what_is_set_on_the_processor_stays_until_the_encoder_changes(self):
        found = self.fresh()
        found.processor.image_processor.background = (0, 0, 0)
        assert tuple(found.processor.image_processor.background) == (0, 0, 0)
        found.visual.pixels = found.visual.pixels.replace(background=(1, 2, 3))
        assert tuple(found.processor.image_processor.background) == (1, 2, 3)

    def test_a_schema_set_later_moves_the_counts(self, tmp_path):
        found = self.fresh().visual
        plain = found.plan((100, 60)).num_tokens
        found.schema = "llava-uhd-paper"
        assert found.plan((100, 60)).num_tokens < plain
        assert found.forward([IMAGES[0]])[0].layout.num_tokens == found.plan((100, 60)).num_tokens
        found.save_pretrained(tmp_path)
        assert uhd.VisualEncoder.from_pretrained(tmp_path).schema == found.schema

    def test_what_does_not_fit_is_refused_and_changes_nothing(self):
        found = self.fresh().visual
        before = found.slicing, found.schema, found.pixels
        with pytest.raises(ValueError, match="plans for image_size=336"):
            found.slicing = "llava-uhd-safe"
        with pytest.raises(TypeError, match="pixels must be PixelSettings"):
            found.pixels = {"mean": 0.5}
        assert (found.slicing, found.schema, found.pixels) == before

    def test_another_strategy_brings_its_own_layout(self):
        found = self.fresh().visual
        found.slicing = uhd.strategy("internvl").for_vision(image_size=56, patch_size=14)
        assert not found.slicing.uses_schema
        assert found.schema.separators == ()
        [encoded] = found([IMAGES[0]])
        assert len(encoded.tokens) == found.plan((100, 60)).num_tokens
