"""Images in, tokens and layouts out: one image or many, any part replaced, saved and loaded."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import uhd
from tests.tiny import IMAGES, PIXELS, assert_same_images, noise, refuses, tiny_encoder, vit
from uhd.demo import page_image, untrained_encoder
from uhd.pixels import PixelSettings
from uhd.resampler import MLPProjector, PerceiverConfig, PerceiverResampler, PixelShuffleProjector
from uhd.schema import SpatialSchema
from uhd.slicing import SlicingConfig
from uhd.token_files import load_tokens, save_tokens
from uhd.vision import ViT


def test_tokens_and_layout_of_every_image():
    encoder = tiny_encoder()
    encoded = encoder(IMAGES)
    for pixels, image in zip(IMAGES, encoded, strict=True):
        assert image.plan == uhd.plan(pixels.shape[:2], encoder.slicing)
        assert image.tokens.shape == (image.plan.num_visual_tokens, 24)
        assert image.layout.num_tokens == image.plan.num_tokens
        assert [view.shape for view in image.views] == [(4, 24)] * image.plan.num_views
    assert encoded[3].plan.grid == (3, 2)
    assert "".join(encoded[3].layout.symbols) == "s0,s1\ns2,s3\ns4,s5\noverview"


def test_tokens_are_those_of_the_parts_applied_by_hand():
    """A slice's tokens equal encoding that rectangle of the resized canvas by itself."""
    encoder = tiny_encoder()
    image = Image.fromarray(noise(168, 112))
    mean, std = (torch.tensor(values)[:, None, None] for values in PIXELS.mean_std())
    with torch.no_grad():
        found = encoder([image])[0]
        box = found.plan.views[3].box
        assert found.plan.canvases[0].size_hw == (168, 112)  # so that no resize is involved
        crop = torch.from_numpy(np.asarray(image)[box.top : box.bottom, box.left : box.right].copy())
        scaled = (crop.permute(2, 0, 1) / 255 - mean) / std
        patches = nn.functional.unfold(scaled[None], 14, stride=14)[0].T
        grid = found.plan.views[3].patches_hw
        want = encoder.compressor(encoder.vision(patches, [grid]), [grid])[0]
    assert torch.allclose(found.views[3], want, atol=1e-5)


def test_no_images_give_no_tokens():
    assert tiny_encoder()([]) == []


class PatchMeans(nn.Module):
    """A caller's own vision part: no ViT, no parameters, only what the protocol asks for."""

    patch_size = 14

    def forward(self, patches, grids):
        return patches.unflatten(1, (3, -1)).mean(2)


class FirstPatch(nn.Module):
    """A caller's own compressor: one token a view."""

    tokens_per_view = 1

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, features, grids):
        starts = np.cumsum([0, *(h * w for h, w in grids[:-1])])
        return features[starts][:, None] * self.scale


def test_any_part_may_be_the_callers_own(tmp_path):
    encoder = uhd.VisualEncoder(PatchMeans(), FirstPatch(), slicing="llava-uhd", pixels=PIXELS)
    image = encoder([noise(700, 400)])[0]
    assert image.tokens.shape == (image.plan.num_views, 3)
    encoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="saved with a vision of class .*PatchMeans: build that and pass vision="):
        uhd.VisualEncoder.from_pretrained(tmp_path)
    again = uhd.VisualEncoder.from_pretrained(tmp_path, vision=PatchMeans(), compressor=FirstPatch())
    assert torch.equal(again([noise(700, 400)])[0].tokens, image.tokens)


def test_a_whole_tower_goes_in():
    """A convolutional backbone has its own stride; counts follow its output grid."""
    import timm

    from uhd.vision import VisionTower

    torch.manual_seed(0)
    net = timm.create_model("test_convnext", pretrained=False, num_classes=0)
    tower = VisionTower(net, patch_size=32, out_dim=net.num_features, image_size=224)
    compressor = PerceiverResampler(PerceiverConfig(width=24, vision_width=tower.out_dim, num_heads=2, num_latents=4))
    encoder = uhd.VisualEncoder(tower, compressor, pixels=PixelSettings.from_timm(net)).eval()
    image = encoder([noise(500, 300)])[0]
    assert encoder.slicing.patch_size == 32
    assert image.tokens.shape == (image.plan.num_visual_tokens, 24)


