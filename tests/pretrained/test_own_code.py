"""LLaVA-UHD's first two releases and MiniCPM-V 2.x: folders with the released names, against what they are made of."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

import uhd
from tests.pretrained.released import SIZES, VISION, assert_equal_files, assert_same, change_json, randomise, refused
from tests.resampler.parts import cases, recorded, released
from tests.tiny import picture
from uhd.pretrained import llava_uhd, minicpm, recipe
from uhd.resampler import PerceiverResampler, SpatialResampler
from uhd.vision import bucket_position_ids, patchify, unpatchify

TAGS = {
    "llava-uhd-2024-03": "march2024_perceiver_g8",
    "llava-uhd": "v1_spatial_g12",
    "minicpm-v-2.0": "minicpmv20_g8",
    "minicpm-v-2.5": "minicpmv26_q16",
    "minicpm-v-2.6": "minicpmv26_q16",
}
LLAVA, MINICPM = list(TAGS)[:2], list(TAGS)[2:]
PLACES = [*((kind, True) for kind in TAGS), *((kind, False) for kind in LLAVA)]
"""Kinds, and whether the vision encoder is inside the checkpoint."""


@timm.models.register_model
def uhd_test_so400m(pretrained=False, **settings):
    """Like vit_so400m_patch14_siglip_384, but small."""
    settings = {key: value for key, value in settings.items() if not key.startswith(("pretrained_", "cache_"))}
    shape = {"img_size": 28, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}
    return timm.models.VisionTransformer(**{**shape, "class_token": False, "global_pool": "map", **settings})


def source(kind):
    """(vision model of another library, what its names begin with in the release, config.json)."""
    torch.manual_seed(1)
    if kind in LLAVA:
        config = {"model_type": "llava_llama", "mm_vision_tower": "clip", "mm_vision_select_layer": -2}
        model = CLIPVisionModel(CLIPVisionConfig(**VISION))
        return randomise(model), "model.vision_tower.vision_tower.vision_model.", config
    config = {"model_type": "minicpmv", "hidden_size": 32, "image_size": 64, "patch_size": 4, "slice_mode": True}
    slices = {"max_slice_nums": 9, "scale_resolution": 64}
    if kind == "minicpm-v-2.0":
        model = timm.create_model("uhd_test_so400m", num_classes=0, dynamic_img_size=True, dynamic_img_pad=True)
        model.blocks, model.attn_pool = model.blocks[:-1], torch.nn.Identity()
        config |= {"vision_encoder": "uhd_test_so400m", "drop_vision_last_layer": True, "query_num": 64, **slices}
    else:
        sizes = {**VISION, "image_size": 280, "patch_size": 4}
        act = {"hidden_act": "gelu_pytorch_tanh", "vision_use_head": False}
        model = SiglipVisionModel(SiglipVisionConfig(**sizes, **act))
        sizes["model_type"] = "idefics2" if kind == "minicpm-v-2.5" else "siglip_vision_model"
        slices |= {"patch_size": 4, "model_type": "minicpmv"}
        config |= {"vision_config": sizes, "slice_config": slices, "query_num": 16}
        config |= {"version": 2.6} if kind == "minicpm-v-2.6" else {}
    return randomise(model), "vpm.", config


@pytest.fixture
def release(monkeypatch, tmp_path):
    """Makes (folder, vision model) of a kind; the recorded compressors have other heads than the released ones."""

    def make(kind, *, inside=True, drop=False, preprocessor=None, **changes):
        compressor, info, _ = recorded(TAGS[kind])
        monkeypatch.setattr(llava_uhd, "HEADS", info["num_heads"])
        monkeypatch.setattr(recipe, "HEAD_WIDTH", compressor["query"].shape[1] // info["num_heads"])
        folder = tmp_path / kind
        folder.mkdir(exist_ok=True)
        model, prefix, config = source(kind)
        if drop:
            model.encoder.layers, config["drop_vision_last_layer"] = model.encoder.layers[:-1], True
        if kind in LLAVA:
            model.save_pretrained(folder / "clip")
            names, others = "model.mm_projector.", ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight")
            others = (*others, "model.norm.weight", "lm_head.weight")
        else:
            names, others = "resampler.", ("llm.model.embed_tokens.weight", "llm.lm_head.weight")
        tensors = {names + name: x for name, x in compressor.items()} | {name: torch.ones(9, 32) for name in others}
        if inside:
            tensors |= {prefix + name: x.contiguous() for name, x in model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        if preprocessor is not None:
            (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        return folder, model

    return make


def features(kind, model, view):
    """(n, D) of one view (3, h, w) as the release computes them."""
    if kind in LLAVA:
        return model(view[None], output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-2][0, 1:]
    if kind == "minicpm-v-2.0":
        return model.forward_features(view[None])[0]
    ids = bucket_position_ids((view.shape[1] // 4, view.shape[2] // 4), 70, "remote")
    x = model.embeddings.patch_embedding(view[None]).flatten(2).transpose(1, 2)
    x = x + model.embeddings.position_embedding(ids.flatten())[None]
    return model.post_layernorm(model.encoder(x).last_hidden_state)[0]


@pytest.mark.parametrize("kind, inside", PLACES)
def test_views_equal_their_parts(kind, inside, release):
    """Every view through the other library's ViT, then through a compressor that the goldens hold equal to theirs."""
    folder, model = release(kind, inside=inside)
    encoder, compressor = uhd.pretrained.load(folder), released(TAGS[kind])
    # 25 rows: one of the lengths where MiniCPM's released buckets are off by float error
    batch, theirs = encoder.prepare([picture(*size) for size in (*SIZES[:6], (100, 40))]), []
    patch = encoder.vision.patch_size
    with torch.no_grad():
        ours = torch.cat([item.tokens for item in encoder(batch)])
        for part, grid in zip(batch.normalized(encoder.pixels).split(), batch.grids, strict=True):
            view = unpatchify(part, grid, patch)[0]
            assert torch.equal(patchify(view[None], patch), part)
            theirs.append(compressor(features(kind, model, view), [grid])[0])
    torch.testing.assert_close(ours, torch.cat(theirs), atol=1e-4, rtol=1e-4)
    assert len(set(batch.grids)) > 4
    assert kind in LLAVA or (25, 10) in batch.grids


