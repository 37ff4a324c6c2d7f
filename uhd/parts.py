"""The parts of an encoder on disk: how each is described in JSON and built again, and where new ones come from."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
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
from uhd.settings import check_free, kept_arguments, place_of, read_arguments
from uhd.vision import CompressedViT, CompressedViTConfig, VisionTower, ViT, ViTConfig

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


ROLES = ("vision", "compressor")
_SIZES = ("patch_size", "image_size", "out_dim")
_OWN: dict[str, dict[str, type[nn.Module]]] = {role: {} for role in ROLES}


def register_vision(name: str, cls: type[nn.Module] | None = None) -> Any:
    """Give a vision encoder of your own a name, so that it is saved with its encoder or model and built again.

    What was saved with it loads in a process that has registered it too; any other says what to register. No file
    names code that is imported. It is built again of what its ``to_dict()`` gives, in values that JSON takes: by its
    ``from_dict``, where it has one, else by its constructor, of keyword arguments. Without ``to_dict`` it has to keep
    its constructor's arguments as attributes of the same names; in a subclass of those here ``config`` is its base's.

    Args:
        name: As it stands in saved files.
        cls: A ``torch.nn.Module`` that :class:`uhd.VisualEncoder` takes as ``vision``. Without it, a decorator.

    Returns:
        The class.

    Raises:
        TypeError: No such class.
        ValueError: The name stands for another class, or the class has another name. The same class defined again, as
            in a notebook, takes the place of the old one.

    >>> @register_vision("quieter")
    ... class Quieter(ViT):
    ...     def forward(self, patches, grids, **how):
    ...         return super().forward(patches, grids, **how) / 2
    >>> sizes = {"patch_size": 14, "width": 16, "depth": 1, "heads": 1, "mlp_width": 32}
    >>> described = describe_part(Quieter(ViTConfig(**sizes)), "vision")
    >>> described["kind"], type(rebuild_part(described, "vision")).__name__
    ('quieter', 'Quieter')
    """
    return _register("vision", name, cls)


def register_compressor(name: str, cls: type[nn.Module] | None = None) -> Any:
    """The same as :func:`register_vision` for a compressor of your own.

    >>> @register_compressor("fixed-mlp")
    ... class FixedMLP(MLPProjector):
    ...     pass
    >>> describe_part(FixedMLP(16, 24), "compressor")["config"]["out_dim"]
    24
    """
    return _register("compressor", name, cls)


def _register(role: str, name: str, cls: type[nn.Module] | None) -> Any:
    if cls is None:
        check_free(role, name, {}, None)  # a decorator without a name is told where it stands
        return lambda given: _register(role, name, given)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"a {role} is registered as a class of torch.nn.Module, got {cls!r}")
    built_in = {kind: known for kind, (known, _) in _PARTS.items()}
    check_free(role, name, {"custom": nn.Module, **built_in, **_OWN[role]}, cls)
    _OWN[role][name] = cls
    return cls


def describe_part(part: nn.Module, role: str) -> dict[str, Any]:
    """What is needed to build a part again; ``custom`` where only the caller can.

    Raises:
        ValueError: A registered class does not tell its constructor's arguments.
    """
    foreign_stem = isinstance(part, ViT) and not part.own_stem
    for kind, (cls, config) in _PARTS.items():
        if type(part) is cls and not foreign_stem:
            return {"kind": kind, "config": (part.config if config else part).to_dict()}
    sizes = {size: getattr(part, size) for size in _SIZES if isinstance(getattr(part, size, None), int)}
    for kind, cls in _OWN[role].items():
        if type(part) is cls and not foreign_stem:
            return {"kind": kind, "class": place_of(cls), "config": _settings(part), **sizes}
    custom: dict[str, Any] = {"kind": "custom", "class": place_of(type(part))}
    return {**custom, "config": {"patch_size": part.patch_size}} if hasattr(part, "patch_size") else custom


def _settings(part: nn.Module) -> dict[str, Any]:
    """What a registered part is built of; see :func:`register_vision`."""
    cls = type(part)
    if hasattr(part, "to_dict"):
        settings = part.to_dict()
    else:
        settings = kept_arguments(part, _argument_names(cls))
        if "config" in settings and _config_class(cls) is not None:
            settings["config"] = part.config.to_dict()
    try:
        again = json.loads(json.dumps(settings))
        if not hasattr(cls, "from_dict"):
            inspect.signature(cls).bind(**again)
    except (TypeError, ValueError) as problem:
        raise ValueError(f"{place_of(cls)} cannot be saved: its settings {settings!r:.200} ({problem})") from problem
    return again


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _base(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The nearest class here that it is a subclass of."""
    known = dict(_PARTS.values())
    return next((base for base in cls.__mro__ if base in known), None)


def _config_class(cls: type[nn.Module]) -> type | None:
    return dict(_PARTS.values()).get(_base(cls))


