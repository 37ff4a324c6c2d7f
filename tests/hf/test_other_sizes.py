"""Going on with other sizes than before: resolution, slices, latents, heads; and what is said of new weights."""

import pytest
import torch

import uhd
from tests.hf.test_trainer import goes_on_exactly, trainer
from tests.hf.tiny import IMAGES, WIDTH, attach, encoder
from tests.tiny import PIXELS, noise, perceiver, refuses, stirred, tiny_encoder, vit
from uhd.hf import UHDForConditionalGeneration, training
from uhd.resampler import MLPProjector, SpatialConfig, SpatialResampler
from uhd.slicing import find

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
WIDE = noise(200, 300)


def larger(visual):
    """112 px to 168 px, as docs/training.md does it."""
    visual.check_image_size = False
    visual.slicing = visual.slicing.for_vision(image_size=168, patch_size=14)


def test_training_goes_on_at_a_larger_size_and_from_its_checkpoint(tmp_path):
    torch.manual_seed(1)
    eyes = tiny_encoder(perceiver(width=WIDTH), vision=vit(image_size=112, position_grid_hw=(8, 8)))
    trainer(attach(eyes), tmp_path / "small", max_steps=2).train()
    small = tmp_path / "small/checkpoint-2"

    def make(folder):
        found = UHDForConditionalGeneration.from_pretrained(small)
        before = found.processor(images=WIDE)["grids"]
        larger(found.visual)
        after = found.processor(images=WIDE)["grids"]
        assert after.prod(1).max() > 1.5 * before.prod(1).max() > 90
        optimizer = torch.optim.AdamW(training.tune_all(found, lr=1e-2, vision_lr=1e-3))
        return trainer(found, folder, optimizers=(optimizer, None))

    _, again = goes_on_exactly(make, tmp_path / "large")
    assert again.visual.slicing.view_side == again.processor.image_processor.planner({}).view_side == 168
    assert again.visual.vision.image_size == 112  # its positions are those of 112 px, resized for every view


def test_another_size_is_refused_until_it_is_meant():
    eyes = tiny_encoder(vision=vit(image_size=112, position_grid_hw=(8, 8)))
    with pytest.raises(ValueError, match="plans for image_size=168.* check_image_size=False lets it see"):
        eyes.slicing = eyes.slicing.for_vision(image_size=168, patch_size=14)
    larger(eyes)
    assert eyes([WIDE])[0].tokens.isfinite().all()


def test_other_numbers_of_slices(tmp_path):
    found = attach(encoder())
    counts = {}
    for slices in (2, 9):
        found.visual.slicing = found.visual.slicing.replace(max_slices=slices)
        found.save_pretrained(tmp_path / str(slices))
        again = UHDForConditionalGeneration.from_pretrained(tmp_path / str(slices))
        batch = again.processor(text="<image>", images=WIDE)
        assert len(batch["grids"]) == again.visual.plan(WIDE.shape[:2]).num_views
        assert again(**batch).logits.isfinite().all()
        counts[slices] = len(batch["grids"])
    assert counts[2] <= 3 < counts[9]
    assert again.visual.note == ""  # nothing is new