@pytest.mark.parametrize("kind", TAGS)
def test_the_recorded_compressor_comes_out_of_a_folder(kind, release):
    module = uhd.pretrained.load(release(kind)[0]).compressor
    with torch.no_grad():
        for x, grids, y in cases(TAGS[kind]):
            torch.testing.assert_close(module(x, grids), y, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind, inside", PLACES)
def test_round_trip(kind, inside, release, tmp_path):
    first, second = release(kind, inside=inside)[0], tmp_path / "second"
    clip = {"vision_tower": first / "clip"} if kind in LLAVA else {}
    encoder = uhd.pretrained.load(first)
    uhd.pretrained.save(encoder, second, like=first, **clip)
    assert_equal_files(first, second)
    again = uhd.pretrained.load(second, **clip)
    assert_same(encoder, again)
    assert (again.slicing, again.schema, again.pixels) == (encoder.slicing, encoder.schema, encoder.pixels)


@pytest.mark.parametrize("kind", LLAVA)
@pytest.mark.parametrize("inside", [True, False])
def test_a_trained_clip_is_written_only_where_the_checkpoint_holds_one(kind, inside, release, tmp_path):
    first = release(kind, inside=inside)[0]
    encoder = uhd.pretrained.load(first)
    with torch.no_grad():
        encoder.compressor.query.add_(1)
        uhd.pretrained.save(encoder, tmp_path / "third", like=first)
        encoder.vision.class_token.add_(1)
        third = uhd.pretrained.load(tmp_path / "third", vision_tower=first / "clip")
        assert torch.equal(third.compressor.query, encoder.compressor.query)
        if inside:
            uhd.pretrained.save(encoder, tmp_path / "fourth", like=first)
            assert_same(encoder, uhd.pretrained.load(tmp_path / "fourth", vision_tower=first / "clip"))
            return
    with pytest.raises(ValueError, match=r"is not that of .*clip any more \(embeddings.class_embedding\)"):
        uhd.pretrained.save(encoder, tmp_path / "fourth", like=first)


# --- LLaVA-UHD


def test_what_a_llava_uhd_says_of_itself(release):
    later, first = (uhd.pretrained.load(release(kind)[0]) for kind in reversed(LLAVA))
    assert later.slicing == uhd.SlicingConfig.preset("llava-uhd", image_size=56, tokens_per_view=144)
    assert (first.slicing.name, first.slicing.max_slices) == ("llava-uhd-paper", 6)
    assert (later.schema.name, first.schema.name) == ("llava-uhd", "llava-uhd-paper")
    assert later.compressor.config.aligned is False
    assert later.pixels.mean == (0.48145466, 0.4578275, 0.40821073)
    assert (first.pixels.mean, first.pixels.std) == ((0, 0, 0), (1, 1, 1))
    assert (later.note, "mixed up its slices" in first.note) == ("", True)


@pytest.mark.parametrize("kind, projector, expected", [
    ("llava-uhd-2024-03", "mlp2x_gelu", PerceiverResampler),
    ("llava-uhd-2024-03", "uhd_v1_query64", SpatialResampler),
    ("llava-uhd", "mlp2x_gelu", SpatialResampler),
])  # fmt: skip
def test_which_of_the_two_it_is(kind, projector, expected, release):
    folder = release(kind, mm_projector_type=projector)[0]
    assert type(uhd.pretrained.load(folder).compressor) is expected
    assert type(uhd.pretrained.load(folder, family="llava-uhd").compressor) is SpatialResampler


def test_the_clip_that_is_not_there(release):
    large = "openai/clip-vit-large-patch14-336"
    folder = release("llava-uhd", inside=False, mm_vision_tower=large)[0]
    clip = folder / "clip"
    refused(folder, r"has no CLIP in it, mm_vision_tower is 'openai/clip.*vision_tower=", FileNotFoundError)
    assert uhd.pretrained.load(folder, vision_tower=clip).vision.config.width == 24
    refused(folder, "vision_tower nowhere is no folder with a config.json", FileNotFoundError, vision_tower="nowhere")
    torch.save(load_file(clip / "model.safetensors"), clip / "pytorch_model.bin")
    (clip / "model.safetensors").unlink()
    refused(folder, "clip has pickled weights only", vision_tower=clip)
    assert uhd.pretrained.load(folder, vision_tower=clip, pickled=True).vision.config.width == 24
    for settings, error, match in (
        ({"mm_vision_tower": "my/own-clip"}, FileNotFoundError, "does not say what its CLIP is"),
        ({"mm_vision_tower": large}, ValueError, "does not|do not fit a clip encoder"),  # known by name: 24 blocks
        ({"mm_vision_select_feature": "cls_patch"}, ValueError, "must be 'patch'.*got 'cls_patch'"),
    ):
        release("llava-uhd", **settings)
        refused(folder, match, error)


def test_llava_itself_in_this_layout_is_refused(release):
    folder = release("llava-uhd")[0]
    save_file({"model.mm_projector.0.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    refused(folder, r"no model.mm_projector.query, so it is no LLaVA-UHD: convert")


# --- MiniCPM-V


@pytest.mark.parametrize("kind", MINICPM)
def test_what_a_minicpm_says_of_itself(kind, release):
    """Its slicing is that of uhd's preset, goldens included; scaled here to 64 px and patches of 4."""
    encoder = uhd.pretrained.load(release(kind)[0])
    assert encoder.schema.name == kind
    plan, latents = encoder.plan((112, 112)), len(recorded(TAGS[kind])[0]["query"])
    assert (plan.num_visual_tokens, plan.views[0].kind) == (latents * plan.num_views, "overview")
    separators = uhd.SpatialSchema.preset(kind).separator_count()
    sizes = {"image_size": 64, "patch_size": 4, "tokens_per_view": latents}
    assert encoder.slicing == uhd.SlicingConfig.preset("minicpm-v", separators=separators, **sizes)


def test_the_image_processor_has_the_last_word(release):
    changes = {"max_slice_nums": 4, "scale_resolution": 80, "patch_size": 4, "use_image_id": False}
    changes |= {"norm_mean": [0.1, 0.2, 0.3], "norm_std": [0.4, 0.5, 0.6]}
    folder = release("minicpm-v-2.6", preprocessor=changes)[0]
    encoder = uhd.pretrained.load(folder)
    assert (encoder.slicing.max_slices, encoder.slicing.image_size) == (4, 80)
    assert (encoder.pixels.mean, encoder.pixels.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert encoder.schema.image_id is None
    change_json(folder / "preprocessor_config.json", slice_mode=False)
    assert uhd.pretrained.load(folder).plan((2000, 900)).grid is None
    change_json(folder / "preprocessor_config.json", patch_size=14)
    refused(folder, "patches of 14 px, the vision encoder has 4")


def test_slicing_that_the_files_leave_out_is_the_released_one(release):
    """The releases write part of it only: the rest is their code's defaults."""
    folder = release("minicpm-v-2.5", slice_config={"patch_size": 4, "model_type": "minicpmv"})[0]
    slicing = uhd.pretrained.load(folder).slicing
    assert (slicing.image_size, slicing.max_slices) == (448, 9)


def test_a_dropped_last_block(release):
    folder, model = release("minicpm-v-2.5", drop=True)
    encoder = uhd.pretrained.load(folder)
    assert len(encoder.vision.blocks) == 2
    view = torch.randn(3, 24, 36, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = encoder.vision(patchify(view[None], 4), [(6, 9)])
        torch.testing.assert_close(ours, features("minicpm-v-2.5", model, view), atol=1e-5, rtol=1e-5)


def test_the_real_backbone_of_2_0_is_known_by_name():
    """timm's model, built without weights: 27 blocks of width 1152, the last one dropped by the release."""
    names = recipe.Names({f"blocks.{n}.norm1.weight": "" for n in range(26)}, {}, {}, None)
    config = minicpm._timm_vit({"vision_encoder": "vit_so400m_patch14_siglip_384.webli"}, names)
    assert (config.depth, config.width, config.heads, config.mlp_width) == (26, 1152, 16, 4304)
    assert (config.position_grid_hw, config.antialias, config.final_norm) == ((27, 27), True, True)
    with pytest.raises(ValueError, match="does not know the vision encoder 'vit_of_mine'"):
        minicpm._timm_vit({"vision_encoder": "vit_of_mine"}, names)


def test_other_versions_are_refused(release):
    folder = release("minicpm-v-2.6", version=4.5)[0]
    refused(folder, r"type 'minicpmv' \(version 4.5\); known are .*minicpm-v-2.6")
    assert uhd.pretrained.load(folder, family="minicpm-v-2.6").schema.name == "minicpm-v-2.6"