def _argument_names(cls: type[nn.Module]) -> list[str]:
    """Of its constructor; one that it inherits from a class here takes that one's ``config`` alone."""
    if _config_class(cls) is not None and cls.__init__ is _base(cls).__init__:
        return ["config"]
    return [name for name, one in inspect.signature(cls).parameters.items() if one.kind not in _VARIADIC]


def rebuild_part(described: Mapping[str, Any], role: str, *, empty: bool = False) -> nn.Module:
    """Build a described part, with new weights.

    ``empty``: one of this package's has no weights, only their shapes, which takes no time or memory whatever is
    described; they are assigned.

    Raises:
        ValueError: It is the caller's own and not registered here; the message says what to do. A setting is wrong.
    """
    kind, settings = described["kind"], described.get("config") or {}
    if kind in _PARTS:
        cls, config = _PARTS[kind]
        with torch.device("meta") if empty else nullcontext():
            return cls(config.from_dict(settings)) if config else read_arguments(cls, settings)
    if kind not in _OWN[role]:
        saved = described.get("class", kind)
        raise ValueError(
            f"saved with a {role} of class {saved}: build that and pass {role}=... to from_pretrained"
            if kind == "custom"
            else f"saved with the {role} {kind!r}, which is not registered here: import what calls "
            f"uhd.register_{role}({kind!r}, {saved.rpartition('.')[2]}) before loading"
        )
    cls = _OWN[role][kind]
    with _really():
        if hasattr(cls, "from_dict"):
            return cls.from_dict(settings)
        config = None if hasattr(cls, "to_dict") else _config_class(cls)
        read = {"config": config.from_dict(settings["config"])} if config and "config" in settings else {}
        return cls(**{**settings, **read})


def completed(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of one of this package's parts, those that are left out at their defaults; others as they are."""
    cls, config = _PARTS.get(kind, (None, None))
    known = inspect.signature(config or cls).parameters if cls else {}
    return {name: one.default for name, one in known.items() if one.default is not one.empty} | dict(settings)


def is_known(described: Mapping[str, Any]) -> bool:
    """Whether a described part is of a class of this package."""
    return described["kind"] in _PARTS


@contextmanager
def _really() -> Iterator[None]:
    """Build tensors as a constructor means them: where a loader has set another device and dtype, tables that no file
    holds would be empty or rounded."""
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def check_described(part: nn.Module, role: str) -> dict[str, Any]:
    """As :func:`describe_part`, for what must be built without its caller; a ``ValueError`` where it cannot be."""
    described = describe_part(part, role)
    if described["kind"] == "custom":
        name = type(part).__name__
        how = f"register its class with uhd.register_{role}(name, {name})"
        if type(part) in (cls for cls, _ in _PARTS.values()):
            how = "its stem is your own: make a subclass that builds it, and register that"
        if type(part) is VisionTower:
            how = "make a subclass whose constructor builds the backbone, and register that with uhd.register_vision"
        raise ValueError(f"the {role} is a {name}, which uhd cannot build again: {how}")
    return described


def own_tables(part: nn.Module, role: str) -> dict[str, torch.Tensor]:
    """Buffers of a registered part that no file holds: what its constructor computed."""
    if type(part) not in _OWN[role].values():
        return {}
    saved = part.state_dict()
    return {name: table for name, table in part.named_buffers() if name not in saved}


def check_rebuilt(part: nn.Module, role: str) -> None:
    """Refuse a part that could not be saved and built again; one that is registered is built once more to see.

    Raises:
        ValueError: It is not registered, its settings do not tell how it is built, or build it with other weights.
    """
    described = check_described(part, role)
    if described["kind"] in _PARTS:
        return
    with torch.random.fork_rng(devices=[]):
        again = rebuild_part(described, role)
    shapes = [{name: tuple(tensor.shape) for name, tensor in one.state_dict().items()} for one in (part, again)]
    other = sorted(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
    if type(again) is not type(part) or other:
        raise ValueError(
            f"the {role} is a {type(part).__name__} whose settings {described['config']!r:.200} build another one, "
            f"with other weights {', '.join(other[:3])}: let its settings say all that it is built of"
        )


def load_vision(source: str | os.PathLike[str] | nn.Module) -> ViT:
    """Take the vision encoder of another project's model, or of a folder with one."""
    from uhd.vision import load_vit, vit_from

    return vit_from(source) if isinstance(source, nn.Module) else load_vit(source)


def find_pixels(source: str | os.PathLike[str] | nn.Module) -> PixelSettings:
    """Read mean and std from a folder, or from a timm model; a ``ValueError`` says what to pass instead."""
    if not isinstance(source, nn.Module):
        return PixelSettings.from_preprocessor(source)
    if hasattr(source, "pretrained_cfg"):
        return PixelSettings.from_timm(source)
    advice = "pass pixels=PixelSettings.from_preprocessor(its image processor or folder)"
    raise ValueError(f"a {type(source).__name__} does not tell its mean and std: {advice}")
