"""How a checkpoint's visual side becomes an encoder, and goes back: names, parts, and what a family decides."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from uhd.checkpoint import Checkpoint
from uhd.encoder import VisualEncoder
from uhd.pixels import PixelSettings
from uhd.pixels.settings import FILTERS, PREPROCESSORS
from uhd.resampler import FeaturePacker
from uhd.schema import SpatialSchema
from uhd.slicing import SlicingLike
from uhd.vision import ViTConfig, compress_vit
from uhd.vision.weights import build_vit, needed_names, vision_names
from uhd.weights import shape_of

HEAD_WIDTH = 128
"""Width of an attention head of the released resamplers, but for that of March 2024."""


@dataclass(frozen=True)
class Prefixes:
    """Where the files of a family keep what, by prefixes of names, those of older versions included.

    A name belongs to the longest prefix that it starts with.
    """

    vision: tuple[str, ...]
    compressor: tuple[str, ...]  # what follows the vision encoder
    other: tuple[str, ...]  # no part of the visual side; never read
    window: tuple[str, ...] = ()  # the compressor inside the vision encoder
    newline: tuple[str, ...] = ()  # whole names of the learned newline
    renamed: Mapping[str, str] = field(default_factory=dict)  # modules of our compressor -> theirs, where they differ

    def sort(self, checkpoint: Checkpoint, family: str) -> Names:
        """Sort a checkpoint's names into parts; refuse names that no part has, and two for one tensor."""
        what = f"{checkpoint.folder} ({family})"
        parts = ("vision", "compressor", "window", "newline", "other")
        prefixes = [(prefix, part) for part in parts for prefix in getattr(self, part)]
        prefixes.sort(key=lambda pair: -len(pair[0]))
        back = {theirs: ours for ours, theirs in self.renamed.items()}
        by_part: dict[str, dict[str, str]] = {part: {} for part in parts}
        left, twice = [], []
        for name in checkpoint.files:
            prefix, part = next(((p, part) for p, part in prefixes if name.startswith(p)), ("", ""))
            if not part or (part == "newline" and name != prefix):
                left.append(name)
                continue
            inner = name.removeprefix(prefix)
            if part == "compressor":
                module, _, ending = inner.rpartition(".")
                inner = f"{back.get(module, module)}.{ending}" if module else inner
            if inner in by_part[part] and part != "other":
                twice += [by_part[part][inner], name]
            by_part[part][inner] = name
        if left:
            raise ValueError(f"{what} has tensors that its family does not know. Left over: {', '.join(sorted(left))}")
        if twice:
            raise ValueError(f"{what} has tensors under the names of two versions: {', '.join(sorted(twice))}")
        if not by_part["compressor"]:
            known = " or ".join(self.compressor)
            raise ValueError(f"{what} has no compressor: none of its tensors starts with {known}")
        newline = next(iter(by_part["newline"].values()), None)
        return Names(by_part["vision"], by_part["compressor"], by_part["window"], newline)


@dataclass(frozen=True)
class Names:
    """A checkpoint's visual tensors by part: the name inside the part -> the name in the files."""

    vision: dict[str, str]
    compressor: dict[str, str]
    window: dict[str, str]
    newline: str | None

    @property
    def all(self) -> list[str]:
        return [*self.vision.values(), *self.compressor.values(), *self.window.values(), *filter(None, [self.newline])]


@dataclass(frozen=True)
class Recipe:
    """What a family decides from a checkpoint's settings and names; the rest is as in :class:`uhd.VisualEncoder`."""

    checkpoint: Checkpoint
    names: Names
    vit: ViTConfig  # without compressors
    vit_names: str  # which names its weights have, a key of uhd.vision.weights.HEADS
    compressor: Callable[[Mapping[str, Tensor]], nn.Module]  # makes it of its weights, which have our names
    slicing: SlicingLike
    pixels: PixelSettings
    schema: SpatialSchema | None = None
    compress_after: tuple[int, ...] = ()  # as in uhd.vision.compress_vit
    check_image_size: bool = True
    note: str = ""
    tower: Checkpoint | None = None  # another one, that holds the vision encoder

    def encoder(self, vision: nn.Module, compressor: nn.Module, packer: FeaturePacker | None) -> VisualEncoder:
        """Put parts together with these settings."""
        settings = ("slicing", "schema", "pixels", "check_image_size", "note")
        return VisualEncoder(vision, compressor, packer=packer, **{name: getattr(self, name) for name in settings})


def preprocessor_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return the image processor's settings, or raise a ``FileNotFoundError`` where the folder has none."""
    if checkpoint.preprocessor is None:
        raise FileNotFoundError(
            f"{checkpoint.folder} has no settings of the image processor ({' or '.join(PREPROCESSORS)}): save the "
            "processor beside the model"
        )
    return checkpoint.preprocessor


def filter_of(preprocessor: Mapping[str, Any]) -> str:
    """Return the name of an image processor's filter; it writes Pillow's numbers."""
    number = preprocessor.get("resample")
    if number is None:
        return "bicubic"  # as the classes of all these families have it
    if number not in FILTERS:
        raise ValueError(f"the image processor's resample must be one of {FILTERS} (Pillow's numbers); got {number!r}")
    return FILTERS[number]


def resampler_of(kind: Any, **flags: Any) -> Callable[[Mapping[str, Tensor]], nn.Module]:
    """Return what makes a released resampler of its weights, which do not say its number of heads."""
    return lambda state: kind.from_state_dict(state, num_heads=shape_of(state, "query", 2)[1] // HEAD_WIDTH, **flags)


def build(recipe: Recipe, device: str | torch.device) -> VisualEncoder:
    """Build the encoder of a recipe with the tensors in the files."""
    checkpoint, names = recipe.checkpoint, recipe.names
    checkpoint.check(names.all)

    def read(part: Mapping[str, str], source: Checkpoint = checkpoint) -> dict[str, Tensor]:
        inner = {full: name for name, full in part.items()}
        return _one_dtype({inner[full]: tensor for full, tensor in source.read(part.values(), device)}, part)

    tower, vision = recipe.tower or checkpoint, names.vision
    if recipe.tower is not None:
        vision = vision_names(recipe.tower.files)
        recipe.tower.check(vision.values())
    wanted = needed_names(recipe.vit, recipe.vit_names)
    tensors = read({name: full for name, full in vision.items() if name in wanted}, tower)
    vit = build_vit(recipe.vit, vision, tensors.pop, recipe.vit_names).eval()
    if recipe.compress_after:
        vit = compress_vit(vit, recipe.compress_after, weights=read(names.window))
    compressor = recipe.compressor(read(names.compressor))
    packer, width = None, compressor.out_dim
    if names.newline is not None:
        newline = read({"newline": names.newline})["newline"]
        if newline.shape != (width,):
            raise ValueError(f"{names.newline} has the shape {tuple(newline.shape)}, expected {(width,)}: one token")
        packer = FeaturePacker(width).to(newline.device, newline.dtype)
        packer.load_state_dict({"newline": newline})
    return recipe.encoder(vit, compressor, packer).eval()


def _one_dtype(tensors: dict[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Cast a part to the one dtype that holds all its values: a release may keep its norms in float32."""
    integers = [names[name] for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if integers:
        listed = ", ".join(integers)
        raise ValueError(f"quantised tensors cannot be read, {listed} hold integers: take the release in bfloat16")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) < 2:
        return tensors
    widest = functools.reduce(torch.promote_types, dtypes)
    return {name: tensor.to(widest) for name, tensor in tensors.items()}
