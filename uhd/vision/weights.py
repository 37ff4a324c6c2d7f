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

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uhd.checkpoint import Checkpoint, transformers_config
from uhd.pixels import reorder

from .config import ViTConfig
from .sources import HF_FAMILIES, USE_TOWER, config_from_hf, config_from_timm, override
from .vit import ViT

_INDEX = re.compile(r"(?<=blocks\.)\d+")  # the block number in our parameter names
_ANCHORS = ("embeddings.patch_embedding.weight", "embeddings.patch_embeddings.projection.weight")

_Names = Mapping[str, str | tuple[str, ...]]
"""Our module or parameter -> the source's; several are stacked on axis 0."""

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
    **{f"blocks.#.{same}": f"blocks.#.{same}" for same in ("norm1", "attn.qkv", "attn.proj", "norm2")},
    **{f"blocks.#.{same}": f"blocks.#.{same}" for same in ("mlp.fc1", "mlp.fc2")},
    "blocks.#.scale1": "blocks.#.ls1.gamma",
    "blocks.#.scale2": "blocks.#.ls2.gamma",
    "norm": "norm",
}


@dataclass(frozen=True)
class _Family:
    names: _Names
    heads: tuple[str, ...]  # prefixes of source names that are no part of the encoder
    swiglu_names: _Names | None = None  # what replaces `names` for a gated MLP
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
        {"blocks.#.mlp.fc1": "encoder.layer.#.mlp.weights_in", "blocks.#.mlp.fc2": "encoder.layer.#.mlp.weights_out"},
    ),
    "timm": _Family(_TIMM_NAMES, ("head.", "fc_norm.", "attn_pool.")),
}

HEADS = {name: family.heads for name, family in _FAMILIES.items()}
"""Prefixes of what every family has outside its encoder: neither read nor written, as is a norm that is not taken."""


def vit_from(model: nn.Module, **overrides: Any) -> ViT:
    """Copy another project's vision model into a packed `ViT`.

    Args:
        model: a transformers CLIP, SigLIP, SigLIP2, DINOv2 or DINOv2-with-registers model, or one that holds such a
            vision model once (`CLIPModel`, LLaVA, ...); or a timm `VisionTransformer`.
        overrides: fields of `ViTConfig` in place of the family's (module docstring), which None keeps: `select_layer`,
            the index into the hidden states, later blocks being left out; `final_norm`, on the selected layer's
            output; `interpolation`, `antialias` and `bucket_rule`.

    Returns:
        A ViT with its own copy of the weights, in the source's dtype, device and training mode.

    Raises:
        TypeError: a model of another kind (`VisionTower` wraps those), or no such field.
        ValueError: a setting that the ViT does not have, or parameter names that are left over or missing.
    """
    state: Mapping[str, Tensor] = model.state_dict()
    if type(model).__module__.startswith("timm."):
        family, config = "timm", override(config_from_timm(model), overrides)
    elif hasattr(getattr(model, "config", None), "model_type"):
        config = config_from_hf(model.config, **overrides)
        state = {name: state[full] for name, full in vision_names(state).items()}
        family = _hf_family(model.config, state)
    else:
        raise TypeError(f"vit_from takes a transformers or timm model; got {type(model).__name__}. {USE_TOWER}")
    return build_vit(config, state, lambda name: state[name].clone(), family).train(model.training)


def load_vit(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", **overrides: Any
) -> ViT:
    """Read a ViT from a local folder written by transformers, opening only the tensors it needs.

    Args:
        path: a folder with `config.json` and `model.safetensors` (or its shards and their index), or that config.json:
            CLIP, SigLIP, SigLIP2 or DINOv2, alone or inside a bigger model (`vision_model.*` in a `CLIPModel`).
        dtype: of the weights; None keeps the file's.
        device: where the weights go.
        overrides: as in `vit_from`.

    Returns:
        A ViT in eval mode.

    Raises:
        FileNotFoundError: no configuration or no weights there; nothing is downloaded.
        TypeError, ValueError: as in `vit_from`; the weights are pickled, or a file is damaged.
    """
    folder = Path(path)
    folder = folder.parent if folder.name == "config.json" else folder
    checkpoint = Checkpoint(folder)
    if "model_type" not in checkpoint.config:
        raise TypeError(f"{folder} holds no transformers model; build a timm model with timm and give it to vit_from")
    source_config = transformers_config(folder)
    config = config_from_hf(source_config, **overrides)
    names, family = vision_names(checkpoint.files), _hf_family(source_config, checkpoint.files)
    needed = needed_names(config, family)
    full = {whole: name for name, whole in names.items() if name in needed}
    checkpoint.check(full)
    tensors = {full[whole]: tensor for whole, tensor in checkpoint.read(full, device)}
    vit = build_vit(config, names, tensors.pop, family)
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
    sources = {name: _source_names(name, family, vit.config) for name in vit.state_dict()}
    if unnamed := [name for name, theirs in sources.items() if not theirs]:
        raise ValueError(f"{family!r} has no name for {', '.join(unnamed)}")
    state = {}
    for name, tensor in vit.state_dict().items():
        parts = tensor.detach().chunk(len(sources[name]))
        for source, part in zip(sources[name], parts, strict=True):
            state[source] = _to_source(name, part, family, vit.config).contiguous()
    return state


