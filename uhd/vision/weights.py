"""Weights of other projects' vision models, in and out of the packed `ViT`.

Per family: the default layer, whether the final norm follows it, and how the source resizes its position table, which
is what `vit_from` and `load_vit` take unless told otherwise.

| family                                     | layer | final norm                | positions           |
|--------------------------------------------|-------|---------------------------|---------------------|
| CLIP (`CLIPVisionModel`)                   | -2    | none, as LLaVA reads it   | bicubic             |
| SigLIP (`SiglipVisionModel`)               | -1    | `post_layernorm`          | bicubic             |
| SigLIP2 NaFlex (`Siglip2VisionModel`)      | -1    | `post_layernorm`          | bilinear, antialias |
| DINOv2 (`Dinov2Model`)                     | -1    | `layernorm`               | bicubic             |
| DINOv2, registers (`Dinov2WithRegisters…`) | -1    | `layernorm`               | bicubic, antialias  |
| timm (`VisionTransformer`)                 | -1    | `norm`, if the model has one | bicubic, antialias |

A layer before the last has no final norm unless `final_norm=True`. A model that holds a vision model (LLaVA) gets its
family's layer, not the one its own config names: give `select_layer`. SigLIP2 differs from its source at grids of one
column, where torch on the CPU antialiases wrongly. Fixed-size SigLIP2 checkpoints are SigLIP models to
transformers. Dropout and stochastic depth are not carried over; pooling and classification heads are no part of the
encoder (`HEADS`). The stem's input order is (c, py, px) for every family: SigLIP2 stores (py, px, c) and is permuted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .config import ViTConfig
from .vit import ViT

_INDEX = re.compile(r"(?<=blocks\.)\d+")  # the block number in our parameter names
_ANCHORS = ("embeddings.patch_embedding.weight", "embeddings.patch_embeddings.projection.weight")

_CLIP_NAMES = {
    "stem": "embeddings.patch_embedding",
    "class_token": "embeddings.class_embedding",
    "positions": "embeddings.position_embedding.weight",
    "pre_norm": "pre_layrnorm",
    "blocks.#.norm1": "encoder.layers.#.layer_norm1",
    "blocks.#.attn.qkv": tuple(f"encoder.layers.#.self_attn.{part}_proj" for part in "qkv"),
    "blocks.#.attn.proj": "encoder.layers.#.self_attn.out_proj",
    "blocks.#.norm2": "encoder.layers.#.layer_norm2",
    "blocks.#.mlp.fc1": "encoder.layers.#.mlp.fc1",
    "blocks.#.mlp.fc2": "encoder.layers.#.mlp.fc2",
    "norm": "post_layernorm",
}
_DINOV2_NAMES = {
    "stem": "embeddings.patch_embeddings.projection",
    "class_token": "embeddings.cls_token",
    "registers": "embeddings.register_tokens",
    "positions": "embeddings.position_embeddings",
    "blocks.#.norm1": "encoder.layer.#.norm1",
    "blocks.#.attn.qkv": tuple(f"encoder.layer.#.attention.{part}_proj" for part in "qkv"),
    "blocks.#.attn.proj": "encoder.layer.#.attention.o_proj",
    "blocks.#.scale1": "encoder.layer.#.layer_scale1.lambda1",
    "blocks.#.norm2": "encoder.layer.#.norm2",
    "blocks.#.mlp.fc1": "encoder.layer.#.mlp.fc1",
    "blocks.#.mlp.fc2": "encoder.layer.#.mlp.fc2",
    "blocks.#.scale2": "encoder.layer.#.layer_scale2.lambda1",
    "norm": "layernorm",
}
_DINOV2_CHECKPOINT_NAMES = {
    **_DINOV2_NAMES,
    "blocks.#.attn.qkv": tuple(f"encoder.layer.#.attention.attention.{part}" for part in ("query", "key", "value")),
    "blocks.#.attn.proj": "encoder.layer.#.attention.output.dense",
}
_TIMM_NAMES = {
    "stem": "patch_embed.proj",
    "class_token": "cls_token",
    "registers": "reg_token",
    "positions": "pos_embed",
    "pre_norm": "norm_pre",
    "blocks.#.norm1": "blocks.#.norm1",
    "blocks.#.attn.qkv": "blocks.#.attn.qkv",
    "blocks.#.attn.proj": "blocks.#.attn.proj",
    "blocks.#.scale1": "blocks.#.ls1.gamma",
    "blocks.#.norm2": "blocks.#.norm2",
    "blocks.#.mlp.fc1": "blocks.#.mlp.fc1",
    "blocks.#.mlp.fc2": "blocks.#.mlp.fc2",
    "blocks.#.scale2": "blocks.#.ls2.gamma",
    "norm": "norm",
}


@dataclass(frozen=True)
class _Family:
    names: Mapping[
        str, str | tuple[str, ...]
    ]  # our module or parameter -> the source's; several are stacked on axis 0
    heads: tuple[str, ...]  # prefixes of source names that are no part of the encoder
    swiglu_names: Mapping[str, str | tuple[str, ...]] | None = None  # what replaces `names` for a gated MLP
    stem_order: str = "conv"  # "conv": (D, C, p, p); "channels_last": (D, p*p*C)
    leading_axes: bool = True  # tokens and positions stored as (1, n, D); else class token (D,), positions (n, D)


_DINOV2_HEADS = ("embeddings.mask_token",)
_FAMILIES = {
    "clip": _Family(_CLIP_NAMES, ("embeddings.position_ids",), leading_axes=False),
    "siglip": _Family(_CLIP_NAMES, ("embeddings.position_ids", "head."), leading_axes=False),
    "siglip2": _Family(_CLIP_NAMES, ("head.",), stem_order="channels_last", leading_axes=False),
    "dinov2": _Family(
        _DINOV2_NAMES,
        _DINOV2_HEADS,
        {
            "blocks.#.mlp.fc1": ("encoder.layer.#.mlp.gate_proj", "encoder.layer.#.mlp.up_proj"),
            "blocks.#.mlp.fc2": "encoder.layer.#.mlp.down_proj",
        },
    ),
    "dinov2-checkpoint": _Family(
        _DINOV2_CHECKPOINT_NAMES,
        _DINOV2_HEADS,
        {
            "blocks.#.mlp.fc1": "encoder.layer.#.mlp.weights_in",
            "blocks.#.mlp.fc2": "encoder.layer.#.mlp.weights_out",
        },
    ),
    "timm": _Family(_TIMM_NAMES, ("head.", "fc_norm.", "attn_pool.")),
}

HEADS = {name: family.heads for name, family in _FAMILIES.items()}
"""Prefixes of what every family has outside its encoder: neither read nor written, as is a norm that is not taken."""

_HF_FAMILIES = {
    "clip_vision_model": "clip",
    "siglip_vision_model": "siglip",
    "siglip2_vision_model": "siglip2",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
}
_HF_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}


def vit_from(
    model: nn.Module,
    *,
    select_layer: int | None = None,
    final_norm: bool | None = None,
    interpolation: str | None = None,
    antialias: bool | None = None,
    bucket_rule: str | None = None,
) -> ViT:
    """Copy another project's vision model into a packed `ViT`.

    Args:
        model: a transformers CLIP, SigLIP, SigLIP2, DINOv2 or DINOv2-with-registers model, or one that holds such a
            vision model once (`CLIPModel`, LLaVA, ...); or a timm `VisionTransformer`.
        select_layer: index into the hidden states; None: the family's (module docstring). Later blocks are not copied.
        final_norm: norm the selected layer's output; None: the family's rule.
        interpolation, antialias, bucket_rule: as in `ViTConfig`; None: what the source does.

    Returns:
        A ViT with its own copy of the weights, in the source's dtype, device and training mode.

    Raises:
        TypeError: a model of another kind (`VisionTower` wraps those).
        ValueError: a setting that the ViT does not have, or parameter names that are left over or missing.
    """
    overrides = {
        "select_layer": select_layer,
        "final_norm": final_norm,
        "interpolation": interpolation,
        "antialias": antialias,
        "bucket_rule": bucket_rule,
    }
    state: Mapping[str, Tensor] = model.state_dict()
    if type(model).__module__.startswith("timm."):
        family, config = "timm", _override(config_from_timm(model), overrides)
    elif hasattr(getattr(model, "config", None), "model_type"):
        config = config_from_hf(model.config, **overrides)
        state = {name: state[full] for name, full in _strip_prefix(state).items()}
        family = _hf_family(model.config, state)
    else:
        raise TypeError(f"vit_from takes a transformers or timm model; got {type(model).__name__}. {_USE_TOWER}")
    return build_vit(config, state, lambda name: state[name].clone(), family).train(model.training)


def load_vit(
    path: str | Path,
    *,
    select_layer: int | None = None,
    final_norm: bool | None = None,
    interpolation: str | None = None,
    antialias: bool | None = None,
    bucket_rule: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> ViT:
    """Read a ViT from a local folder written by transformers, opening only the tensors it needs.

    Args:
        path: a folder with `config.json` and `model.safetensors` (or its shards and their index), or that config.json:
            CLIP, SigLIP, SigLIP2 or DINOv2, alone or inside a bigger model (`vision_model.*` in a `CLIPModel`).
        select_layer, final_norm, interpolation, antialias, bucket_rule: as in `vit_from`.
        dtype: of the weights; None keeps the file's.
        device: where the weights go.

    Returns:
        A ViT in eval mode.

    Raises:
        FileNotFoundError: no configuration or no safetensors file there; nothing is downloaded.
        TypeError, ValueError: as in `vit_from`.
    """
    from safetensors import safe_open
    from transformers import AutoConfig

    folder = Path(path)
    folder = folder.parent if folder.name == "config.json" else folder
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {folder}; load_vit reads local folders written by save_pretrained")
    if "model_type" not in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        raise TypeError(f"{folder} holds no transformers model; build a timm model with timm and give it to vit_from")
    source_config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config = config_from_hf(
        source_config,
        select_layer=select_layer,
        final_norm=final_norm,
        interpolation=interpolation,
        antialias=antialias,
        bucket_rule=bucket_rule,
    )
    files = _tensor_files(folder)
    names = _strip_prefix(files)
    with ExitStack() as stack:
        opened = {
            file: stack.enter_context(safe_open(file, framework="pt", device=str(device)))
            for file in sorted({files[full] for full in names.values()})
        }
        vit = build_vit(
            config,
            names,
            lambda name: opened[files[names[name]]].get_tensor(names[name]),
            _hf_family(source_config, names),
        )
    return vit.eval() if dtype is None else vit.eval().to(dtype)


def to_source_state_dict(vit: ViT, family: str) -> dict[str, Tensor]:
    """The weights under the source's names and shapes: the inverse of reading.

    Args:
        vit: with the default stem; a truncated one gives the blocks it has.
        family: "clip", "siglip", "siglip2", "dinov2" (module names of transformers >= 5.23), "dinov2-checkpoint" (the
            names in released DINOv2 files) or "timm". Names start at the vision model, without `vision_model.`.

    Returns:
        New dict; tensors are detached and share memory with the ViT where no reordering is needed.

    Raises:
        ValueError: an unknown family, a stem of another kind, or parameters that the family has no name for.
    """
    if family not in _FAMILIES:
        raise ValueError(f"family must be one of {', '.join(_FAMILIES)}; got {family!r}")
    if type(vit.stem) is not nn.Linear:
        raise ValueError(f"only the default Linear stem has a name in {family!r}; got {type(vit.stem).__name__}")
    state, unnamed = {}, []
    for name, tensor in vit.state_dict().items():
        sources = _source_names(name, family, vit.config)
        if not sources:
            unnamed.append(name)
            continue
        parts = tensor.detach().chunk(len(sources)) if len(sources) > 1 else [tensor.detach()]
        for source, part in zip(sources, parts, strict=True):
            state[source] = _to_source(name, part, family, vit.config).contiguous()
    if unnamed:
        raise ValueError(f"{family!r} has no name for {', '.join(unnamed)}")
    return state


def config_from_hf(config: Any, **overrides: Any) -> ViTConfig:
    """The `ViTConfig` of a transformers vision configuration, or of one that has a `vision_config`.

    Args:
        config: the configuration object.
        overrides: ViTConfig fields; None keeps the family's default.

    Raises:
        TypeError: another kind of model.
        ValueError: a setting that the ViT does not have.
    """
    config = getattr(config, "vision_config", config)
    kind = config.model_type
    if kind not in _HF_FAMILIES:
        raise TypeError(f"vision model type must be one of {', '.join(_HF_FAMILIES)}; got {kind!r}. {_USE_TOWER}")
    family = _HF_FAMILIES[kind]
    if config.hidden_act not in _HF_ACTIVATIONS:
        raise ValueError(f"hidden_act must be one of {', '.join(_HF_ACTIVATIONS)}; got {config.hidden_act!r}")
    side, patch = _hf_side(config, family), _square(config.patch_size, "patch_size")
    common = {
        "image_size": side,
        "patch_size": patch,
        "channels": config.num_channels,
        "width": config.hidden_size,
        "depth": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "eps": config.layer_norm_eps,
        "position_grid_hw": (side // patch, side // patch),
        "activation": _HF_ACTIVATIONS[config.hidden_act],
    }
    if family == "dinov2":
        return _override(ViTConfig(**{**common, **_dinov2_fields(config)}), overrides)
    common["mlp_width"] = config.intermediate_size
    if family == "clip":
        extra = {"class_token": True, "position_prefix": 1, "patch_bias": False, "pre_norm": True, "final_norm": False}
        return _override(ViTConfig(**common, **extra, select_layer=-2), overrides)
    if family == "siglip2":
        common |= {"interpolation": "bilinear", "antialias": True}
    return _override(ViTConfig(**common), overrides)


_USE_TOWER = "uhd.vision.VisionTower wraps any other backbone"


def _dinov2_fields(config: Any) -> dict[str, Any]:
    hidden = int(config.hidden_size * config.mlp_ratio)
    registers = getattr(config, "num_register_tokens", 0)
    return {
        "mlp_width": (int(hidden * 2 / 3) + 7) // 8 * 8 if config.use_swiglu_ffn else hidden,
        "class_token": True,
        "num_registers": registers,
        "position_prefix": 1,
        "qkv_bias": config.qkv_bias,
        "layer_scale": float(config.layerscale_value),
        # transformers resizes with antialias only in the model with registers
        "antialias": config.model_type == "dinov2_with_registers",
        **({"activation": "swiglu"} if config.use_swiglu_ffn else {}),
    }


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
    """The `ViTConfig` of a timm `VisionTransformer`, whose weights may be on the meta device.

    Raises:
        TypeError, ValueError: as in `vit_from`.
    """
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    if type(model) is not VisionTransformer:
        raise TypeError(
            f"of timm's models, vit_from takes VisionTransformer; got {type(model).__name__}. {_USE_TOWER}"
        )
    if type(model.patch_embed) is not PatchEmbed or not isinstance(model.patch_embed.proj, nn.Conv2d):
        raise ValueError(f"the patch embedding must be timm's plain PatchEmbed. {_USE_TOWER}")
    first, embed = model.blocks[0], model.patch_embed
    norms = [model.norm_pre, *(n for block in model.blocks for n in (block.norm1, block.norm2)), model.norm]
    norms = [norm for norm in norms if not isinstance(norm, nn.Identity)]
    if not all(isinstance(norm, nn.LayerNorm) for norm in norms) or len({norm.eps for norm in norms}) != 1:
        raise ValueError(f"all norms must be LayerNorm with one eps; got {norms}. {_USE_TOWER}")
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
    """Activation and MLP width of timm's blocks, all of which must be the plain pre-norm kind.

    Variants that carry other parameters are found by their names; these checks are for those that carry none.
    """
    from timm.layers import GluMlp, Mlp
    from timm.layers.activations import GELUTanh, QuickGELU
    from timm.models.vision_transformer import Attention, Block

    names = {QuickGELU: "quick_gelu", GELUTanh: "gelu_tanh"}
    kinds = set()
    for block in blocks:
        if type(block) is not Block or type(block.attn) is not Attention:
            raise ValueError(f"the blocks must be timm's Block with its Attention; got {block}. {_USE_TOWER}")
        act = block.mlp.act
        if type(block.mlp) is GluMlp and isinstance(act, nn.SiLU) and not block.mlp.gate_last:
            kinds.add(("swiglu", block.mlp.fc2.in_features))
        elif type(block.mlp) is Mlp and (isinstance(act, nn.GELU) or type(act) in names):
            tanh = getattr(act, "approximate", "none") == "tanh"
            kinds.add((names.get(type(act), "gelu_tanh" if tanh else "gelu"), block.mlp.fc2.in_features))
        else:
            raise ValueError(f"the MLP must be timm's Mlp with a GELU, or SwiGLUPacked; got {block.mlp}. {_USE_TOWER}")
    if len(kinds) != 1:
        raise ValueError(f"all blocks must have the same MLP; got {sorted(kinds)}. {_USE_TOWER}")
    return kinds.pop()


def _override(config: ViTConfig, overrides: Mapping[str, Any]) -> ViTConfig:
    """`config` with the values that are not None; an earlier layer drops the final norm unless that was asked for."""
    given = {name: value for name, value in overrides.items() if value is not None}
    if given.get("interpolation", config.interpolation) == "nearest":
        given.setdefault("antialias", False)
    result = replace(config, **given)
    if "final_norm" not in given and result.num_blocks < result.depth:
        result = replace(result, final_norm=False)
    return result


def _hf_family(config: Any, names: Iterable[str]) -> str:
    """The rename table for a transformers configuration; DINOv2's names in files are not those of its modules."""
    family = _HF_FAMILIES[getattr(config, "vision_config", config).model_type]
    in_file = family == "dinov2" and any(".attention.attention.query." in name for name in names)
    return "dinov2-checkpoint" if in_file else family


