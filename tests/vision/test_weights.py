"""The packed ViT against the models its weights come from: same features, same names back."""

from __future__ import annotations

import json
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import transformers
from einops import rearrange
from safetensors.torch import load_file, save_file
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from uhd import checkpoint
from uhd.vision import ViT, ViTConfig, config_from_hf, load_vit, patchify, to_source_state_dict, vit_from
from uhd.vision.weights import HEADS

P, SIDE = 4, 5  # patch in px and native grid: 20 px images
COMMON = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": P}
CLIP_LIKE = {**COMMON, "image_size": P * SIDE, "intermediate_size": 24}
DINO_LIKE = {**COMMON, "image_size": P * SIDE, "mlp_ratio": 2}
GRIDS = [(3, 7), (SIDE, SIDE), (7, 3), (1, 8), (3, 7), (10, 12)]


def clip(**fields) -> nn.Module:
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**{**CLIP_LIKE, **fields}))


def siglip(**fields) -> nn.Module:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**{**CLIP_LIKE, **fields}))


def siglip2(**fields) -> nn.Module:
    fields = {**COMMON, "intermediate_size": 24, "num_patches": SIDE**2, **fields}
    return transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**fields))


def dinov2(**fields) -> nn.Module:
    return transformers.Dinov2Model(transformers.Dinov2Config(**{**DINO_LIKE, **fields}))


def dinov2_registers(**fields) -> nn.Module:
    fields = {**DINO_LIKE, "num_register_tokens": 3, **fields}
    return transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**fields))


def timm_vit(**fields) -> nn.Module:
    plain = {"img_size": P * SIDE, "patch_size": P, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 1.5}
    return VisionTransformer(**{**plain, "num_classes": 7, "dynamic_img_size": True, **fields})


HF_MODELS = {
    "clip": clip,
    "clip gelu": partial(clip, hidden_act="gelu"),
    "siglip": siglip,
    "siglip headless": partial(siglip, vision_use_head=False),
    "siglip cropped": partial(siglip, image_size=P * SIDE + 3),
    "siglip2": siglip2,
    "dinov2": dinov2,
    "dinov2 no qkv bias": partial(dinov2, qkv_bias=False),
    "dinov2 giant": partial(dinov2, use_swiglu_ffn=True),
    "dinov2 no mask": partial(dinov2, use_mask_token=False),
    "dinov2 registers": dinov2_registers,
}
TIMM_MODELS = {
    "timm": timm_vit,
    "timm no class": partial(timm_vit, class_token=False, global_pool="avg", fc_norm=False),
    "timm pooled norm": partial(timm_vit, class_token=False, global_pool="avg"),
    "timm map": partial(timm_vit, class_token=False, global_pool="map", act_layer="gelu_tanh"),
    "timm registers": partial(timm_vit, reg_tokens=3, init_values=1e-5, no_embed_class=True),
    "timm embedded registers": partial(timm_vit, reg_tokens=2),
    "timm clip": partial(timm_vit, pre_norm=True, act_layer="quick_gelu", norm_layer=partial(nn.LayerNorm, eps=1e-5)),
    "timm tanh": partial(timm_vit, act_layer=partial(nn.GELU, approximate="tanh")),
    "timm no qkv bias": partial(timm_vit, qkv_bias=False, num_classes=0),
    "timm giant": partial(timm_vit, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, init_values=1e-5),
    "timm rectangular": partial(timm_vit, img_size=(P * 3, P * 8)),
    "timm no position": partial(timm_vit, pos_embed="none"),
}
MODELS = {**HF_MODELS, **TIMM_MODELS}


