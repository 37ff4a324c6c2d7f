"""Compression inside the ViT: recorded outputs, transformers itself, initialisation, and what must always hold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.vision.parts import CONFIG, assert_near, compressed, lengths, make, random_patches
from uhd.grids import join_blocks
from uhd.resampler import MergeProjector
from uhd.vision import CompressedViT, ViT, compress_vit, patchify, vit_from
from uhd.vision.merging import AdaptiveCompressor, AverageCompressor, WindowCompressor

GOLDEN = Path(__file__).parent.parent / "golden" / "v4_compressor.npz"
GRIDS = [(4, 8), (8, 4), (4, 4), (2, 16), (4, 8), (12, 2)]


def golden():
    with np.load(GOLDEN) as file:
        data = {name: file[name] for name in file.files}
    state = {name[6:]: torch.tensor(x) for name, x in data.items() if name.startswith("vit/w/")}
    grids = [(int(h), int(w)) for h, w in data["target_sizes"]]
    return data, state, grids, json.loads(str(data["cfg_json"]))


def from_vision_state(state, config) -> tuple[ViT, dict[str, torch.Tensor]]:
    """A plain ViT of transformers' MiniCPM-V 4.6 vision weights, whose names but the merger's are SigLIP's."""
    import transformers

    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    sizes = {key: config[key] for key in keys}
    theirs = transformers.SiglipVisionConfig(**sizes, hidden_act="gelu_pytorch_tanh", vision_use_head=False)
    siglip = transformers.SiglipVisionModel(theirs)
    siglip.load_state_dict({name: x for name, x in state.items() if not name.startswith("vit_merger.")})
    merger = {name.removeprefix("vit_merger."): x for name, x in state.items() if name.startswith("vit_merger.")}
    return vit_from(siglip.eval(), interpolation="nearest", bucket_rule="transformers"), merger


def test_equals_the_recorded_model():
    data, state, grids, config = golden()
    vit, merger = from_vision_state(state, config)
    patches = patchify(torch.tensor(data["pixel_values"]), config["patch_size"])
    after = config["insert_layer_id"] + 1  # that counts from 0
    model = compress_vit(vit, after, weights=merger)
    module = model.compressors[str(after)]
    with torch.no_grad():
        assert_near(vit(patches, grids), torch.tensor(data["vit/y_4x"][0]))
        assert_near(model(patches, grids), torch.tensor(data["vit/y_16x"][0]))
        assert_near(module(torch.tensor(data["winmerger/x"][0]), grids), torch.tensor(data["winmerger/y"][0]))
    again = module.to_source_state_dict()
    assert set(again) == set(merger)
    assert all(torch.equal(again[name], merger[name]) for name in merger)


EIGHT = [(4, 4), (8, 8), (4, 8), (8, 4), (4, 16), (20, 4), (12, 8), (8, 24)]