def _strip_prefix(names: Iterable[str]) -> dict[str, str]:
    """Names inside the vision model -> full names, for the one vision model among `names`."""
    names = list(names)
    found = [name.removesuffix(anchor) for name in names for anchor in _ANCHORS if name.endswith(anchor)]
    if len(found) != 1:
        raise ValueError(
            f"expected one vision model with a patch embedding among the weights; found {found or 'none'}"
        )
    return {name.removeprefix(found[0]): name for name in names if name.startswith(found[0])}


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Every tensor name in a folder -> the safetensors file that holds it."""
    from safetensors import safe_open

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        with safe_open(single, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), single)
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    raise FileNotFoundError(f"no model.safetensors in {folder}; save the model with save_pretrained first")


def needed_names(config: ViTConfig, family: str) -> set[str]:
    """Names of the source tensors that a ViT of this config is made of, by a family's rename table."""
    with torch.device("meta"):
        vit = ViT(config)
    return {source for name in vit.state_dict() for source in _source_names(name, family, config)}


def build_vit(config: ViTConfig, names: Iterable[str], read: Callable[[str], Tensor], family: str) -> ViT:
    """A ViT of the source tensors that `read` gives, which become its own without a copy where that can be.

    Args:
        config: the model.
        names: all that the source has for its vision model, without its prefix.
        read: tensor by name; asked for those that are needed.
        family: the rename table, a key of `HEADS`.

    Raises:
        ValueError: names that are missing, or left over: neither heads nor past the selected layer.
    """
    with torch.device("meta"):
        vit = ViT(config)
    targets = {name: tensor.shape for name, tensor in vit.state_dict().items()}
    sources = {name: _source_names(name, family, config) for name in targets}
    names, wanted = set(names), {source for found in sources.values() for source in found}
    missing = sorted(wanted - names) + [f"a name for {name}" for name, found in sources.items() if not found]
    left = sorted(name for name in names - wanted if not _is_unused(name, family, config))
    if missing or left:
        raise ValueError(
            f"the weights do not fit a {family} encoder. Missing: {', '.join(missing) or 'none'}. "
            f"Left over: {', '.join(left) or 'none'}. {_USE_TOWER}"
        )
    ours = {}
    for name, target in targets.items():
        parts = [_from_source(name, read(source), family, config) for source in sources[name]]
        ours[name] = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
        if ours[name].shape != target:
            raise ValueError(
                f"{', '.join(sources[name])}: the configuration asks for {tuple(target)} in all, "
                f"the weights have {tuple(ours[name].shape)}"
            )
    vit.load_state_dict(ours, assign=True)
    return vit