def _hf_family(config: Any, names: Iterable[str]) -> str:
    """The rename table of a configuration; DINOv2's names in files are not those of its modules."""
    family = HF_FAMILIES[getattr(config, "vision_config", config).model_type]
    in_file = family == "dinov2" and any(".attention.attention.query." in name for name in names)
    return "dinov2-checkpoint" if in_file else family


def vision_names(names: Iterable[str]) -> dict[str, str]:
    """Find the one vision model among these tensors: names inside it -> in full. ValueError: none, or several."""
    names = list(names)
    prefixes = [name.removesuffix(anchor) for name in names for anchor in _ANCHORS if name.endswith(anchor)]
    if len(prefixes) != 1:
        raise ValueError(
            f"expected one vision model with a patch embedding among the weights; found {prefixes or 'none'}"
        )
    return {name.removeprefix(prefixes[0]): name for name in names if name.startswith(prefixes[0])}


def needed_names(config: ViTConfig, family: str) -> set[str]:
    """Names of the source tensors that a ViT of this config is made of, by a family's rename table."""
    with torch.device("meta"):
        vit = ViT(config)
    return {source for name in vit.state_dict() for source in _source_names(name, family, config)}


def build_vit(config: ViTConfig, names: Iterable[str], read: Callable[[str], Tensor], family: str) -> ViT:
    """A ViT of the source tensors that `read` gives by name, its own without a copy where that can be.

    `names` are all that the source has for its vision model, without its prefix; `family` is a key of `HEADS`.
    ValueError: names that are missing, or left over, being neither heads nor past the selected layer.
    """
    with torch.device("meta"):
        vit = ViT(config)
    targets = {name: tensor.shape for name, tensor in vit.state_dict().items()}
    sources = {name: _source_names(name, family, config) for name in targets}
    names, wanted = set(names), {source for some in sources.values() for source in some}
    missing = sorted(wanted - names) + [f"a name for {name}" for name, some in sources.items() if not some]
    left = sorted(name for name in names - wanted if not _is_unused(name, family, config))
    if missing or left:
        raise ValueError(
            f"the weights do not fit a {family} encoder. Missing: {', '.join(missing) or 'none'}. "
            f"Left over: {', '.join(left) or 'none'}. {USE_TOWER}"
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
    block = re.match(r"(?:encoder\.layers?|blocks)\.(\d+)\.", name)
    beyond = block is not None and config.num_blocks <= int(block[1]) < config.depth
    return name.startswith(source.heads) or norm_skipped or beyond


def _source_names(name: str, family: str, config: ViTConfig) -> tuple[str, ...]:
    """The source parameters behind one of ours; () where the family has no such thing."""
    table = _FAMILIES[family].names
    if config.activation == "swiglu":
        table = {**table, **(_FAMILIES[family].swiglu_names or {})}
    number = _INDEX.search(name)
    template = _INDEX.sub("#", name)
    module, _, suffix = template.rpartition(".")
    if suffix in ("weight", "bias"):
        theirs, ending = table.get(module, ()), f".{suffix}"
    else:
        theirs, ending = table.get(template, ()), ""
    theirs = (theirs,) if isinstance(theirs, str) else theirs
    return tuple(f"{source.replace('#', number[0]) if number else source}{ending}" for source in theirs)


def _from_source(name: str, tensor: Tensor, family: str, config: ViTConfig) -> Tensor:
    if name == "stem.weight":
        conv = _FAMILIES[family].stem_order == "conv"
        return tensor.flatten(1) if conv else reorder(tensor, "hwc", "chw", channels=config.channels)
    if name in ("class_token", "registers", "positions"):
        return tensor.reshape(-1, tensor.shape[-1])
    return tensor


def _to_source(name: str, tensor: Tensor, family: str, config: ViTConfig) -> Tensor:
    source, p = _FAMILIES[family], config.patch_size
    if name == "stem.weight":
        conv = source.stem_order == "conv"
        return tensor.unflatten(1, (-1, p, p)) if conv else reorder(tensor, "chw", "hwc", channels=config.channels)
    if name in ("class_token", "registers", "positions"):
        if source.leading_axes:
            return tensor.unsqueeze(0)
        return tensor.squeeze(0) if name == "class_token" else tensor
    return tensor
