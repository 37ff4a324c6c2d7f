"""From images to visual tokens: a plan, a vision encoder and a compressor behind one call."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from uhd.batch import SliceBatch, normalize
from uhd.pixels import PixelSettings, load_image
from uhd.resampler import MLPProjector, PerceiverConfig, PerceiverResampler, PixelShuffleProjector
from uhd.schema import SpatialSchema, TokenLayout, layout
from uhd.slicing import SlicePlan, SlicingConfig, plan
from uhd.slicing.config import DEFAULT
from uhd.slicing.plan import resolve
from uhd.vision import ViT, ViTConfig

CONFIG_FILE = "uhd_encoder.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """One image's visual tokens, with the plan and the layout that say what they are.

    Attributes:
        tokens: (plan.num_visual_tokens, D), views in the order of ``plan.views``; no separators among them.
        plan: Where the image was cut.
        layout: Where its views, "," and "\\n" go in the language model's sequence.
    """

    tokens: Tensor
    plan: SlicePlan
    layout: TokenLayout

    @property
    def views(self) -> tuple[Tensor, ...]:
        """(q, D) for every view of ``plan.views``."""
        return self.tokens.split([view.num_tokens for view in self.plan.views])


class VisualEncoder(nn.Module):
    """Images of any sizes in, per-image visual tokens and layouts out.

    Any part may be the caller's own. ``vision(patches (N, P), grids) -> (N', D_v)`` needs a ``patch_size``; where its
    output has another grid than its input, ``output_grids(grids)``. ``compressor(features (N', D_v), grids)`` gives
    (V, Q, D), or packed (N'', D) and then has ``output_lengths(grids)``.

    Args:
        vision: The vision encoder, e.g. :class:`uhd.vision.ViT` or :class:`uhd.vision.VisionTower`.
        compressor: Turns a view's features into tokens, e.g. :class:`uhd.resampler.PerceiverResampler`.
        slicing: How images are cut; ``None`` is ``"llava-uhd-safe"`` for this vision encoder. Its ``tokens_per_view``,
            ``separators`` and ``overview_first`` are set to what the compressor and the schema say, so that counts and
            order agree.
        schema: How tokens are laid out; ``None`` is the ``"llava-uhd"`` schema.
        pixels: Mean, std and filter that the vision encoder was trained with.
        check_image_size: Require ``slicing.image_size`` to be the vision encoder's native size. Models that are meant
            for other sizes (MiniCPM-V: 448 px slices, a 980 px encoder) turn it off.
        note: What a user of the tokens must know, such as untrained weights. Saved, and shown by the command line;
            set ``encoder.note = ""`` once it is no longer true.

    Raises:
        ValueError: Parts do not fit: another patch or image size, other widths, no mean and std.
    """

    def __init__(
        self,
        vision: nn.Module,
        compressor: nn.Module,
        *,
        slicing: SlicingConfig | str | None = None,
        schema: SpatialSchema | str | None = None,
        pixels: PixelSettings,
        check_image_size: bool = True,
        note: str = "",
    ) -> None:
        super().__init__()
        if not isinstance(pixels, PixelSettings):
            raise TypeError(f"pixels must be PixelSettings with a mean and std, got {type(pixels).__name__}")
        pixels.mean_std()  # raises here rather than at the first image
        if not hasattr(vision, "patch_size"):
            raise TypeError(f"a vision encoder needs a patch_size, {type(vision).__name__} has none: see VisionTower")
        self.vision, self.compressor, self.pixels = vision, compressor, pixels
        self.schema = schema if isinstance(schema, SpatialSchema) else SpatialSchema.preset(schema or "llava-uhd")
        self.check_image_size = check_image_size
        self.note = note
        self.slicing = self._fitted(slicing)

    def _fitted(self, slicing: SlicingConfig | str | None) -> SlicingConfig:
        patch_size, image_size = self.vision.patch_size, getattr(self.vision, "image_size", None)
        if slicing is None:
            slicing = DEFAULT.for_vision(image_size=image_size or DEFAULT.image_size, patch_size=patch_size)
        else:
            slicing = resolve(slicing)
        wanted = (image_size if image_size and self.check_image_size else slicing.image_size, patch_size)
        if (slicing.image_size, slicing.patch_size) != wanted:
            raise ValueError(
                f"slicing {slicing.name!r} plans for image_size={slicing.image_size}, "
                f"patch_size={slicing.patch_size}; the vision encoder has image_size={image_size}, "
                f"patch_size={patch_size}: "
                f"use slicing.for_vision(image_size={wanted[0]}, patch_size={wanted[1]})"
            )
        widths = getattr(self.vision, "out_dim", None), getattr(self.compressor, "in_dim", None)
        if None not in widths and widths[0] != widths[1]:
            raise ValueError(
                f"the vision encoder gives features of width {widths[0]}, the compressor takes {widths[1]}"
            )
        tokens = getattr(self.compressor, "tokens_per_view", None)
        return slicing.replace(
            tokens_per_view=tokens,
            separators=self.schema.separator_count(),
            overview_first=self.schema.overview == "first",
        )

    @property
    def out_dim(self) -> int | None:
        """Width of the tokens, where the compressor tells it."""
        return getattr(self.compressor, "out_dim", None)

    def plan(self, image_hw: tuple[int, int]) -> SlicePlan:
        """The plan this encoder makes for an image of this (height, width), px."""
        return plan(image_hw, self.slicing)

    def prepare(self, images: Sequence[Any]) -> SliceBatch:
        """Load, plan, resize and cut images; uint8 patches on the CPU. Safe to call in data-loading workers.

        Args:
            images: A list of what :func:`uhd.pixels.load_image` takes: PIL, path, bytes, array, tensor.
        """
        if not isinstance(images, (list, tuple)):
            raise TypeError(
                f"expected a list of images, got {type(images).__name__}: put one image into a list, "
                "make an iterator a list"
            )
        loaded = [load_image(image, settings=self.pixels) for image in images]
        plans = [self.plan((image.height, image.width)) for image in loaded]
        return SliceBatch.from_images(loaded, plans, settings=self.pixels, patch_size=self.vision.patch_size)

    def forward(self, images: Sequence[Any] | SliceBatch) -> list[EncodedImage]:
        """Encode a list of images, or a batch that :meth:`prepare` made.

        Returns:
            One :class:`EncodedImage` an image, on the encoder's device and in its dtype.

        Raises:
            ValueError: A part returned another number of features or tokens than the plan counts.
        """
        batch = images if isinstance(images, SliceBatch) else self.prepare(images)
        tokens = self.encode(batch)
        parts = tokens.split([p.num_visual_tokens for p in batch.plans]) if batch.plans else ()
        return [EncodedImage(part, p, layout(p, self.schema)) for part, p in zip(parts, batch.plans, strict=True)]

    def encode(self, batch: SliceBatch) -> Tensor:
        """All views of a batch -> (num_visual_tokens of all images, D), in order. The part with gradients."""
        self._check_batch(batch)
        tokens, lengths = self.encode_packed(batch.patches, batch.grids)
        self._check_tokens(batch, lengths)
        return tokens

    def encode_packed(self, patches: Tensor, grids: Sequence[tuple[int, int]]) -> tuple[Tensor, list[int]]:
        """Packed patches (N, P), raw uint8 or normalised, of V views -> packed tokens (M, D) and V numbers of them.

        Raises:
            ValueError: A part returned another number of features or tokens than the grids hold.
        """
        grids = tuple((int(rows), int(cols)) for rows, cols in grids)
        anchor = next(self.vision.parameters(), torch.zeros(()))
        patches = patches.to(anchor.device)
        if not patches.is_floating_point():
            patches = normalize(patches, self.pixels)
        patches = patches.to(anchor.dtype)
        features = self.vision(patches, grids)
        grids = self._output_grids(grids)
        if len(features) != sum(h * w for h, w in grids):
            raise ValueError(
                f"vision returned {len(features)} features for {sum(h * w for h, w in grids)} patches: "
                "a vision encoder of another stride needs output_grids(grids)"
            )
        weight = next(self.compressor.parameters(), features)
        tokens = self.compressor(features.to(weight.device, weight.dtype), grids)
        dense = tokens.dim() == 3
        lengths = [tokens.shape[1]] * len(tokens) if dense else list(self.compressor.output_lengths(grids))
        tokens = tokens.flatten(0, 1) if dense else tokens
        if len(tokens) != sum(lengths):
            raise ValueError(
                f"the compressor returned {len(tokens)} packed tokens, its output_lengths add up to {sum(lengths)}"
            )
        return tokens, lengths

    def _output_grids(self, grids: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        change = getattr(self.vision, "output_grids", None)
        return grids if change is None else tuple(change(grids))

    def _check_batch(self, batch: SliceBatch) -> None:
        for number, p in enumerate(batch.plans):
            if p.patch_size != self.vision.patch_size:
                raise ValueError(
                    f"image {number} is planned for patch_size={p.patch_size}, the vision encoder has "
                    f"{self.vision.patch_size}: plan it with encoder.plan(image_hw)"
                )
            separators = self.schema.separator_count().count(p.grid)
            if p.num_separators != separators:
                raise ValueError(
                    f"image {number} is planned by {p.strategy!r} with {p.num_separators} separators, schema "
                    f"{self.schema.name!r} has {separators}: plan it with encoder.plan(image_hw)"
                )

    def _check_tokens(self, batch: SliceBatch, lengths: list[int]) -> None:
        views = [(number, view) for number, p in enumerate(batch.plans) for view in p.views]
        if len(lengths) != len(views):
            raise ValueError(f"the compressor returned {len(lengths)} views, the batch has {len(views)}")
        for (image, view), got in zip(views, lengths, strict=True):
            if got != view.num_tokens:
                raise ValueError(
                    f"image {image}, view {view.index} ({view.patches_hw[0]}x{view.patches_hw[1]} patches): the plan "
                    f"counts {view.num_tokens} tokens, the compressor gave {got}: set slicing.tokens_per_view, or "
                    "slicing.merge to the patches that one token covers per side"
                )

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write ``model.safetensors`` and ``uhd_encoder.json`` (parts, slicing, schema, mean and std)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "format": 1,
            "vision": describe_part(self.vision),
            "compressor": describe_part(self.compressor),
            "slicing": self.slicing.to_dict(),
            "schema": self.schema.to_dict(),
            "pixels": self.pixels.to_dict(),
            "check_image_size": self.check_image_size,
            "note": self.note,
        }
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike | nn.Module,
        *,
        out_dim: int | None = None,
        vision: nn.Module | None = None,
        compressor: nn.Module | None = None,
        slicing: SlicingConfig | str | None = None,
        schema: SpatialSchema | str | None = None,
        pixels: PixelSettings | None = None,
    ) -> VisualEncoder:
        """An encoder that was saved, or a new one around a pretrained vision model.

        Args:
            source: A folder written by :meth:`save_pretrained`; or a Hugging Face folder or model with a CLIP, SigLIP,
                SigLIP2 or DINOv2 vision encoder, or a timm ViT. The latter get a new, untrained perceiver resampler,
                and ``encoder.note`` says so. Nothing is downloaded.
            out_dim: Width of that resampler's tokens, the language model's ``hidden_size``.
            vision, compressor: The caller's own parts. Needed to load an encoder that was saved with such.
            slicing, schema: As in the constructor; they replace what was saved.
            pixels: Mean and std, where the source does not tell them. Never guessed.

        Returns:
            An encoder in eval mode.

        Raises:
            ValueError: Something needed is missing, or a file is damaged; the message names it.
        """
        saved = None if isinstance(source, nn.Module) else Path(source) / CONFIG_FILE
        if saved is not None and not saved.parent.is_dir():
            raise ValueError(f"{source} is not a folder; give a local one, nothing is downloaded")
        if saved is not None and saved.is_file():
            if out_dim is not None:
                raise ValueError(f"{source} holds a whole encoder; out_dim is only for a new compressor")
            return cls._load(saved.parent, vision, compressor, slicing, schema, pixels)
        vision, note = _load_vision(source) if vision is None else vision, ""
        if compressor is None:
            if out_dim is None:
                raise ValueError("a new compressor needs out_dim, the language model's hidden_size")
            compressor = PerceiverResampler(
                PerceiverConfig(width=out_dim, vision_width=vision.out_dim, num_heads=_heads(out_dim))
            )
            note = "the compressor has new, UNTRAINED weights"
        pixels = _find_pixels(source) if pixels is None else pixels
        return cls(vision, compressor, slicing=slicing, schema=schema, pixels=pixels, note=note).eval()

    @classmethod
    def _load(
        cls,
        folder: Path,
        vision: nn.Module | None,
        compressor: nn.Module | None,
        slicing: SlicingConfig | str | None,
        schema: SpatialSchema | str | None,
        pixels: PixelSettings | None,
    ) -> VisualEncoder:
        with _damage_named(folder / CONFIG_FILE):
            config = json.loads((folder / CONFIG_FILE).read_text())
            if config["format"] != 1:
                raise ValueError(f"it has format {config['format']!r}; this version reads format 1")
            encoder = cls(
                rebuild_part(config["vision"], "vision") if vision is None else vision,
                rebuild_part(config["compressor"], "compressor") if compressor is None else compressor,
                slicing=SlicingConfig.from_dict(config["slicing"]) if slicing is None else slicing,
                schema=SpatialSchema.from_dict(config["schema"]) if schema is None else schema,
                pixels=PixelSettings.from_dict(config["pixels"]) if pixels is None else pixels,
                check_image_size=config["check_image_size"],
                note=config["note"],
            )
        with _damage_named(folder / WEIGHTS_FILE):
            # assigned, not copied: every tensor keeps the dtype it was saved in
            found = encoder.load_state_dict(load_file(folder / WEIGHTS_FILE), strict=False, assign=True)
            if found.missing_keys or found.unexpected_keys:
                raise ValueError(f"missing {found.missing_keys}, unexpected {found.unexpected_keys}")
        return encoder.eval()


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file's content becomes one ``ValueError`` that names the file."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as problem:
        detail = problem if isinstance(problem, ValueError) else repr(problem)
        raise ValueError(f"{path} does not fit or is damaged: {detail}") from problem


class _Part(NamedTuple):
    """How a part of ours is described in JSON, and built again."""

    cls: type[nn.Module]
    describe: Callable[[Any], dict[str, Any]]
    build: Callable[[dict[str, Any]], nn.Module]


_PARTS = {
    "vit": _Part(ViT, lambda part: part.config.to_dict(), lambda config: ViT(ViTConfig.from_dict(config))),
    "perceiver": _Part(
        PerceiverResampler,
        lambda part: part.config.to_dict(),
        lambda config: PerceiverResampler(PerceiverConfig.from_dict(config)),
    ),
    "mlp": _Part(MLPProjector, lambda part: part.to_dict(), lambda config: MLPProjector(**config)),
    "pixel_shuffle": _Part(
        PixelShuffleProjector, lambda part: part.to_dict(), lambda config: PixelShuffleProjector(**config)
    ),
}


def describe_part(part: nn.Module) -> dict[str, Any]:
    """What is needed to build a part again; ``custom`` where only the caller can."""
    foreign_stem = isinstance(part, ViT) and type(part.stem) is not nn.Linear
    for kind, entry in _PARTS.items():
        if type(part) is entry.cls and not foreign_stem:
            return {"kind": kind, "config": entry.describe(part)}
    return {"kind": "custom", "class": f"{type(part).__module__}.{type(part).__qualname__}"}


def rebuild_part(described: dict[str, Any], role: str) -> nn.Module:
    if described["kind"] not in _PARTS:
        raise ValueError(
            f"it was saved with a {role} of class {described.get('class', described['kind'])}: build that and pass "
            f"{role}=... to VisualEncoder.from_pretrained"
        )
    return _PARTS[described["kind"]].build(described["config"])


def _load_vision(source: str | os.PathLike | nn.Module) -> ViT:
    from uhd.vision import load_vit, vit_from

    return vit_from(source) if isinstance(source, nn.Module) else load_vit(source)


def _find_pixels(source: str | os.PathLike | nn.Module) -> PixelSettings:
    if not isinstance(source, nn.Module):
        return PixelSettings.from_preprocessor(source)
    if hasattr(source, "pretrained_cfg"):
        return PixelSettings.from_timm(source)
    raise ValueError(
        f"a {type(source).__name__} does not tell its mean and std: pass "
        "pixels=PixelSettings.from_preprocessor(its image processor or folder)"
    )


def _heads(width: int) -> int:
    """Heads of about 128 channels, as released, that divide the width."""
    return next(heads for heads in range(max(width // 128, 1), 0, -1) if width % heads == 0)


def save_tokens(
    path: str | os.PathLike,
    encoded: Sequence[EncodedImage],
    *,
    schema: SpatialSchema,
    names: Sequence[str] | None = None,
    note: str = "",
) -> None:
    """Write encoded images to one safetensors file: ``tokens`` (all images' visual tokens, D), the rest in metadata.

    Args:
        path: The file; its folder must exist.
        encoded: What :class:`VisualEncoder` returned.
        schema: The encoder's.
        names: Where each image came from.
        note: Free text for whoever reads the file, e.g. that the weights are untrained.
    """
    if not encoded:
        raise ValueError("no images to save")
    names = [""] * len(encoded) if names is None else list(names)
    images = [{"name": name, "plan": item.plan.to_dict()} for name, item in zip(names, encoded, strict=True)]
    tokens = torch.cat([item.tokens.detach().cpu() for item in encoded])
    metadata = {"format": "uhd-tokens-1", "images": json.dumps(images), "schema": json.dumps(schema.to_dict())}
    if note:
        metadata["note"] = note
    check_output(path)
    save_file({"tokens": tokens.contiguous()}, path, metadata=metadata)


def check_output(path: str | os.PathLike) -> None:
    """Raise a ``ValueError`` where :func:`save_tokens` could not write, before any work is done."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"tokens are written to a .safetensors file, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}")


def load_tokens(path: str | os.PathLike) -> list[EncodedImage]:
    """The inverse of :func:`save_tokens`.

    Raises:
        ValueError: Not such a file, or its counts disagree.
    """
    with _damage_named(Path(path)):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "uhd-tokens-1":
                raise ValueError(f"format {metadata.get('format')!r}, so not written by `uhd encode`")
            tokens = file.get_tensor("tokens")
        plans = [SlicePlan.from_dict(image["plan"]) for image in json.loads(metadata["images"])]
        schema = SpatialSchema.from_dict(json.loads(metadata["schema"]))
        counts = [p.num_visual_tokens for p in plans]
        if sum(counts) != len(tokens):
            raise ValueError(f"it holds {len(tokens)} tokens, its {len(plans)} plans count {sum(counts)}")
    return [EncodedImage(part, p, layout(p, schema)) for part, p in zip(tokens.split(counts), plans, strict=True)]