class TestLatentsAndHeads:
    def test_of_a_new_compressor(self, tmp_path):
        from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

        sizes = {"image_size": 56, "patch_size": 14, "hidden_size": 32, "num_hidden_layers": 2}
        clip = CLIPVisionModel(CLIPVisionConfig(**sizes, num_attention_heads=2, intermediate_size=64))
        for part in (clip, CLIPImageProcessorPil()):
            part.save_pretrained(tmp_path)
        made = uhd.VisualEncoder.from_pretrained(tmp_path, out_dim=24, num_latents=9, num_heads=3)
        assert (made.compressor.config.num_latents, made.compressor.config.num_heads) == (9, 3)
        assert made.plan((50, 40)).num_tokens == 9
        assert made.note == "the compressor has new, UNTRAINED weights"
        words = "num_heads are those of the compressor, which is given"
        refuses(words, uhd.VisualEncoder.from_pretrained, tmp_path, compressor=perceiver(), num_heads=3)
        words = "num_latents=10 is not a square"
        refuses(words, uhd.VisualEncoder.from_pretrained, tmp_path, out_dim=24, num_latents=10)

    @pytest.mark.parametrize("kind", ["perceiver", "spatial"])
    def test_of_a_saved_encoder(self, kind, tmp_path):
        sizes = {"width": 24, "vision_width": 32, "num_heads": 2, "num_latents": 4}
        spatial = SpatialResampler(SpatialConfig(**sizes))
        eyes = stirred(tiny_encoder(perceiver() if kind == "perceiver" else spatial)).bfloat16()
        eyes.save_pretrained(tmp_path)
        more = uhd.VisualEncoder.from_pretrained(tmp_path, num_latents=9, num_heads=2)
        assert more.plan((50, 40)).num_tokens == more([noise(50, 40)])[0].tokens.shape[0] == 9
        assert more.note.startswith("the compressor has num_latents=9 (trained with 4) and must be trained again")
        new = [name for name in dict(more.named_parameters()) if name in more.note]
        kept = dict(eyes.named_parameters())
        assert new == [name for name, p in more.named_parameters() if p.shape != kept[name].shape]
        assert all(torch.equal(p, kept[name]) for name, p in more.named_parameters() if name not in new)
        assert {tensor.dtype for tensor in more.state_dict().values()} == {torch.bfloat16}
        more.save_pretrained(tmp_path / "more")
        assert uhd.VisualEncoder.from_pretrained(tmp_path / "more").note == more.note

    def test_of_a_saved_encoder_with_other_heads(self, tmp_path):
        eyes = stirred(tiny_encoder())
        eyes.save_pretrained(tmp_path)
        other = uhd.VisualEncoder.from_pretrained(tmp_path, num_heads=4)
        assert other.note == "the compressor has num_heads=4 (trained with 2) and must be trained again"
        assert not torch.allclose(other(IMAGES)[0].tokens, eyes(IMAGES)[0].tokens)
        same = uhd.VisualEncoder.from_pretrained(tmp_path, num_heads=2, num_latents=4)
        assert same.note == ""
        assert torch.equal(same(IMAGES)[0].tokens, eyes(IMAGES)[0].tokens)

    def test_of_a_compressor_without_them(self, tmp_path):
        slicing = uhd.SlicingConfig(image_size=56, tokens_per_view=None)
        tiny_encoder(MLPProjector(32, 24), slicing=slicing).save_pretrained(tmp_path)
        refuses(
            "the compressor, 'mlp', has no num_latents", uhd.VisualEncoder.from_pretrained, tmp_path, num_latents=9
        )


class TestWhatIsNewIsSaid:
    def test_newlines_of_a_slicing_that_is_set(self):
        under = {name: find(name).for_vision(image_size=56, patch_size=14) for name in ("llava-1.5", "llava-next")}
        eyes = tiny_encoder(MLPProjector(32, 24), slicing=under["llava-1.5"])
        eyes.slicing = under["llava-next"]
        eyes.slicing = under["llava-1.5"]
        eyes.slicing = under["llava-next"]
        assert eyes.note == "the learned newlines have new, UNTRAINED weights"  # once: they are kept

    def test_newlines_around_a_pretrained_vision_encoder(self):
        made = uhd.VisualEncoder.from_pretrained(
            torch.nn.Identity(),
            vision=vit(),
            compressor=MLPProjector(32, 24),
            slicing=find("llava-next").for_vision(image_size=56, patch_size=14),
            pixels=PIXELS,
        )
        assert made.note == "the learned newlines have new, UNTRAINED weights"

    def test_learned_separators(self, tmp_path):
        found = attach(encoder(schema="llava-uhd-better"))
        assert found.learned_separators is not None
        found.save_pretrained(tmp_path)
        again = UHDForConditionalGeneration.from_pretrained(tmp_path)
        assert again.visual.note == "the learned separators have new, UNTRAINED weights"
        again.visual.note = ""
        again.save_pretrained(tmp_path)
        assert UHDForConditionalGeneration.from_pretrained(tmp_path).visual.note == ""
