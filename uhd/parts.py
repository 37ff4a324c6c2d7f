"""The parts of an encoder on disk: how each is described in JSON and built again, and where new ones come from."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

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


class _Part(NamedTuple):
    """How a part of ours is described in JSON, and built again."""

    cls: type[nn.Module]
    describe: Callable[[Any], dict[str, Any]]
    build: Callable[[dict[str, Any]], nn.Module]


def _configured(cls: type[nn.Module], config: type) -> _Part:
    """A part that is built from a config object and keeps it."""
    return _Part(cls, lambda part: part.config.to_dict(), lambda values: cls(config.from_dict(values)))


def _plain(cls: type[nn.Module]) -> _Part:
    """A part whose `to_dict` gives its constructor's arguments."""
    return _Part(cls, lambda part: part.to_dict(), lambda values: cls(**values))


_PARTS = {
    "vit": _configured(ViT, ViTConfig),
    "compressed_vit": _configured(CompressedViT, CompressedViTConfig),
    "perceiver": _configured(PerceiverResampler, PerceiverConfig),
    "spatial": _configured(SpatialResampler, SpatialConfig),
    "rewrite": _configured(RewriteResampler, RewriteConfig),
    "pyramid": _configured(PyramidResampler, PyramidConfig),
    "mlp": _plain(MLPProjector),
    "merge": _plain(MergeProjector),
    "pixel_shuffle": _plain(PixelShuffleProjector),
    "pool": _plain(PoolProjector),
}


def describe_part(part: nn.Module) -> dict[str, Any]:
    """What is needed to build a part again; ``custom`` where only the caller can."""
    foreign_stem = isinstance(part, ViT) and not part.own_stem
    for kind, entry in _PARTS.items():
        if type(part) is entry.cls and not foreign_stem:
            return {"kind": kind, "config": entry.describe(part)}
    custom: dict[str, Any] = {"kind": "custom", "class": f"{type(part).__module__}.{type(part).__qualname__}"}
    return {**custom, "config": {"patch_size": part.patch_size}} if hasattr(part, "patch_size") else custom


def rebuild_part(described: dict[str, Any], role: str) -> nn.Module:
    if described["kind"] not in _PARTS:
        raise ValueError(
            f"it was saved with a {role} of class {described.get('class', described['kind'])}: build that and pass "
            f"{role}=... to VisualEncoder.from_pretrained"
        )
    return _PARTS[described["kind"]].build(described["config"])


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
    raise ValueError(
        f"a {type(source).__name__} does not tell its mean and std: pass "
        "pixels=PixelSettings.from_preprocessor(its image processor or folder)"
    )