def randomised(build) -> nn.Module:
    """A model whose every parameter is random, norms, biases, tokens and layer scales too."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.25 + (0.5 if parameter.dim() == 1 else 0.0))
    return model


def family_of(name: str) -> str:
    return name.split()[0]


def views_of(grids: list[tuple[int, int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 3, h * P, w * P, generator=generator) for h, w in grids]


def source_features(model: nn.Module, view: Tensor, layer: int) -> Tensor:
    """(h*w, D) of one image through the source's own code and its own position resizing; -1 is its final output."""
    grid = (view.shape[2] // P, view.shape[3] // P)
    if isinstance(model, VisionTransformer):
        whole = model.forward_features(view)[0]
        if len(whole) != grid[0] * grid[1] + model.num_prefix_tokens:
            pytest.skip("this timm forgets the class token of a model without positions")
        if layer == -1:
            return whole[model.num_prefix_tokens :]
        (features,) = model.forward_intermediates(
            view, indices=[len(model.blocks) + layer], intermediates_only=True, norm=False
        )
        return features.flatten(2)[0].T
    arguments, prefix = {"pixel_values": view, "output_hidden_states": True}, 0
    if model.config.model_type == "siglip2_vision_model":
        channels_last = rearrange(view, "v c (h p) (w q) -> v (h w) (p q c)", p=P, q=P)
        mask, shapes = torch.ones(1, grid[0] * grid[1]), torch.tensor([grid])
        arguments |= {"pixel_values": channels_last, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    elif not model.config.model_type.startswith("dinov2"):
        arguments["interpolate_pos_encoding"] = True
        prefix = int(model.config.model_type == "clip_vision_model")
    else:
        prefix = 1 + getattr(model.config, "num_register_tokens", 0)
    output = model(**arguments)
    features = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
    return features[0, prefix:]


def assert_equals_source(vit: ViT, model: nn.Module, layer: int, grids: list[tuple[int, int]] = GRIDS) -> None:
    views = views_of(grids)
    with torch.no_grad():
        ours = vit(torch.cat([patchify(view, P) for view in views]), grids)
        theirs = torch.cat([source_features(model, view, layer) for view in views])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("name", MODELS)
def test_features_equal_the_source_at_any_grid(name: str, layer: int) -> None:
    model = randomised(MODELS[name])
    vit = vit_from(model, select_layer=layer)
    assert len(vit.blocks) == 4 + layer
    assert layer == -1 or isinstance(vit.norm, nn.Identity)
    assert_equals_source(vit, model, layer)
    assert vit.training is False


@pytest.mark.parametrize("name", HF_MODELS)
def test_every_hidden_state_equals_the_source(name: str) -> None:
    model = randomised(MODELS[name])
    vit, (view,) = vit_from(model, select_layer=-1), views_of([(3, 7)])
    with torch.no_grad():
        _, states = vit(patchify(view, P), [(3, 7)], hidden_states=True)
        assert len(states) == 4
        for layer, state in enumerate(states):
            torch.testing.assert_close(state, source_features(model, view, layer), rtol=1e-5, atol=1e-5)


def test_the_native_grid_without_the_interpolation_option() -> None:
    grid, (view,) = (SIDE, SIDE), views_of([(SIDE, SIDE)])
    for model in (randomised(clip), randomised(siglip), randomised(partial(timm_vit, dynamic_img_size=False))):
        vit = vit_from(model, select_layer=-1)
        with torch.no_grad():
            if isinstance(model, VisionTransformer):
                theirs = model.forward_features(view)[0, 1:]
            else:
                theirs = model(view).last_hidden_state[0, vit.config.num_prefix_tokens :]
            torch.testing.assert_close(vit(patchify(view, P), [grid]), theirs, rtol=1e-5, atol=1e-5)


def test_the_default_layer_of_every_family() -> None:
    defaults = {name: vit_from(randomised(build)).config for name, build in MODELS.items()}
    assert {name for name, config in defaults.items() if config.select_layer == -2} == {"clip", "clip gelu"}
    unnormed = {name for name, config in defaults.items() if not config.final_norm}
    assert unnormed == {"clip", "clip gelu", "timm pooled norm"}
    resize = {name: (config.interpolation, config.antialias) for name, config in defaults.items()}
    assert {name for name in resize if resize[name] == ("bicubic", False)} == {
        name for name in HF_MODELS if name not in ("siglip2", "dinov2 registers")
    }
    assert resize["siglip2"] == ("bilinear", True)
    assert all(resize[name] == ("bicubic", True) for name in [*TIMM_MODELS, "dinov2 registers"])
    assert defaults["siglip cropped"].image_size == 23
    assert defaults["siglip2"].image_size == 20
    assert defaults["timm rectangular"].image_size is None


@pytest.mark.parametrize("name", MODELS)
def test_full_depth_goes_back_to_the_exact_state_dict(name: str, tmp_path: Path) -> None:
    model = randomised(MODELS[name])
    family = family_of(name)
    if any(key.endswith("attention.attention.query.weight") for key in model.state_dict()):
        family = "dinov2-checkpoint"  # whose names earlier transformers keep
    norm = None if name == "timm pooled norm" else True
    back = to_source_state_dict(vit_from(model, select_layer=-1, final_norm=norm), family)
    source = {k: v for k, v in model.state_dict().items() if not k.startswith(HEADS[family_of(name)])}
    assert back.keys() == source.keys()
    assert all(torch.equal(back[key], source[key]) for key in source)
    save_file(back, tmp_path / "back.safetensors")  # refuses strided and shared tensors


def test_a_truncated_model_goes_back_without_its_last_block() -> None:
    model = randomised(clip)
    back = to_source_state_dict(vit_from(model), "clip")
    left = {key for key in model.state_dict() if key not in back}
    assert left == {k for k in model.state_dict() if k.startswith(("encoder.layers.2.", "post_layernorm."))}


def test_the_copy_is_a_copy_and_keeps_dtype_and_mode() -> None:
    model = randomised(dinov2).bfloat16().train()
    vit = vit_from(model)
    assert vit.training
    assert {p.dtype for p in vit.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in vit.parameters())
    before = vit.norm.weight.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(vit.norm.weight, before)
    assert not any(p.is_meta for p in vit.parameters())


@pytest.mark.parametrize("name", HF_MODELS)
def test_saved_folders_are_read_back(name: str, tmp_path: Path) -> None:
    model = randomised(MODELS[name])
    model.save_pretrained(tmp_path)
    vit = load_vit(tmp_path, select_layer=-1)
    assert_equals_source(vit, model, -1, GRIDS[:2])
    assert not vit.training


@pytest.mark.parametrize("swiglu", [False, True])
def test_dinov2_files_and_modules_have_different_names(swiglu: bool, tmp_path: Path) -> None:
    model = randomised(partial(dinov2, use_swiglu_ffn=swiglu))
    model.save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    assert any(".attention.attention.query." in key for key in files)
    back = to_source_state_dict(load_vit(tmp_path), "dinov2-checkpoint")
    assert back.keys() == files.keys() - {"embeddings.mask_token"}
    assert all(torch.equal(back[key], files[key]) for key in back)


def whole_model(kind: str) -> nn.Module:
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    if kind == "clip":
        return transformers.CLIPModel(transformers.CLIPConfig(vision_config=CLIP_LIKE, text_config=text))
    if kind == "siglip":
        return transformers.SiglipModel(transformers.SiglipConfig(vision_config=CLIP_LIKE, text_config=text))
    if kind == "dinov2":
        return transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**DINO_LIKE))
    vision = transformers.CLIPVisionConfig(**CLIP_LIKE)
    language = transformers.LlamaConfig(**{**text, "intermediate_size": 32})
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=language)
    )


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "llava"])
def test_the_vision_model_inside_a_bigger_one(kind: str, tmp_path: Path) -> None:
    model = randomised(partial(whole_model, kind))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    part = {"clip": "vision_model", "siglip": "vision_model", "dinov2": "dinov2", "llava": "model.vision_tower"}[kind]
    assert_equals_source(vit_from(model, select_layer=-1), model.get_submodule(part), -1, GRIDS[:2])
    assert_equals_source(load_vit(tmp_path / "config.json", select_layer=-1), model.get_submodule(part), -1, GRIDS[:2])


