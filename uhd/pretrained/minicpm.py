"""MiniCPM-V: 2.0, 2.5 and 2.6 as OpenBMB releases them, 4.6 as transformers saves it.

2.0's vision encoder is a timm ViT whose positions are resized; that of 2.5 and 2.6 is SigLIP with a position bucket
for every patch; that of 4.6 has a compressor inside. Slicing comes from the image processor's file, else the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from uhd.checkpoint import Checkpoint
from uhd.pixels import PixelSettings
from uhd.pixels.settings import PREPROCESSORS
from uhd.pretrained.recipe import Names, Prefixes, Recipe, filter_of, preprocessor_of, resampler_of
from uhd.resampler import MergeProjector, PerceiverResampler
from uhd.schema import SpatialSchema
from uhd.slicing import SlicingConfig
from uhd.vision import ViTConfig, config_from_hf, config_from_timm

PREFIXES = Prefixes(vision=("vpm.",), compressor=("resampler.",), other=("llm.",))
PREFIXES_4_6 = Prefixes(
    vision=("model.vision_tower.",),
    window=("model.vision_tower.vit_merger.",),
    compressor=("model.merger.",),
    other=("model.language_model.", "lm_head."),
)

_SLICING = {"scale_resolution": 448, "max_slice_nums": 9, "patch_size": 14}
"""What the released configs and image processors take where their files say nothing."""


def recipe_2(checkpoint: Checkpoint, family: str) -> Recipe:
    """Read the recipe from the settings of 2.0, 2.5 or 2.6."""
    config, preprocessor = checkpoint.config, checkpoint.preprocessor or {}
    names, first = PREFIXES.sort(checkpoint, family), family == "minicpm-v-2.0"
    vit = _timm_vit(config, names) if first else _siglip_vit(_setting("vision_config", config), names)
    settings = {**config, **config.get("slice_config", {}), **preprocessor}
    half = (0.5, 0.5, 0.5)  # where the release writes none
    return Recipe(
        checkpoint,
        names,
        vit=vit,
        vit_names="timm" if first else "siglip",
        compressor=resampler_of(PerceiverResampler, variant="minicpm-v-2.0" if first else "minicpm-v-2.6"),
        slicing=_slicing("minicpm-v", settings, vit),
        schema=_schema(family, settings),
        pixels=PixelSettings(mean=preprocessor.get("norm_mean", half), std=preprocessor.get("norm_std", half)),
        check_image_size=False,
    )


def recipe_4_6(checkpoint: Checkpoint, family: str, downsample: str | None) -> Recipe:
    """Read the recipe from the settings of 4.6, with ``downsample`` ("16x" or "4x") in place of theirs."""
    config, names = checkpoint.config, PREFIXES_4_6.sort(checkpoint, family)
    preprocessor = preprocessor_of(checkpoint)
    mode = config.get("downsample_mode", "16x") if downsample is None else downsample
    kernels = [config.get("merge_kernel_size", [2, 2]), _setting("vision_config", config).get("window_kernel_size")]
    if mode not in ("16x", "4x") or any(kernel not in (None, [2, 2]) for kernel in kernels):
        raise ValueError(f"expected a downsample mode of 16x or 4x, of windows of 2 x 2; got {mode!r} and {kernels}")
    vit = replace(_siglip_vit(config["vision_config"], names), bucket_rule="transformers")
    after = (config.get("insert_layer_id", 6) + 1,) if mode == "16x" else ()  # theirs counts from 0
    merge = 2 ** (config.get("merger_times", 1) + len(after))
    resample = filter_of(preprocessor)
    return Recipe(
        checkpoint,
        names,
        vit=vit,
        vit_names="siglip",
        compressor=MergeProjector.from_state_dict,
        slicing=_slicing(family, preprocessor, vit).replace(merge=merge),
        schema=_schema(family, preprocessor),
        pixels=PixelSettings.from_preprocessor(preprocessor, resample=None if resample == "bicubic" else resample),
        compress_after=after,
        check_image_size=False,
    )


def _schema(family: str, settings: Mapping[str, Any]) -> SpatialSchema:
    schema = SpatialSchema.preset(family)
    return schema if settings.get("use_image_id", True) else schema.replace(image_id=None)


def _slicing(preset: str, settings: Mapping[str, Any], vit: ViTConfig) -> SlicingConfig:
    settings = {**_SLICING, **settings}
    size, slices, patch = (_setting(name, settings) for name in _SLICING)
    if patch != vit.patch_size:
        raise ValueError(f"slices are planned for patches of {patch} px, the vision encoder has {vit.patch_size}")
    cap = slices if settings.get("slice_mode", True) else 1  # 1 never cuts
    return SlicingConfig.preset(preset, image_size=size, patch_size=patch, max_slices=cap)


def _timm_vit(config: Mapping[str, Any], names: Names) -> ViTConfig:
    import timm

    name = config.get("vision_encoder", "vit_so400m_patch14_siglip_384.webli")
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, num_classes=0)
    except RuntimeError as problem:
        raise ValueError(f"the installed timm does not know the vision encoder {name!r}: {problem}") from None
    return _depth(config_from_timm(model), names, "blocks.")


def _siglip_vit(values: Mapping[str, Any], names: Names) -> ViTConfig:
    """Read SigLIP's config, or Idefics2's, which 2.5 says it has: the same ViT."""
    from transformers import SiglipVisionConfig

    dims = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    others = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_channels": 3}
    given = {name: _setting(name, values) for name in dims}
    given |= {name: values.get(name, default) for name, default in others.items()}
    config = config_from_hf(SiglipVisionConfig(**given), interpolation="nearest", bucket_rule="remote")
    return _depth(config, names, "encoder.layers.")


def _depth(config: ViTConfig, names: Names, prefix: str) -> ViTConfig:
    """Leave out the last block where the release dropped it (``drop_vision_last_layer``)."""
    blocks = {name.removeprefix(prefix).split(".")[0] for name in names.vision if name.startswith(prefix)}
    dropped = len(blocks) == config.depth - 1 and str(config.depth - 1) not in blocks
    return replace(config, depth=config.depth - dropped)


def _setting(name: str, settings: Mapping[str, Any]) -> Any:
    if settings.get(name) is None:
        raise ValueError(f"the settings of this folder (config.json, {PREPROCESSORS[0]}) have no {name}")
    return settings[name]
