"""From images to visual tokens: a plan, a vision encoder and a compressor behind one call."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uhd.batch import SliceBatch, normalize
from uhd.pixels import PixelSettings, load_image
from uhd.resampler import MLPProjector, PerceiverConfig, PerceiverResampler, PixelShuffleProjector
from uhd.schema import SpatialSchema, TokenLayout, layout
from uhd.slicing import SlicePlan, SlicingConfig, plan
from uhd.slicing.config import DEFAULT
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
        slicing: How images are cut; ``None`` is ``"llava-uhd-safe"`` for this vision encoder. Its ``tokens_per_view``
            and ``separators`` are set to what the compressor and the schema give, so that counts agree.
        schema: How tokens are laid out; ``None`` is the ``"llava-uhd"`` schema.
        pixels: Mean, std and filter that the vision encoder was trained with.
        check_image_size: Require ``slicing.image_size`` to be the vision encoder's native size. Models that are meant
            for other sizes (MiniCPM-V: 448 px slices, a 980 px encoder) turn it off.

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
    ) -> None:
        super().__init__()
        pixels.mean_std()  # raises here rather than at the first image
        self.vision, self.compressor, self.pixels = vision, compressor, pixels
        self.schema = SpatialSchema.preset(schema or "llava-uhd") if not isinstance(schema, SpatialSchema) else schema
        self.check_image_size = check_image_size
        self.slicing = self._fitted(slicing)

    def _fitted(self, slicing: SlicingConfig | str | None) -> SlicingConfig:
        patch_size, image_size = self.vision.patch_size, getattr(self.vision, "image_size", None)
        if slicing is None:
            slicing = DEFAULT.for_vision(image_size=image_size or DEFAULT.image_size, patch_size=patch_size)
        elif isinstance(slicing, str):
            slicing = SlicingConfig.preset(slicing)
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
        return slicing.replace(tokens_per_view=tokens, separators=self.schema.separator_count())

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
        if isinstance(images, (str, bytes, os.PathLike)) or not isinstance(images, Sequence):
            raise TypeError(f"expected a list of images, got one {type(images).__name__}: wrap it in a list")
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
        ends = torch.tensor([p.num_visual_tokens for p in batch.plans], dtype=torch.long).cumsum(0).tolist()
        return [
            EncodedImage(tokens[end - p.num_visual_tokens : end], p, layout(p, self.schema))
            for p, end in zip(batch.plans, ends, strict=True)
        ]

    def encode(self, batch: SliceBatch) -> Tensor:
        """All views of a batch -> (num_visual_tokens of all images, D), in order. The part with gradients."""
        self._check_batch(batch)
        anchor = next(self.vision.parameters(), torch.zeros(()))
        patches = batch.patches.to(anchor.device)
        if not patches.is_floating_point():
            patches = normalize(patches, self.pixels)
        patches = patches.to(anchor.dtype)
        features = self.vision(patches, batch.grids)
        grids = self._output_grids(batch.grids)
        if len(features) != sum(h * w for h, w in grids):
            raise ValueError(
                f"vision returned {len(features)} features for {sum(h * w for h, w in grids)} patches: "
                "a vision encoder of another stride needs output_grids(grids)"
            )
        tokens = self.compressor(features, grids)
        dense = tokens.dim() == 3
        self._check_tokens(batch, [tokens.shape[1]] * len(tokens) if dense else self.compressor.output_lengths(grids))
        tokens = tokens.flatten(0, 1) if dense else tokens
        if len(tokens) != sum(p.num_visual_tokens for p in batch.plans):
            raise ValueError(
                f"the compressor returned {len(tokens)} packed tokens, its output_lengths add up to "
                f"{sum(p.num_visual_tokens for p in batch.plans)}"
            )
        return tokens

    def _output_grids(self, grids: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        change = getattr(self.vision, "output_grids", None)
        return grids if change is None else tuple(change(grids))

    def _check_batch(self, batch: SliceBatch) -> None:
        sizes = {p.patch_size for p in batch.plans} - {self.vision.patch_size}
        if sizes:
            raise ValueError(
                f"the batch is planned for patch_size={sizes.pop()}, the vision encoder has "
                f"{self.vision.patch_size}: plan with slicing.for_vision(...)"
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
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "format": 1,
            "vision": _describe(self.vision),
            "compressor": _describe(self.compressor),
            "slicing": self.slicing.to_dict(),
            "schema": self.schema.to_dict(),
            "pixels": self.pixels.to_dict(),
            "check_image_size": self.check_image_size,
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
                SigLIP2 or DINOv2 vision encoder, or a timm ViT. The latter get a new, untrained perceiver resampler.
            out_dim: Width of that resampler's tokens, the language model's ``hidden_size``.
            vision, compressor: The caller's own parts. Needed to load an encoder that was saved with such.
            slicing, schema: As in the constructor; they replace what was saved.
            pixels: Mean and std, where the source does not tell them. Never guessed.

        Raises:
            ValueError: Something needed is missing; the message names it.
        """
        saved = None if isinstance(source, nn.Module) else Path(source) / CONFIG_FILE
        if saved is not None and saved.is_file():
            if out_dim is not None:
                raise ValueError(f"{source} holds a whole encoder; out_dim is only for a new compressor")
            return cls._load(saved.parent, vision, compressor, slicing, schema, pixels)
        vision = _load_vision(source) if vision is None else vision
        if compressor is None:
            if out_dim is None:
                raise ValueError("a new compressor needs out_dim, the language model's hidden_size")
            compressor = PerceiverResampler(
                PerceiverConfig(width=out_dim, vision_width=vision.out_dim, num_heads=_heads(out_dim))
            )
        return cls(
            vision,
            compressor,
            slicing=slicing,
            schema=schema,
            pixels=_find_pixels(source) if pixels is None else pixels,
        )

    @classmethod
    def _load(cls, folder: Path, vision, compressor, slicing, schema, pixels) -> VisualEncoder:
        from safetensors.torch import load_file

        config = json.loads((folder / CONFIG_FILE).read_text())
        if config.get("format") != 1:
            raise ValueError(
                f"{folder / CONFIG_FILE} has format {config.get('format')!r}; this version reads format 1"
            )
        encoder = cls(
            _rebuild(config["vision"], "vision") if vision is None else vision,
            _rebuild(config["compressor"], "compressor") if compressor is None else compressor,
            slicing=SlicingConfig.from_dict(config["slicing"]) if slicing is None else slicing,
            schema=SpatialSchema.from_dict(config["schema"]) if schema is None else schema,
            pixels=PixelSettings.from_dict(config["pixels"]) if pixels is None else pixels,
            check_image_size=config["check_image_size"],
        )
        weights = load_file(folder / WEIGHTS_FILE)
        found = encoder.load_state_dict(weights, strict=False)
        if found.missing_keys or found.unexpected_keys:
            raise ValueError(
                f"{folder / WEIGHTS_FILE} does not fit: missing {found.missing_keys}, "
                f"unexpected {found.unexpected_keys}"
            )
        dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
        return encoder.to(dtypes.pop()).eval() if len(dtypes) == 1 else encoder.eval()