def test_only_the_tensors_needed_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_model("clip").save_pretrained(tmp_path)
    opened, real = [], checkpoint.safe_open

    @contextmanager
    def spy(*args, **kwargs):
        with real(*args, **kwargs) as file:
            yield SimpleNamespace(keys=file.keys, get_tensor=lambda name: opened.append(name) or file.get_tensor(name))

    monkeypatch.setattr(checkpoint, "safe_open", spy)
    load_vit(tmp_path)
    assert all(name.startswith("vision_model.") for name in opened)
    assert len(opened) == len(set(opened)) == 5 + 2 * 16
    assert not any("layers.2." in name or "post_layernorm" in name for name in opened)


def test_loading_in_another_dtype_and_with_old_buffers(tmp_path: Path) -> None:
    model = randomised(clip)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    old = {f"vision_model.{key}": value for key, value in state.items()}
    old["vision_model.embeddings.position_ids"] = torch.arange(26)[None]
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    vit = load_vit(tmp_path, dtype=torch.float16)
    assert {p.dtype for p in vit.parameters()} == {torch.float16}
    assert_equals_source(load_vit(tmp_path), model, -2, GRIDS[:2])


def test_settings_can_be_overridden() -> None:
    model = randomised(siglip)
    vit = vit_from(model, select_layer=-2, final_norm=True, interpolation="nearest", bucket_rule="remote")
    assert (vit.config.interpolation, vit.config.bucket_rule, len(vit.blocks)) == ("nearest", "remote", 2)
    torch.testing.assert_close(vit.norm.weight, model.post_layernorm.weight)
    assert vit_from(randomised(timm_vit), interpolation="nearest").config.antialias is False
    assert vit_from(model, antialias=True).config.antialias is True
    assert config_from_hf(model.config, select_layer=2) == vit_from(model, select_layer=2).config


