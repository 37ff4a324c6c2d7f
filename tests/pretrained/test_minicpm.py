"""MiniCPM-V 2.0, 2.5 and 2.6: folders with the released names, against timm, SigLIP and recorded resamplers."""

import json

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file

import uhd
from tests.pretrained.released import SIZES
from tests.pretrained.test_transformers import assert_equal_files
from tests.resampler.parts import cases, recorded
from tests.tiny import picture
from uhd.pretrained import minicpm, recipe
from uhd.vision import bucket_position_ids, patchify, unpatchify

TAGS = {"2.0": "minicpmv20_g8", "2.5": "minicpmv26_q16", "2.6": "minicpmv26_q16"}
VISION_WIDTH = 24  # of the recorded resamplers


def resampler_state(version):
    """A recorded resampler's weights, and its heads."""
    state, info, _ = recorded(TAGS[version])
    return state, info["num_heads"]


@timm.models.register_model
def uhd_test_so400m(pretrained=False, **settings):
    """Like vit_so400m_patch14_siglip_384, but small."""
    settings = {key: value for key, value in settings.items() if not key.startswith(("pretrained_", "cache_"))}
    shape = {"img_size": 28, "patch_size": 4, "embed_dim": VISION_WIDTH, "depth": 3, "num_heads": 3}
    return timm.models.VisionTransformer(**{**shape, "class_token": False, "global_pool": "map", **settings})


def sources(version):
    """(vision model of another library, config.json, names of vision tensors)."""
    torch.manual_seed(1)
    common = {"model_type": "minicpmv", "hidden_size": 32, "image_size": 64, "patch_size": 4, "query_num": 16}
    if version == "2.0":
        model = timm.create_model("uhd_test_so400m", num_classes=0, dynamic_img_size=True, dynamic_img_pad=True)
        model.blocks, model.attn_pool = model.blocks[:-1], torch.nn.Identity()
        config = {"vision_encoder": "uhd_test_so400m", "drop_vision_last_layer": True, "max_slice_nums": 9}
        config |= {"scale_resolution": 64, "slice_mode": True, "query_num": 64}
    else:
        sizes = {"hidden_size": VISION_WIDTH, "intermediate_size": 40, "num_hidden_layers": 3}
        sizes |= {"num_attention_heads": 3, "image_size": 280, "patch_size": 4}
        kind = {"model_type": "idefics2" if version == "2.5" else "siglip_vision_model"}
        act = {"hidden_act": "gelu_pytorch_tanh", "vision_use_head": False}
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes, **act))
        slices = {"max_slice_nums": 9, "patch_size": 4, "scale_resolution": 64, "model_type": "minicpmv"}
        config = {"vision_config": {**sizes, **kind}, "slice_config": slices, "slice_mode": True}
        config |= {"version": 2.6} if version == "2.6" else {}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval(), {**common, **config}