def _describe(part: nn.Module) -> dict[str, Any]:
    """What is needed to build a part again; ``custom`` where only the caller can."""
    if type(part) is ViT and type(part.stem) is nn.Linear:
        return {"kind": "vit", "config": part.config.to_dict()}
    if type(part) is PerceiverResampler:
        return {"kind": "perceiver", "config": part.config.to_dict()}
    if type(part) is MLPProjector:
        config = {"in_dim": part.in_dim, "out_dim": part.out_dim, "hidden_dim": part.mlp[0].out_features}
        return {"kind": "mlp", "config": config}
    if type(part) is PixelShuffleProjector:
        return {
            "kind": "pixel_shuffle",
            "config": {"in_dim": part.in_dim, "out_dim": part.out_dim, "factor": part.factor},
        }
    return {"kind": "custom", "class": f"{type(part).__module__}.{type(part).__qualname__}"}


def _rebuild(described: dict[str, Any], role: str) -> nn.Module:
    builders = {
        "vit": lambda config: ViT(ViTConfig.from_dict(config)),
        "perceiver": lambda config: PerceiverResampler(PerceiverConfig.from_dict(config)),
        "mlp": lambda config: MLPProjector(**config),
        "pixel_shuffle": lambda config: PixelShuffleProjector(**config),
    }
    if described["kind"] not in builders:
        raise ValueError(
            f"this encoder was saved with a {role} of class {described.get('class', described['kind'])}: "
            f"build it and pass {role}=..."
        )
    return builders[described["kind"]](described["config"])


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
    from safetensors.torch import save_file

    if not encoded:
        raise ValueError("no images to save")
    names = [""] * len(encoded) if names is None else list(names)
    images = [{"name": name, "plan": item.plan.to_dict()} for name, item in zip(names, encoded, strict=True)]
    tokens = torch.cat([item.tokens.detach().cpu() for item in encoded])
    metadata = {"format": "uhd-tokens-1", "images": json.dumps(images), "schema": json.dumps(schema.to_dict())}
    if note:
        metadata["note"] = note
    save_file({"tokens": tokens.contiguous()}, path, metadata=metadata)


def load_tokens(path: str | os.PathLike) -> list[EncodedImage]:
    """The inverse of :func:`save_tokens`.

    Raises:
        ValueError: Not such a file, or its counts disagree.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != "uhd-tokens-1":
            raise ValueError(f"{path} was not written by `uhd encode` (format {metadata.get('format')!r})")
        tokens = file.get_tensor("tokens")
    plans = [SlicePlan.from_dict(image["plan"]) for image in json.loads(metadata["images"])]
    schema = SpatialSchema.from_dict(json.loads(metadata["schema"]))
    counts = [p.num_visual_tokens for p in plans]
    if sum(counts) != len(tokens):
        raise ValueError(f"{path} holds {len(tokens)} tokens, its {len(plans)} plans count {sum(counts)}")
    return [EncodedImage(part, p, layout(p, schema)) for part, p in zip(tokens.split(counts), plans, strict=True)]