def test_from_a_hugging_face_vision_model(tmp_path):
    """A CLIP folder brings weights, layer and normalisation; the width is the language model's."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14
    )
    model = CLIPVisionModel(config).eval()
    model.save_pretrained(tmp_path)
    refuses("preprocessor", uhd.VisualEncoder.from_pretrained, tmp_path, out_dim=24)
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    encoder = uhd.VisualEncoder.from_pretrained(tmp_path, out_dim=24)
    assert (encoder.slicing.image_size, encoder.slicing.patch_size, encoder.out_dim) == (56, 14, 24)
    assert encoder.pixels.mean_std()[0] == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    from_model = uhd.VisualEncoder.from_pretrained(model, compressor=encoder.compressor, pixels=encoder.pixels)
    with torch.no_grad():
        assert_same_images(encoder(IMAGES), from_model(IMAGES))
    assert "UNTRAINED" in encoder.note
    assert not encoder.training
    assert encoder.compressor.config.fitted_position == "interpolated"
    fitting = uhd.strategy("uhd-plus").for_vision(image_size=56, patch_size=14)
    plus = uhd.VisualEncoder.from_pretrained(tmp_path, out_dim=24, slicing=fitting)
    plus.save_pretrained(tmp_path / "plus")
    again = uhd.VisualEncoder.from_pretrained(tmp_path / "plus")
    assert again.compressor.config.fitted_position == plus.compressor.config.fitted_position == "direct"
    with torch.no_grad():
        assert_same_images(again(IMAGES), plus(IMAGES))
    with pytest.raises(ValueError, match="is not a folder; give a local one, nothing is downloaded"):
        uhd.VisualEncoder.from_pretrained("openai/clip-vit-large-patch14", out_dim=24)
    refuses("needs out_dim", uhd.VisualEncoder.from_pretrained, tmp_path)
    refuses("does not tell its mean and std", uhd.VisualEncoder.from_pretrained, model, out_dim=24)


def test_slicing_follows_the_backbone():
    encoder = tiny_encoder()
    assert encoder.slicing == SlicingConfig.preset("llava-uhd-safe").for_vision(image_size=56, patch_size=14).replace(
        tokens_per_view=4
    )
    refuses(r"for_vision\(image_size=56, patch_size=14\)", tiny_encoder, slicing="llava-uhd")
    other = tiny_encoder(slicing="minicpm-v", check_image_size=False, vision=vit(image_size=None))
    assert other.slicing.image_size == 448
    batch = uhd.SliceBatch.from_images([noise(64, 48)], [uhd.plan((64, 48), SlicingConfig(patch_size=16))])
    refuses("planned for patch_size=16, the vision encoder has 14", encoder, batch)


def test_counts_follow_the_schema_and_the_compressor():
    encoder = tiny_encoder(schema="minicpm-v-2.6", slicing=SlicingConfig(image_size=56, patch_size=14))
    image = encoder([noise(100, 60)])[0]
    assert encoder.schema == SpatialSchema.preset("minicpm-v-2.6")
    assert image.layout.num_tokens == image.plan.num_tokens
    assert image.plan.num_visual_tokens == 4 * image.plan.num_views


def test_parts_that_do_not_fit_are_named():
    refuses("width 32, the compressor takes 48", tiny_encoder, MLPProjector(48, 24))
    refuses("mean", tiny_encoder, pixels=PixelSettings())
    shuffle = tiny_encoder(
        PixelShuffleProjector(32, 24, factor=2), slicing=SlicingConfig(image_size=56, patch_size=14)
    )
    refuses("multiples of 2: plan .* factor=2", shuffle, [noise(100, 60)])

    class Half(nn.Module):
        tokens_per_view = 4

        def forward(self, features, grids):
            return features.new_zeros(len(grids), 2, 8)

    with pytest.raises(ValueError, match=r"image 0, view 0 .* the plan counts 4 tokens, the compressor gave 2"):
        tiny_encoder(Half())([noise(100, 60)])

    class Strided(PatchMeans):
        def forward(self, patches, grids):
            return super().forward(patches, grids)[::2]

    refuses("needs output_grids", uhd.VisualEncoder(Strided(), FirstPatch(), pixels=PIXELS), [noise(100, 60)])


def test_a_plan_of_another_schema_raises():
    encoder = tiny_encoder()
    other = uhd.plan((200, 300), SlicingConfig.preset("minicpm-v", image_size=56))
    with pytest.raises(ValueError, match=r"'minicpm-v' with \d+ separators, schema 'llava-uhd' has"):
        encoder(uhd.SliceBatch.from_images([noise(200, 300)], [other]))


def test_parts_keep_their_dtypes(tmp_path):
    encoder = tiny_encoder()
    encoder.vision.to(torch.bfloat16)
    encoder.save_pretrained(tmp_path)
    again = uhd.VisualEncoder.from_pretrained(tmp_path)
    assert next(again.vision.parameters()).dtype == torch.bfloat16
    assert next(again.compressor.parameters()).dtype == torch.float32
    assert again([noise(100, 60)])[0].tokens.dtype == torch.float32
    assert all(
        a.requires_grad == b.requires_grad for a, b in zip(encoder.parameters(), again.parameters(), strict=True)
    )
    encoder.to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in uhd.VisualEncoder.from_pretrained(tmp_path).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("image", ["photo.jpg", noise(4, 6), Image.new("RGB", (4, 6))], ids=["path", "array", "pil"])
def test_one_image_must_be_in_a_list(image):
    refuses("put one image into a list", tiny_encoder(), image, error=TypeError)


def test_a_missing_weight_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    encoder = tiny_encoder()
    encoder.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("compressor.query")
    save_file(weights, tmp_path / "model.safetensors")
    refuses(r"missing \['compressor.query'\]", uhd.VisualEncoder.from_pretrained, tmp_path)
    config = json.loads((tmp_path / "uhd_encoder.json").read_text())
    (tmp_path / "uhd_encoder.json").write_text(json.dumps({**config, "format": 2}))
    refuses("format 2", uhd.VisualEncoder.from_pretrained, tmp_path)


def test_token_files_round_trip(tmp_path):
    encoder = tiny_encoder()
    with torch.no_grad():
        encoded = encoder(IMAGES)
    save_tokens(tmp_path / "t.safetensors", encoded, schema=encoder.schema, note="a note")
    assert_same_images(encoded, load_tokens(tmp_path / "t.safetensors"))
    encoder.save_pretrained(tmp_path)
    refuses("not written by `uhd encode`", load_tokens, tmp_path / "model.safetensors")
    refuses("no images", save_tokens, tmp_path / "t.safetensors", [], schema=encoder.schema)


def test_the_untrained_encoder_is_the_same_every_time():
    state = torch.random.get_rng_state()
    with torch.no_grad():
        first, second, other = (untrained_encoder(seed=seed)([page_image()])[0].tokens for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.allclose(first, other)
    assert first.shape == (448, 256)
    assert torch.equal(state, torch.random.get_rng_state())


def test_integer_parameters_do_not_decide_the_dtype():
    """Quantised parts keep integer weights first; patches and features stay floating point."""

    class Quantised(PatchMeans):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)

        def forward(self, patches, grids):
            assert patches.is_floating_point()
            return super().forward(patches, grids)

    image = uhd.VisualEncoder(Quantised(), FirstPatch(), pixels=PIXELS)([noise(100, 60)])[0]
    assert image.tokens.is_floating_point()
    assert len(image.tokens.unique()) > 1


def test_a_failed_save_leaves_an_older_one_whole(tmp_path):
    encoder = tiny_encoder()
    encoder.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    encoder.vision.blocks[1].mlp.fc1.weight = encoder.vision.blocks[0].mlp.fc1.weight
    refuses("share memory cannot be saved: untie them", encoder.save_pretrained, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_stem_of_the_callers_own_is_not_rebuilt(tmp_path):
    """Also when it is a Linear: the config does not describe it."""
    vision = ViT(vit().config, stem=nn.Linear(588, 32, bias=False))
    tiny_encoder(vision=vision).save_pretrained(tmp_path)
    refuses("saved with a vision of class uhd.vision.vit.ViT", uhd.VisualEncoder.from_pretrained, tmp_path)


def test_token_files_need_their_own_schema_and_names(tmp_path):
    encoder = tiny_encoder()
    encoded = encoder(IMAGES[:2])
    with pytest.raises(ValueError, match="laid out by another schema than 'minicpm-v-2.6'"):
        save_tokens(tmp_path / "t.safetensors", encoded, schema=SpatialSchema.preset("minicpm-v-2.6"))
    with pytest.raises(ValueError, match="2 encoded images and 1 names"):
        save_tokens(tmp_path / "t.safetensors", encoded, schema=encoder.schema, names=["a"])
