"""LLaVA-UHD's two first releases: folders with the released names, CLIP inside or beside them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

import uhd
from tests.pretrained.released import SIZES
from tests.pretrained.test_transformers import assert_equal_files
from tests.resampler.parts import cases, recorded, released
from tests.tiny import picture
from uhd.pretrained import llava_uhd, recipe
from uhd.resampler import PerceiverResampler, SpatialResampler
from uhd.vision import unpatchify

CLIP = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 56,
    "patch_size": 14,
}
KINDS = {"llava-uhd-2024-03": "march2024_perceiver_g8", "llava-uhd": "v1_spatial_g12"}


def clip():
    torch.manual_seed(2)
    model = CLIPVisionModel(CLIPVisionConfig(**CLIP)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def folder_of(kind, folder, *, inside=True, **config):
    """A release whose CLIP is inside the checkpoint or in the folder "clip" beside it; the latter is always there."""
    model, (state, _, _) = clip(), recorded(KINDS[kind])
    model.save_pretrained(folder / "clip")
    tensors = {f"model.mm_projector.{name}": tensor for name, tensor in state.items()}
    if inside:
        names = model.state_dict()
        tensors |= {f"model.vision_tower.vision_tower.vision_model.{name}": x for name, x in names.items()}
    tensors |= {"model.embed_tokens.weight": torch.ones(9, 32), "lm_head.weight": torch.ones(9, 32)}
    tensors |= {"model.layers.0.mlp.up_proj.weight": torch.ones(9, 32), "model.norm.weight": torch.ones(32)}
    save_file(tensors, folder / "model.safetensors")
    settings = {"model_type": "llava_llama", "mm_vision_tower": "clip", "mm_vision_select_layer": -2, **config}
    (folder / "config.json").write_text(json.dumps(settings))
    return model


@pytest.fixture
def heads(monkeypatch):
    """The recorded compressors have other heads than the released ones."""
    monkeypatch.setattr(llava_uhd, "HEADS", recorded(KINDS["llava-uhd-2024-03"])[1]["num_heads"])
    state, info, _ = recorded(KINDS["llava-uhd"])
    monkeypatch.setattr(recipe, "HEAD_WIDTH", state["query"].shape[1] // info["num_heads"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inside", [True, False])
def test_views_equal_their_parts(kind, inside, heads, tmp_path):
    """Every view through CLIP with interpolated positions, then through the compressor at its own grid."""
    model = folder_of(kind, tmp_path, inside=inside)
    encoder = uhd.pretrained.load(tmp_path)
    compressor = released(KINDS[kind])
    batch = encoder.prepare([picture(*size) for size in SIZES[:6]])
    theirs = []
    with torch.no_grad():
        ours = torch.cat([item.tokens for item in encoder(batch)])
        for part, grid in zip(batch.normalized(encoder.pixels).split(), batch.grids, strict=True):
            view = unpatchify(part, grid, 14)
            found = model(view, output_hidden_states=True, interpolate_pos_encoding=True)
            theirs.append(compressor(found.hidden_states[-2][0, 1:], [grid])[0])
    torch.testing.assert_close(ours, torch.cat(theirs), atol=1e-4, rtol=1e-4)
    assert len(set(batch.grids)) > 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_recorded_compressor_comes_out_of_a_folder(kind, heads, tmp_path):
    folder_of(kind, tmp_path)
    module = uhd.pretrained.load(tmp_path).compressor
    with torch.no_grad():
        for x, grids, y in cases(KINDS[kind]):
            torch.testing.assert_close(module(x, grids), y, atol=1e-5, rtol=0)


def test_what_a_release_says_of_itself(heads, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    folder_of("llava-uhd", tmp_path / "a")
    folder_of("llava-uhd-2024-03", tmp_path / "b")
    later, first = uhd.pretrained.load(tmp_path / "a"), uhd.pretrained.load(tmp_path / "b")
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
def test_which_of_the_two_it_is(kind, projector, expected, heads, tmp_path):
    folder_of(kind, tmp_path, mm_projector_type=projector)
    assert type(uhd.pretrained.load(tmp_path).compressor) is expected
    assert type(uhd.pretrained.load(tmp_path, family="llava-uhd").compressor) is SpatialResampler


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inside", [True, False])
def test_round_trip(kind, inside, heads, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    folder_of(kind, first, inside=inside)
    encoder = uhd.pretrained.load(first)
    uhd.pretrained.save(encoder, second, like=first, vision_tower=first / "clip")
    assert_equal_files(first, second)
    again = uhd.pretrained.load(second, vision_tower=first / "clip")
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in encoder.state_dict().items())
    with torch.no_grad():
        encoder.compressor.query.add_(1)
        uhd.pretrained.save(encoder, tmp_path / "third", like=first)
        third = uhd.pretrained.load(tmp_path / "third", vision_tower=first / "clip")
        assert torch.equal(third.compressor.query, encoder.compressor.query)
        encoder.vision.class_token.add_(1)
        if inside:
            uhd.pretrained.save(encoder, tmp_path / "fourth", like=first)
            fourth = uhd.pretrained.load(tmp_path / "fourth", vision_tower=first / "clip")
            assert torch.equal(fourth.vision.class_token, encoder.vision.class_token)
        else:
            with pytest.raises(ValueError, match=r"is not that of .*clip any more \(embeddings.class_embedding\)"):
                uhd.pretrained.save(encoder, tmp_path / "fourth", like=first)


def test_the_clip_that_is_not_there(heads, tmp_path):
    folder_of("llava-uhd", tmp_path, inside=False, mm_vision_tower="openai/clip-vit-large-patch14-336")
    with pytest.raises(FileNotFoundError, match=r"has no CLIP in it, mm_vision_tower is 'openai/clip.*vision_tower="):
        uhd.pretrained.load(tmp_path)
    assert uhd.pretrained.load(tmp_path, vision_tower=tmp_path / "clip").vision.config.width == 24
    with pytest.raises(FileNotFoundError, match="vision_tower nowhere is no folder with a config.json"):
        uhd.pretrained.load(tmp_path, vision_tower="nowhere")
    pickled = load_file(tmp_path / "clip" / "model.safetensors")
    (tmp_path / "clip" / "model.safetensors").unlink()
    torch.save(pickled, tmp_path / "clip" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="clip has pickled weights only"):
        uhd.pretrained.load(tmp_path, vision_tower=tmp_path / "clip")
    assert uhd.pretrained.load(tmp_path, vision_tower=tmp_path / "clip", pickled=True).vision.config.width == 24
    folder_of("llava-uhd", tmp_path, mm_vision_tower="my/own-clip")
    with pytest.raises(FileNotFoundError, match="does not say what its CLIP is"):
        uhd.pretrained.load(tmp_path)
    folder_of("llava-uhd", tmp_path, mm_vision_tower="openai/clip-vit-large-patch14-336")
    with pytest.raises(ValueError, match="does not|do not fit a clip encoder"):  # known by name: 24 blocks
        uhd.pretrained.load(tmp_path)
    folder_of("llava-uhd", tmp_path, mm_vision_select_feature="cls_patch")
    with pytest.raises(ValueError, match="must be 'patch'.*got 'cls_patch'"):
        uhd.pretrained.load(tmp_path)


def test_llava_itself_in_this_layout_is_refused(heads, tmp_path):
    folder_of("llava-uhd", tmp_path)
    save_file({"model.mm_projector.0.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no model.mm_projector.query, so it is no LLaVA-UHD: convert"):
        uhd.pretrained.load(tmp_path)
