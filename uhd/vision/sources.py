"""The `ViTConfig` of other projects' models: of a transformers configuration, or of a timm `VisionTransformer`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from .config import ViTConfig

USE_TOWER = "uhd.vision.VisionTower wraps any other backbone"

HF_FAMILIES = {
    "clip_vision_model": "clip",
    "siglip_vision_model": "siglip",
    "siglip2_vision_model": "siglip2",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
}
HF_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}


def config_from_hf(config: Any, **overrides: Any) -> ViTConfig:
    """Translate a transformers vision configuration, or one that has a `vision_config`, to a `ViTConfig`.

    `overrides` are fields of `ViTConfig`; None keeps the family's default. TypeError: another kind of model;
    ValueError: a setting that the ViT does not have.
    """
    config = getattr(config, "vision_config", config)
    kind = config.model_type
    if kind not in HF_FAMILIES:
        raise TypeError(f"vision model type must be one of {', '.join(HF_FAMILIES)}; got {kind!r}. {USE_TOWER}")
    family = HF_FAMILIES[kind]
    if config.hidden_act not in HF_ACTIVATIONS:
        raise ValueError(f"hidden_act must be one of {', '.join(HF_ACTIVATIONS)}; got {config.hidden_act!r}")
    side, patch = _hf_side(config, family), _square(config.patch_size, "patch_size")
    fields = {
        "image_size": side,
        "patch_size": patch,
        "channels": config.num_channels,
        "width": config.hidden_size,
        "depth": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "eps": config.layer_norm_eps,
        "position_grid_hw": (side // patch, side // patch),
        "activation": HF_ACTIVATIONS[config.hidden_act],
    }
    fields |= _dinov2_fields(config) if family == "dinov2" else {"mlp_width": config.intermediate_size}
    if family == "clip":
        fields |= {"class_token": True, "position_prefix": 1, "patch_bias": False, "pre_norm": True}
        fields |= {"final_norm": False, "select_layer": -2}
    if family == "siglip2":
        fields |= {"interpolation": "bilinear", "antialias": True}
    return override(ViTConfig(**fields), overrides)


def _dinov2_fields(config: Any) -> dict[str, Any]:
    hidden = int(config.hidden_size * config.mlp_ratio)
    fields = {
        "mlp_width": hidden,
        "class_token": True,
        "num_registers": getattr(config, "num_register_tokens", 0),
        "position_prefix": 1,
        "qkv_bias": config.qkv_bias,
        "layer_scale": float(config.layerscale_value),
        # transformers resizes with antialias only in the model with registers
        "antialias": config.model_type == "dinov2_with_registers",
    }
    swiglu = {"activation": "swiglu", "mlp_width": (int(hidden * 2 / 3) + 7) // 8 * 8}
    return fields | swiglu if config.use_swiglu_ffn else fields


def _hf_side(config: Any, family: str) -> int:
    """Native square side in px."""
    if family != "siglip2":
        return _square(config.image_size, "image_size")
    side = round(config.num_patches**0.5)
    if side**2 != config.num_patches:
        raise ValueError(f"num_patches must be a square number; got {config.num_patches}")
    return side * config.patch_size


def _square(size: int | Iterable[int], name: str) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"{name} must be square; got {size}")
    return sides.pop()


def config_from_timm(model: nn.Module) -> ViTConfig:
    """Read the `ViTConfig` off a timm `VisionTransformer`, which may be on the meta device; errors as `vit_from`."""
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    if type(model) is not VisionTransformer:
        raise TypeError(f"of timm's models, vit_from takes VisionTransformer; got {type(model).__name__}. {USE_TOWER}")
    if type(model.patch_embed) is not PatchEmbed or not isinstance(model.patch_embed.proj, nn.Conv2d):
        raise ValueError(f"the patch embedding must be timm's plain PatchEmbed. {USE_TOWER}")
    first, embed = model.blocks[0], model.patch_embed
    norms = [model.norm_pre, *(n for block in model.blocks for n in (block.norm1, block.norm2)), model.norm]
    norms = [norm for norm in norms if not isinstance(norm, nn.Identity)]
    if not all(isinstance(norm, nn.LayerNorm) for norm in norms) or len({norm.eps for norm in norms}) != 1:
        raise ValueError(f"all norms must be LayerNorm with one eps; got {norms}. {USE_TOWER}")
    image_hw, patch = embed.img_size, _square(embed.patch_size, "patch_size")
    activation, mlp_width = _timm_mlp(model.blocks)
    prefix = model.pos_embed is not None and not model.no_embed_class
    return ViTConfig(
        image_size=image_hw[0] if image_hw[0] == image_hw[1] else None,
        patch_size=patch,
        channels=embed.proj.in_channels,
        width=model.embed_dim,
        depth=len(model.blocks),
        heads=first.attn.num_heads,
        mlp_width=mlp_width,
        activation=activation,
        eps=first.norm1.eps,
        class_token=model.cls_token is not None,
        num_registers=model.num_reg_tokens,
        patch_bias=embed.proj.bias is not None,
        qkv_bias=first.attn.qkv.bias is not None,
        layer_scale=float(getattr(first.ls1, "init_values", 1.0)) if hasattr(first.ls1, "gamma") else None,
        pre_norm=isinstance(model.norm_pre, nn.LayerNorm),
        final_norm=isinstance(model.norm, nn.LayerNorm),
        position_grid_hw=tuple(embed.grid_size) if model.pos_embed is not None else None,
        position_prefix=model.num_prefix_tokens if prefix else 0,
        antialias=True,
    )


def _timm_mlp(blocks: Iterable[nn.Module]) -> tuple[str, int]:
    """Read activation and MLP width off timm's blocks, all of the plain pre-norm kind.

    Variants with parameters of their own fail by their names later; these checks are for those without.
    """
    from timm.layers import GluMlp, Mlp
    from timm.layers.activations import GELUTanh, QuickGELU
    from timm.models.vision_transformer import Attention, Block

    names = {QuickGELU: "quick_gelu", GELUTanh: "gelu_tanh"}
    kinds = set()
    for block in blocks:
        if type(block) is not Block or type(block.attn) is not Attention:
            raise ValueError(f"the blocks must be timm's Block with its Attention; got {block}. {USE_TOWER}")
        act = block.mlp.act
        if type(block.mlp) is GluMlp and isinstance(act, nn.SiLU) and not block.mlp.gate_last:
            kinds.add(("swiglu", block.mlp.fc2.in_features))
        elif type(block.mlp) is Mlp and (isinstance(act, nn.GELU) or type(act) in names):
            tanh = getattr(act, "approximate", "none") == "tanh"
            kinds.add((names.get(type(act), "gelu_tanh" if tanh else "gelu"), block.mlp.fc2.in_features))
        else:
            raise ValueError(f"the MLP must be timm's Mlp with a GELU, or SwiGLUPacked; got {block.mlp}. {USE_TOWER}")
    if len(kinds) != 1:
        raise ValueError(f"all blocks must have the same MLP; got {sorted(kinds)}. {USE_TOWER}")
    return kinds.pop()


def override(config: ViTConfig, overrides: Mapping[str, Any]) -> ViTConfig:
    """Change `config` by the values that are not None; an earlier layer drops the final norm unless asked for it."""
    given = {name: value for name, value in overrides.items() if value is not None}
    if given.get("interpolation", config.interpolation) == "nearest":
        given.setdefault("antialias", False)
    result = replace(config, **given)
    if "final_norm" not in given and result.num_blocks < result.depth:
        result = replace(result, final_norm=False)
    return result