def live_model(rounds: int):
    from transformers import Qwen3Config
    from transformers.models.minicpmv4_6.configuration_minicpmv4_6 import MiniCPMV4_6Config
    from transformers.models.minicpmv4_6.modeling_minicpmv4_6 import MiniCPMV4_6Model

    text = {"hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = Qwen3Config(**text, num_key_value_heads=1, vocab_size=16, head_dim=12)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 3}
    vision = {**sizes, "image_size": 56, "patch_size": 4}
    config = MiniCPMV4_6Config(
        text_config=text.to_dict(), vision_config=vision, insert_layer_id=1, merger_times=rounds
    )
    torch.manual_seed(0)
    model = MiniCPMV4_6Model(config).eval()
    for parameter in (*model.vision_tower.parameters(), *model.merger.parameters()):
        nn.init.normal_(parameter, std=0.2)
    return model, vision


@pytest.mark.parametrize("mode, rounds", [("16x", 1), ("4x", 1), ("4x", 2)])
def test_equals_transformers_minicpm_v_4_6(mode, rounds):
    """The vision tower and the merger, random weights, eight shapes in one call and one by one."""
    model, config = live_model(rounds)
    vit, merger = from_vision_state(model.vision_tower.state_dict(), config)
    projector = MergeProjector.from_state_dict(model.merger.state_dict())
    if mode == "16x":
        vit = compress_vit(vit, model.config.insert_layer_id + 1, weights=merger)
    pixels = [torch.randn(3, h * 4, w * 4, generator=torch.Generator().manual_seed(h * w + h)) for h, w in EIGHT]
    # transformers takes one strip, patch after patch
    patches = [patchify(image[None], 4) for image in pixels]
    strips = [part.view(-1, 3, 4, 4).permute(1, 2, 0, 3).flatten(2)[None] for part in patches]

    def theirs(strip, grid):  # one by one, since some releases pack views of one shape only
        (found,) = model.get_image_features(strip, torch.tensor([grid]), downsample_mode=mode).pooler_output
        return found

    def ours(parts, grids):
        return projector(vit(torch.cat(parts), grids), vit.output_grids(grids))

    with torch.no_grad():
        wanted = [theirs(strip, grid) for strip, grid in zip(strips, EIGHT, strict=True)]
        assert_near(ours(patches, EIGHT), torch.cat(wanted))
        for part, grid, alone in zip(patches, EIGHT, wanted, strict=True):
            assert_near(ours([part], [grid]), alone)


# --- initialisation from the neighbouring block


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "swiglu"])
@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_reuse_of_a_block_is_its_attention_in_windows_and_the_mean_of_its_mlp(activation, layer_scale):
    config = dataclasses.replace(CONFIG, activation=activation, layer_scale=layer_scale, qkv_bias=layer_scale is None)
    vit = make(config)
    block, module = vit.blocks[1], compress_vit(vit, 2).compressors["2"]
    x = torch.randn(24, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        windows = join_blocks(x, [(4, 6)], 2)
        attended = block.attn(block.norm1(windows.flatten(0, 1)), [(6, 4)])
        y = windows + (attended if block.scale1 is None else attended * block.scale1).unflatten(0, (6, 4))
        # the norm is over all four patches, with the block's weights repeated
        normed = nn.functional.layer_norm(y.flatten(1), (64,), eps=config.eps).unflatten(1, (4, 16))
        mixed = block.mlp(normed * block.norm2.weight + block.norm2.bias).mean(1)
        expected = y.mean(1) + (mixed if block.scale2 is None else mixed * block.scale2)
        assert_near(module(x, [(4, 6)]), expected)


def test_the_pooling_kinds_start_as_the_mean():
    x = torch.randn(24, 16, generator=torch.Generator().manual_seed(2))
    mean = nn.functional.avg_pool2d(x.T.view(1, 16, 4, 6), 2).flatten(2)[0].T
    assert_near(AverageCompressor()(x, [(4, 6)]), mean)
    module = AdaptiveCompressor(16)
    assert_near(module(x, [(4, 6)]), mean)
    module(x, [(4, 6)]).square().sum().backward()
    assert module.down.weight.grad.abs().sum() > 0  # so that training can leave the mean
    with torch.no_grad():
        module.down.weight.normal_()
    out = module(x, [(4, 6)])
    assert (out - mean).abs().max() > 1e-2
    windows = join_blocks(x, [(4, 6)], 2)
    assert (out <= windows.amax(1) + 1e-6).all()
    assert (out >= windows.amin(1) - 1e-6).all()


def test_adaptive_weights_are_a_softmax_over_the_window_for_each_channel():
    module = AdaptiveCompressor(4).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(1, 4, 4, dtype=torch.float64)
    seen = torch.cat([x, x.mean(1, keepdim=True).expand(-1, 4, -1)], dim=-1)
    weights = torch.softmax(module.down(nn.functional.gelu(module.up(seen))), dim=1)
    assert torch.allclose(module(x[0], [(2, 2)]), (weights * x).sum(1))


def test_the_given_vit_keeps_its_weights():
    vit = make().requires_grad_(False)
    vit.blocks[3].requires_grad_(True)
    model = compress_vit(vit, 2)
    assert type(model) is CompressedViT
    assert not model.training
    for name, parameter in vit.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
        assert model.get_parameter(name).requires_grad == parameter.requires_grad
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.zero_()
    assert vit.blocks[0].mlp.fc1.weight.any()
    assert all(p.dtype == torch.bfloat16 for p in compress_vit(make().bfloat16(), 2).parameters())


def test_a_stem_of_ones_own_is_copied():
    stem = nn.Sequential(nn.Linear(CONFIG.patch_dim, 8), nn.GELU(), nn.Linear(8, CONFIG.width))
    vit = ViT(CONFIG, stem=stem).eval()
    model = compress_vit(vit, 4)
    assert not model.own_stem
    assert model.stem is not stem
    patches = random_patches(GRIDS)
    with torch.no_grad():
        states = vit(patches, GRIDS, hidden_states=True)[1]
        assert_near(model(patches, GRIDS, hidden_states=True)[1][4], states[4])


def test_hidden_states_are_those_of_the_plain_vit_up_to_the_compressor():
    vit, model, patches = make(), compressed(2), random_patches(GRIDS)
    with torch.no_grad():
        plain = vit(patches, GRIDS, hidden_states=True)[1]
        features, states = model(patches, GRIDS, hidden_states=True)
        assert_near(features, model(patches, GRIDS))
    assert [len(state) for state in states] == [sum(lengths(GRIDS)) // factor for factor in (1, 1, 1, 4, 4)]
    for place in range(3):
        assert_near(states[place], plain[place])


def test_class_and_register_tokens_pass_by():
    """The blocks by hand on one view: patches are pooled on the way, the three tokens before them are not."""
    model, patches = compressed(2, "average"), random_patches([(4, 6)])
    with torch.no_grad():
        prefix = torch.cat([model.class_token + model.positions[:1], model.registers])
        x = torch.cat([prefix, model.stem(patches) + model.position_embedding((4, 6))])
        for number, block in enumerate(model.blocks, 1):
            x = block(x, [(1, len(x))])
            if number == 2:
                x = torch.cat([x[:3], join_blocks(x[3:], [(4, 6)], 2).mean(1)])
        assert_near(model(patches, [(4, 6)]), model.norm(x[3:]))


def test_after_the_last_block_the_features_are_the_compressors():
    model, patches = compressed(4), random_patches(GRIDS)
    with torch.no_grad():
        features, states = model(patches, GRIDS, hidden_states=True)
        assert_near(features, model.norm(model.compressors["4"](states[-1], GRIDS)))


def test_what_an_encoder_asks_of_it():
    model = compressed((1, 3))
    assert (model.patch_size, model.stride, model.image_size, model.out_dim) == (2, 8, 16, 16)
    with pytest.raises(ValueError, match=r"grids\[1\] is \(4, 6\); both sides must be multiples of 4: .* merge=4"):
        model(random_patches([(4, 4), (4, 6)]), [(4, 4), (4, 6)])


def test_bad_input_raises():
    vit = make()
    with pytest.raises(ValueError, match=r"ascending numbers of blocks from 1 to 4.*got \(5,\)"):
        compress_vit(vit, 5)
    for places in (0, (), (3, 2), (2, 2)):
        with pytest.raises(ValueError, match="compress_after must be ascending"):
            compress_vit(vit, places)
    with pytest.raises(ValueError, match=r"from 1 to 2, those that the selected layer needs; got \(3,\)"):
        compress_vit(make(dataclasses.replace(CONFIG, select_layer=2)), 3)
    with pytest.raises(ValueError, match="compressor must be 'window', 'average' or 'adaptive', got 'max'"):
        compress_vit(vit, 2, compressor="max")
    with pytest.raises(TypeError, match="takes a plain ViT, all places at once; got CompressedViT"):
        compress_vit(compressed(), 3)
    with pytest.raises(ValueError, match="weights are for one window compressor; got 2 of kind 'window'"):
        compress_vit(vit, (1, 2), weights={})
    with pytest.raises(ValueError, match="cannot reuse a block"):
        WindowCompressor(16, 2, 24, activation="gelu").reuse(make(dataclasses.replace(CONFIG, mlp_width=25)).blocks[0])


def test_bad_weights_are_listed():
    state = WindowCompressor(16, 2, 24, activation="gelu").to_source_state_dict()
    fewer = {name: x for name, x in state.items() if name != "pre_norm.bias"}
    with pytest.raises(ValueError, match=r"missing \['pre_norm.bias'\], unexpected \['vit_merger.act'\]"):
        compress_vit(make(), 2, weights={**fewer, "vit_merger.act": state["pre_norm.weight"]})
    with pytest.raises(ValueError, match=r"'pre_norm.bias': \(\(63,\), \(64,\)\)"):
        compress_vit(make(), 2, weights={**state, "pre_norm.bias": torch.zeros(63)})
