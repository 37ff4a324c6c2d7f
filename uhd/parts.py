"""The parts of an encoder on disk: how each is described in JSON and built again, and where new ones come from."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from uhd.pixels import PixelSettings
from uhd.resampler import (
    MergeProjector,
    MLPProjector,
    PerceiverConfig,
    PerceiverResampler,
    PixelShuffleProjector,
    PoolProjector,
    PyramidConfig,
    PyramidResampler,
    RewriteConfig,
    RewriteResampler,
    SpatialConfig,
    SpatialResampler,
)
from uhd.vision import CompressedViT, CompressedViTConfig, ViT, ViTConfig

_PARTS: dict[str, tuple[type[nn.Module], type | None]] = {
    "vit": (ViT, ViTConfig),
    "compressed_vit": (CompressedViT, CompressedViTConfig),
    "perceiver": (PerceiverResampler, PerceiverConfig),
    "spatial": (SpatialResampler, SpatialConfig),
    "rewrite": (RewriteResampler, RewriteConfig),
    "pyramid": (PyramidResampler, PyramidConfig),
    "mlp": (MLPProjector, None),
    "merge": (MergeProjector, None),
    "pixel_shuffle": (PixelShuffleProjector, None),
    "pool": (PoolProjector, None),
}
"""Each class with that of its ``config``; without one its ``to_dict`` gives the constructor's arguments."""


def describe_part(part: nn.Module) -> dict[str, Any]:
    """What is needed to build a part again; ``custom`` where only the caller can."""
    foreign_stem = isinstance(part, ViT) and not part.own_stem
    for kind, (cls, config) in _PARTS.items():
        if type(part) is cls and not foreign_stem:
            return {"kind": kind, "config": (part.config if config else part).to_dict()}
    custom: dict[str, Any] = {"kind": "custom", "class": f"{type(part).__module__}.{type(part).__qualname__}"}
    return {**custom, "config": {"patch_size": part.patch_size}} if hasattr(part, "patch_size") else custom


def rebuild_part(described: dict[str, Any], role: str) -> nn.Module:
    if described["kind"] not in _PARTS:
        kind = described.get("class", described["kind"])
        raise ValueError(f"saved with a {role} of class {kind}: build that and pass {role}=... to from_pretrained")
    cls, config = _PARTS[described["kind"]]
    return cls(config.from_dict(described["config"])) if config else cls(**described["config"])


def load_vision(source: str | os.PathLike | nn.Module) -> ViT:
    """Take the vision encoder of another project's model, or of a folder with one."""
    from uhd.vision import load_vit, vit_from

    return vit_from(source) if isinstance(source, nn.Module) else load_vit(source)


def find_pixels(source: str | os.PathLike | nn.Module) -> PixelSettings:
    """Read mean and std from a folder, or from a timm model; a ``ValueError`` says what to pass instead."""
    if not isinstance(source, nn.Module):
        return PixelSettings.from_preprocessor(source)
    if hasattr(source, "pretrained_cfg"):
        return PixelSettings.from_timm(source)
    advice = "pass pixels=PixelSettings.from_preprocessor(its image processor or folder)"
    raise ValueError(f"a {type(source).__name__} does not tell its mean and std: {advice}")
