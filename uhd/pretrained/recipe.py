"""How a checkpoint's visual side becomes an encoder, and goes back: names, parts, and what a family decides."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from uhd.checkpoint import Checkpoint
from uhd.encoder import VisualEncoder
from uhd.pixels import RESAMPLE, PixelSettings
from uhd.resampler import FeaturePacker
from uhd.schema import SpatialSchema
from uhd.slicing import SlicingLike
from uhd.vision import ViTConfig, compress_vit
from uhd.vision.weights import build_vit, needed_names, vision_names

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FILTERS = {int(number): name for name, number in RESAMPLE.items()}
"""What image processors write for Pillow's filters."""


@dataclass(frozen=True)
class Prefixes:
    """Where the files of a family keep what. A name belongs to the longest prefix that it starts with.

    Attributes:
        vision: Prefixes of the vision encoder, those of older versions included.
        compressor: The same for what follows it.
        window: Prefixes of the compressor inside the vision encoder.
        newline: Names of the learned newline.
        other: Prefixes of what is no part of the visual side; never read.
        renamed: Modules of our compressor -> theirs; others have the same name.
    """

    vision: tuple[str, ...]
    compressor: tuple[str, ...]
    other: tuple[str, ...]
    window: tuple[str, ...] = ()
    newline: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)

    def sort(self, names: Iterable[str], what: str) -> Names:
        """Sort names into parts: the name without its prefix -> in full.

        Raises:
            ValueError: Names that no part has, or two for one tensor; the message lists them.
        """
        parts = ("vision", "compressor", "window", "newline", "other")
        prefixes = [(prefix, part) for part in parts for prefix in getattr(self, part)]
        prefixes.sort(key=lambda pair: -len(pair[0]))
        back = {theirs: ours for ours, theirs in self.renamed.items()}
        by_part: dict[str, dict[str, str]] = {part: {} for part in parts}
        left, twice = [], []
        for name in names:
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
            raise ValueError(
                f"{what} has no compressor: none of its tensors starts with {' or '.join(self.compressor)}"
            )
        return Names(
            by_part["vision"], by_part["compressor"], by_part["window"], next(iter(by_part["newline"].values()), None)
        )


@dataclass(frozen=True)
class Names:
    """A checkpoint's visual tensors by part: the name inside the part -> the name in the files."""

    vision: dict[str, str]
    compressor: dict[str, str]
    window: dict[str, str]
    newline: str | None

    @property
    def all(self) -> list[str]:
        """All names, as in the files."""
        return [*self.vision.values(), *self.compressor.values(), *self.window.values(), *filter(None, [self.newline])]


@dataclass(frozen=True)
class Recipe:
    """What a family decides from a checkpoint's settings and names.

    Attributes:
        vit: The vision encoder's config, without compressors.
        vit_names: Which names its weights have, a key of ``uhd.vision.weights.HEADS``.
        compressor: Makes the compressor of its weights, which have our names.
        slicing, schema, pixels, check_image_size, note: As in :class:`uhd.VisualEncoder`.
        compress_after: Blocks before a compressor inside the ViT, as in ``uhd.vision.compress_vit``.
        tower: Another checkpoint that holds the vision encoder.
    """

    vit: ViTConfig
    vit_names: str
    compressor: Callable[[Mapping[str, Tensor]], nn.Module]
    slicing: SlicingLike
    schema: SpatialSchema | None
    pixels: PixelSettings
    compress_after: tuple[int, ...] = ()
    check_image_size: bool = True
    note: str = ""
    tower: Checkpoint | None = None


def build(recipe: Recipe, names: Names, checkpoint: Checkpoint, device: str | torch.device) -> VisualEncoder:
    """Build the encoder of a recipe with the tensors in the files.

    Raises:
        FileNotFoundError, ValueError: As in :func:`uhd.pretrained.load`.
    """
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
    packer = None
    if names.newline is not None:
        packer = _packer(read({"newline": names.newline})["newline"], names.newline, compressor.out_dim)
    return VisualEncoder(
        vit,
        compressor,
        slicing=recipe.slicing,
        schema=recipe.schema,
        pixels=recipe.pixels,
        packer=packer,
        check_image_size=recipe.check_image_size,
        note=recipe.note,
    ).eval()


def _one_dtype(tensors: dict[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Cast a part to the one dtype that holds all its values: a release may keep its norms in float32.

    Raises:
        ValueError: Quantised tensors.
    """
    integers = [names[name] for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if integers:
        raise ValueError(
            f"quantised tensors cannot be read: {', '.join(integers)} hold integers. Take the release in bfloat16, say"
        )
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) < 2:
        return tensors
    widest = functools.reduce(torch.promote_types, dtypes)
    return {name: tensor.to(widest) for name, tensor in tensors.items()}


def _packer(newline: Tensor, name: str, width: int) -> FeaturePacker:
    """Make a packer with this newline."""
    if newline.shape != (width,):
        raise ValueError(f"{name} has the shape {tuple(newline.shape)}, expected {(width,)}: one token")
    packer = FeaturePacker(width).to(newline.device, newline.dtype)
    packer.load_state_dict({"newline": newline})
    return packer