def _is_unused(name: str, family: str, config: ViTConfig) -> bool:
    """Whether a source name is a head, the norm that this layer does not take, or a block past the selected layer."""
    source = _FAMILIES[family]
    norm_skipped = not config.final_norm and name.startswith(f"{source.names['norm']}.")
    return name.startswith(source.heads) or norm_skipped or _is_beyond(name, config)


def _is_beyond(name: str, config: ViTConfig) -> bool:
    """Whether a source name belongs to a block of the model that the selected layer does not need."""
    number = re.match(r"(?:encoder\.layers?|blocks)\.(\d+)\.", name)
    return number is not None and config.num_blocks <= int(number[1]) < config.depth


def _source_names(name: str, family: str, config: ViTConfig) -> tuple[str, ...]:
    """The source parameters behind one of ours; () where the family has no such thing."""
    table = _FAMILIES[family].names
    if config.activation == "swiglu":
        table = {**table, **(_FAMILIES[family].swiglu_names or {})}
    number = _INDEX.search(name)
    template = _INDEX.sub("#", name)
    module, _, suffix = template.rpartition(".")
    if suffix in ("weight", "bias"):
        found, ending = table.get(module, ()), f".{suffix}"
    else:
        found, ending = table.get(template, ()), ""
    found = (found,) if isinstance(found, str) else found
    return tuple(f"{source.replace('#', number[0]) if number else source}{ending}" for source in found)


def _from_source(name: str, tensor: Tensor, family: str, config: ViTConfig) -> Tensor:
    """A source tensor in our shape."""
    if name == "stem.weight":
        if _FAMILIES[family].stem_order == "conv":
            return rearrange(tensor, "d c p q -> d (c p q)")
        return rearrange(tensor, "d (p q c) -> d (c p q)", p=config.patch_size, q=config.patch_size)
    if name in ("class_token", "registers", "positions"):
        return tensor.reshape(-1, tensor.shape[-1])
    return tensor


def _to_source(name: str, tensor: Tensor, family: str, config: ViTConfig) -> Tensor:
    """One of our tensors in the source's shape."""
    source, p = _FAMILIES[family], config.patch_size
    if name == "stem.weight":
        target = "d c p q" if source.stem_order == "conv" else "d (p q c)"
        return rearrange(tensor, f"d (c p q) -> {target}", p=p, q=p)
    if name in ("class_token", "registers", "positions"):
        if source.leading_axes:
            return tensor.unsqueeze(0)
        return tensor.squeeze(0) if name == "class_token" else tensor
    return tensor