class OtherStem(timm.layers.PatchEmbed):
    """Another patch embedding of the same parameters."""


BROKEN_TIMM = {
    "qk norm": (partial(timm_vit, qk_norm=True), "Left over: .*attn.q_norm"),
    "no projection bias": (partial(timm_vit, proj_bias=False), "Missing: .*attn.proj.bias"),
    "post-norm blocks": (partial(timm_vit, block_fn=timm.models.vision_transformer.ResPostBlock), "timm's Block"),
    "relu": (partial(timm_vit, act_layer=nn.ReLU), "Mlp with a GELU"),
    "swish gate order": (partial(timm_vit, mlp_layer=timm.layers.GluMlp, act_layer=nn.SiLU), "SwiGLUPacked"),
    "rms norm": (partial(timm_vit, norm_layer="rmsnorm"), "all norms must be LayerNorm"),
    "normed patches": (partial(timm_vit, embed_norm_layer=nn.LayerNorm), "Left over: patch_embed.norm.bias"),
    "another stem": (partial(timm_vit, embed_layer=OtherStem), "timm's plain PatchEmbed"),
}


@pytest.mark.parametrize("name", BROKEN_TIMM)
def test_timm_models_of_another_kind_are_refused(name: str) -> None:
    build, words = BROKEN_TIMM[name]
    with pytest.raises(ValueError, match=words):
        vit_from(build())


def test_other_models_are_sent_to_the_tower() -> None:
    convnext = timm.create_model("convnext_atto", pretrained=False, depths=(1, 1, 1, 1), dims=(4, 4, 8, 8))
    swin = transformers.SwinModel(transformers.SwinConfig(embed_dim=8, depths=[1], num_heads=[2]))
    for model, words in ((convnext, "ConvNeXt"), (swin, "got 'swin'"), (nn.Linear(2, 2), "got Linear")):
        with pytest.raises(TypeError, match=f"{words}.*VisionTower"):
            vit_from(model)


def test_weights_that_do_not_fit_raise(tmp_path: Path) -> None:
    model = randomised(siglip)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    spoilt = {k: v for k, v in state.items() if k != "post_layernorm.bias"} | {"encoder.layers.7.extra": torch.ones(1)}
    save_file(spoilt, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"Missing: post_layernorm.bias. Left over: encoder.layers.7.extra"):
        load_vit(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "image_size": 40}))
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"position_embedding.weight: the configuration asks for \(100, 16\)"):
        load_vit(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_224"}))
    with pytest.raises(TypeError, match="build a timm model with timm"):
        load_vit(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        load_vit(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        load_vit(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "build, words",
    [
        (partial(clip, hidden_act="relu"), "hidden_act must be one of .*; got 'relu'"),
        (partial(siglip2, num_patches=24), "num_patches must be a square number; got 24"),
        (partial(dinov2, image_size=(20, 24)), "image_size must be square"),
    ],
)
def test_settings_the_vit_does_not_have_raise(build, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config_from_hf(build().config)


def test_writing_needs_a_family_that_has_the_parts() -> None:
    vit = vit_from(randomised(dinov2))
    with pytest.raises(ValueError, match="family must be one of clip, .*; got 'vit'"):
        to_source_state_dict(vit, "vit")
    with pytest.raises(ValueError, match="'siglip' has no name for blocks.0.scale1"):
        to_source_state_dict(vit, "siglip")
    config = ViTConfig(patch_size=2, width=8, depth=1, heads=2, mlp_width=8)
    with pytest.raises(ValueError, match="only the default Linear stem has a name in 'clip'; got Sequential"):
        to_source_state_dict(ViT(config, stem=nn.Sequential(nn.Linear(12, 8))), "clip")