def folder_of(version, folder, *, preprocessor=None, drop=False):
    """A release in a folder, its language model as two tensors."""
    model, config = sources(version)
    if drop:
        model.encoder.layers, config["drop_vision_last_layer"] = model.encoder.layers[:-1], True
    resampler, _ = resampler_state(version)
    state = {f"vpm.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {f"resampler.{name}": tensor for name, tensor in resampler.items()}
    state |= {"llm.model.embed_tokens.weight": torch.ones(9, 32), "llm.lm_head.weight": torch.ones(9, 32)}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return model


@pytest.fixture
def heads(monkeypatch):
    """The recorded resamplers have narrower heads than the released ones."""
    monkeypatch.setattr(recipe, "HEAD_WIDTH", 32 // resampler_state("2.0")[1])
    assert {resampler_state(version)[1] for version in TAGS} == {resampler_state("2.0")[1]}


def features(model, version, pixels):
    """(n, D) of one view (3, h, w) as the release computes them."""
    rows, cols = pixels.shape[1] // 4, pixels.shape[2] // 4
    if version == "2.0":
        return model.forward_features(pixels[None])[0]
    ids = bucket_position_ids((rows, cols), 70, "remote")
    x = model.embeddings.patch_embedding(pixels[None]).flatten(2).transpose(1, 2)
    x = x + model.embeddings.position_embedding(ids.flatten())[None]
    return model.post_layernorm(model.encoder(x).last_hidden_state)[0]


@pytest.mark.parametrize("version", TAGS)
def test_views_equal_their_parts(version, heads, tmp_path):
    """Every view through the other library's ViT, then through a resampler that the goldens hold equal to theirs."""
    model = folder_of(version, tmp_path)
    encoder = uhd.pretrained.load(tmp_path)
    state, num_heads = resampler_state(version)
    variant = "minicpm-v-2.0" if version == "2.0" else "minicpm-v-2.6"
    resampler = uhd.resampler.PerceiverResampler.from_state_dict(state, variant=variant, num_heads=num_heads)
    # 25 rows: one of the lengths where the released buckets are off by float error
    pictures = [picture(*size) for size in (*SIZES[:6], (100, 40))]
    with torch.no_grad():
        batch = encoder.prepare(pictures)
        ours = torch.cat([item.tokens for item in encoder(batch)])
        theirs = []
        for part, grid in zip(batch.normalized(encoder.pixels).split(), batch.grids, strict=True):
            view = unpatchify(part, grid, 4)[0]
            assert torch.equal(patchify(view[None], 4), part)
            theirs.append(resampler(features(model, version, view), [grid])[0])
    torch.testing.assert_close(ours, torch.cat(theirs), atol=1e-4, rtol=1e-4)
    assert len(set(batch.grids)) > 4
    assert (25, 10) in batch.grids
    assert encoder.schema.name == f"minicpm-v-{version}"
    latents = len(state["query"])
    assert encoder.plan((112, 112)).num_visual_tokens == latents * encoder.plan((112, 112)).num_views
    assert encoder.plan((112, 112)).views[0].kind == "overview"


@pytest.mark.parametrize("version", ["2.0", "2.6"])
def test_the_recorded_resampler_comes_out_of_a_folder(version, heads, tmp_path):
    folder_of(version, tmp_path)
    module = uhd.pretrained.load(tmp_path).compressor
    with torch.no_grad():
        for x, grids, y in cases(TAGS[version]):
            torch.testing.assert_close(module(x, grids), y, atol=1e-5, rtol=0)


@pytest.mark.parametrize("version", TAGS)
def test_round_trip(version, heads, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    folder_of(version, first)
    encoder = uhd.pretrained.load(first)
    uhd.pretrained.save(encoder, second, like=first)
    assert_equal_files(first, second)
    again = uhd.pretrained.load(second)
    assert again.state_dict().keys() == encoder.state_dict().keys()
    assert (again.slicing, again.schema, again.pixels) == (encoder.slicing, encoder.schema, encoder.pixels)


def test_the_slicing_is_the_released_one(heads, tmp_path):
    """As uhd's preset of the same name has it, its goldens included; scaled here to 64 px and patches of 4."""
    folder_of("2.6", tmp_path)
    slicing = uhd.pretrained.load(tmp_path).slicing
    assert slicing == uhd.SlicingConfig.preset(
        "minicpm-v", image_size=64, patch_size=4, tokens_per_view=16, separators=slicing.separators
    )
    assert slicing.separators == uhd.SpatialSchema.preset("minicpm-v-2.6").separator_count()


def test_the_image_processor_has_the_last_word(heads, tmp_path):
    changes = {"max_slice_nums": 4, "scale_resolution": 80, "patch_size": 4, "use_image_id": False}
    changes |= {"norm_mean": [0.1, 0.2, 0.3], "norm_std": [0.4, 0.5, 0.6]}
    folder_of("2.6", tmp_path, preprocessor=changes)
    encoder = uhd.pretrained.load(tmp_path)
    assert (encoder.slicing.max_slices, encoder.slicing.image_size) == (4, 80)
    assert (encoder.pixels.mean, encoder.pixels.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert encoder.schema.image_id is None
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**changes, "slice_mode": False}))
    assert uhd.pretrained.load(tmp_path).plan((2000, 900)).grid is None
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**changes, "patch_size": 14}))
    with pytest.raises(ValueError, match="patches of 14 px, the vision encoder has 4"):
        uhd.pretrained.load(tmp_path)


def test_slicing_that_the_files_leave_out_is_the_released_one(heads, tmp_path):
    """The releases write part of it only: the rest is their code's defaults."""
    folder_of("2.5", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["slice_config"] = {"patch_size": 4, "model_type": "minicpmv"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    slicing = uhd.pretrained.load(tmp_path).slicing
    assert (slicing.image_size, slicing.max_slices) == (448, 9)


def test_a_dropped_last_block(heads, tmp_path):
    model = folder_of("2.5", tmp_path, drop=True)
    encoder = uhd.pretrained.load(tmp_path)
    assert len(encoder.vision.blocks) == 2
    view = torch.randn(3, 24, 36, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = encoder.vision(patchify(view[None], 4), [(6, 9)])
        torch.testing.assert_close(ours, features(model, "2.5", view), atol=1e-5, rtol=1e-5)


def test_the_real_backbone_of_2_0_is_known_by_name():
    """timm's model, built without weights: 27 blocks of width 1152, the last one dropped by the release."""
    names = recipe.Names({f"blocks.{n}.norm1.weight": "" for n in range(26)}, {}, {}, None)
    config = minicpm._timm_vit({"vision_encoder": "vit_so400m_patch14_siglip_384.webli"}, names)
    assert (config.depth, config.width, config.heads, config.mlp_width) == (26, 1152, 16, 4304)
    assert (config.position_grid_hw, config.antialias, config.final_norm) == ((27, 27), True, True)
    with pytest.raises(ValueError, match="does not know the vision encoder 'vit_of_mine'"):
        minicpm._timm_vit({"vision_encoder": "vit_of_mine"}, names)


def test_other_versions_are_refused(heads, tmp_path):
    folder_of("2.6", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "version": 4.5}))
    with pytest.raises(ValueError, match=r"type 'minicpmv' \(version 4.5\); known are .*minicpm-v-2.6"):
        uhd.pretrained.load(tmp_path)
    assert uhd.pretrained.load(tmp_path, family="minicpm-v-2.6").schema.name == "minicpm-v-2.6"
