"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision as transformers saves them.

The vision encoder's features are those of ``vision_feature_layer``, before any final norm. Cutting, padding and filter
come from the image processor's file beside the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from uhd.checkpoint import Checkpoint, transformers_config
from uhd.pixels import PixelSettings
from uhd.pretrained.recipe import Prefixes, Recipe, filter_of, preprocessor_of
from uhd.resampler import MLPProjector
from uhd.slicing.strategies.anyres import AnyResConfig
from uhd.slicing.strategies.base import StrategyConfig
from uhd.slicing.strategies.fixed import CenterCropConfig, SquarePadConfig, StretchConfig
from uhd.vision import ViTConfig, config_from_hf
from uhd.weights import load_exactly, shape_of

KINDS = {"llava-1.5": "llava", "llava-next": "llava_next", "llava-onevision": "llava_onevision"}
"""Families, and what transformers calls them."""

_TOWERS = ("vision_tower.", "model.vision_tower.")
PREFIXES = Prefixes(
    vision=(*_TOWERS, *(f"{tower}vision_model." for tower in _TOWERS)),
    compressor=("multi_modal_projector.", "model.multi_modal_projector."),
    newline=("image_newline", "model.image_newline"),
    other=("language_model.", "model.language_model.", "lm_head."),
    renamed={"mlp.0": "linear_1", "mlp.2": "linear_2"},
)

_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


def recipe(checkpoint: Checkpoint, family: str) -> Recipe:
    """Read the recipe of a family of :data:`KINDS` from the settings in a folder."""
    names, kind, preprocessor = PREFIXES.sort(checkpoint, family), KINDS[family], preprocessor_of(checkpoint)
    config = transformers_config(checkpoint.folder)
    if config.model_type != kind:
        raise ValueError(f"config.json is that of a {config.model_type} model, not of {kind}: leave family= out")
    vit = _vit(config)
    single = kind == "llava"
    if (names.newline is None) != single:
        raise ValueError(f"a {kind} model has {'no' if single else 'an'} image_newline, found {names.newline}")
    return Recipe(
        checkpoint,
        names,
        vit=vit,
        vit_names="siglip" if "siglip" in config.vision_config.model_type else "clip",
        compressor=partial(_projector, activation=config.projector_hidden_act),
        slicing=_one_view(preprocessor, vit) if single else _anyres(config, preprocessor, vit),
        pixels=PixelSettings.from_preprocessor(preprocessor),
    )


def _vit(config: Any) -> ViTConfig:
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    kind = config.vision_config.model_type
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise ValueError(f"the vision encoder is {kind!r}, expected CLIP or SigLIP: try uhd.vision.VisionTower")
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer is {layer}: joined features of several layers are not supported")
    vit = config_from_hf(config.vision_config, select_layer=layer, final_norm=False)
    if (strategy == "default") != vit.class_token:
        raise ValueError(
            f"vision_feature_select_strategy={strategy!r} with a vision encoder that has "
            f"{'a' if vit.class_token else 'no'} class token: only patches can be laid out"
        )
    return vit


def _projector(state: Mapping[str, Tensor], *, activation: str) -> nn.Module:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"projector_hidden_act must be one of {', '.join(_ACTIVATIONS)}; got {activation!r}")
    missing = [theirs for ours, theirs in PREFIXES.renamed.items() if f"{ours}.weight" not in state]
    if missing:
        raise ValueError(f"the weights do not fit a projector. Missing: {', '.join(f'{x}.weight' for x in missing)}")
    hidden, in_dim = shape_of(state, "mlp.0.weight", 2)
    out_dim = shape_of(state, "mlp.2.weight", 2)[0]
    settings = {"hidden_dim": hidden, "bias": "mlp.0.bias" in state, "activation": _ACTIVATIONS[activation]}
    make = partial(MLPProjector, in_dim, out_dim, **settings)
    return load_exactly(make, state, "a projector (mlp.0 is linear_1, mlp.2 is linear_2)", like="mlp.0.weight")


def _one_view(preprocessor: Mapping[str, Any], vit: ViTConfig) -> StrategyConfig:
    """Choose among LLaVA-1.5's ways to one square view: padded, cropped, or stretched."""
    side, size = vit.image_size, _sides(preprocessor, "size")
    common = {"patch_size": vit.patch_size, "tile": side, "resample": filter_of(preprocessor)}
    crops = preprocessor.get("do_center_crop", False)
    cropped = _sides(preprocessor, "crop_size") if crops else size
    if not preprocessor.get("do_resize", True) or set(size.values()) != {side} or set(cropped.values()) != {side}:
        made = f"{size}, cropped to {cropped}"
        raise ValueError(f"the image processor makes {made}; the vision encoder takes squares of {side} px")
    if preprocessor.get("do_pad"):
        mean = PixelSettings.from_preprocessor(preprocessor).mean
        return SquarePadConfig("llava-1.5-pad", fill=tuple(int(255 * value) for value in mean), **common)
    if "height" in size:
        return StretchConfig("llava-1.5-stretch", **common)
    if not crops:
        raise ValueError("the image processor keeps the aspect and neither pads nor crops: views must be square")
    return CenterCropConfig("llava-1.5-crop", **common)


def _anyres(config: Any, preprocessor: Mapping[str, Any], vit: ViTConfig) -> AnyResConfig:
    tile, points = vit.image_size, config.image_grid_pinpoints
    sides = {*_sides(preprocessor, "size").values()}
    if preprocessor.get("do_center_crop"):
        sides |= {*_sides(preprocessor, "crop_size").values()}
    if sides != {tile}:
        raise ValueError(f"the image processor makes views of {sorted(sides)} px, the vision encoder takes {tile}")
    theirs = preprocessor.get("image_grid_pinpoints", points)
    if [list(point) for point in theirs] != [list(point) for point in points]:
        raise ValueError("image_grid_pinpoints of the model and of its image processor differ: they must be one list")
    if any(side % tile for point in points for side in point):
        raise ValueError(f"image_grid_pinpoints must be multiples of the view's {tile} px; got {points}")
    mean, max_tiles = PixelSettings.from_preprocessor(preprocessor).mean, None
    if config.model_type == "llava_onevision":
        bound = re.fullmatch(r"anyres_max_(\d+)", config.vision_aspect_ratio)
        if bound is None:
            raise ValueError(f"vision_aspect_ratio must be anyres_max_N, got {config.vision_aspect_ratio!r}")
        max_tiles = int(bound[1])
    return AnyResConfig(
        config.model_type.replace("_", "-"),
        patch_size=vit.patch_size,
        tile=tile,
        grids=tuple((height // tile, width // tile) for height, width in points),
        max_tiles=max_tiles,
        square_fill=tuple(int(255 * value) for value in mean),
        resample=filter_of(preprocessor),
    )


def _sides(preprocessor: Mapping[str, Any], name: str) -> dict[str, int]:
    """Read a size as image processors write it: a number, or named sides in px."""
    size = preprocessor.get(name)
    if isinstance(size, int):
        return {"shortest_edge": size} if name == "size" else {"height": size, "width": size}
    sides = {key: value for key, value in (size or {}).items() if value is not None}
    if set(sides) not in ({"shortest_edge"}, {"height", "width"}):
        raise ValueError(f"the image processor's {name} must have a shortest_edge, or height and width; got {size}")
    return sides
