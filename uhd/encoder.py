"""From images to visual tokens: a plan, a vision encoder and a compressor behind one call."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from uhd.batch import SliceBatch
from uhd.files import damage_named
from uhd.grids import check_grids
from uhd.loading import Preparation
from uhd.parts import describe_part, find_pixels, load_vision, rebuild_part
from uhd.pixels import PixelSettings, reorder
from uhd.pixels.normalize import normalize
from uhd.resampler import (
    FeaturePacker,
    MergeProjector,
    MLPProjector,
    PerceiverConfig,
    PerceiverResampler,
    PixelShuffleProjector,
    PoolProjector,
    pack_features,
)
from uhd.resampler.config import default_heads
from uhd.resampler.stitch import feature_lengths
from uhd.schema import SpatialSchema, TokenLayout
from uhd.schema.counted import PLAIN, counted, layout_of, slicing_from_dict, video_layout
from uhd.shortcuts import float_parameter, in_fastest_dtype, transformed
from uhd.slicing import SlicePlan, Slicing, SlicingLike, VideoPlan, find, plan_images, plan_video
from uhd.slicing.adaptive import RULES
from uhd.vision import ViT, ViTConfig
from uhd.vision.int8 import quantize_linears, refuse_int8

CONFIG_FILE = "uhd_encoder.json"
WEIGHTS_FILE = "model.safetensors"

STEP_NUMBERS = 4 << 20
"""Numbers in the widest activation that a CPU thread makes at once unless told otherwise, 16 MiB in float32: more
leaves the caches and, from 32 MiB on, comes as fresh pages from the system each time."""

STEP_PATCHES = 1024
"""The same in patches, for vision encoders that do not tell their width."""

PROJECTORS = (MergeProjector, MLPProjector, PixelShuffleProjector, PoolProjector)


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """One image's visual tokens, with the plan and the layout that say what they are.

    Attributes:
        tokens: (plan.num_visual_tokens, D), views in the order of ``plan.views``; no separators among them. Where the
            plan has a packing (LLaVA-NeXT's stitched maps, say) (plan.num_tokens, D), its learned newlines included.
        plan: Where the image was cut.
        layout: Where its views, "," and "\\n" go in the language model's sequence; one entry ``"image"`` where the
            plan has a packing. :func:`uhd.merge.assemble` takes tokens and layout of either kind.
    """

    tokens: Tensor
    plan: SlicePlan
    layout: TokenLayout

    @property
    def views(self) -> tuple[Tensor, ...]:
        """(q, D) for every view of ``plan.views``.

        Raises:
            ValueError: The plan has a packing: tokens belong to the image, not to its views.
        """
        if self.plan.packing is not None:
            raise ValueError(
                f"the {len(self.tokens)} tokens of {self.plan.strategy!r} are packed, not one view's each"
            )
        return self.tokens.split([view.num_tokens for view in self.plan.views])


@dataclass(frozen=True, eq=False)
class EncodedVideo:
    """A video's visual tokens.

    Attributes:
        tokens: (n, D): those of its frames, as in :class:`EncodedImage`, and the newline where ``plan`` has one.
        plan: How its frames were cut.
        layout: The frames' layouts one after the other, the newline as entry ``"newline"``.
    """

    tokens: Tensor
    plan: VideoPlan
    layout: TokenLayout


def _frames_of(video: Any, number: int) -> list[Any]:
    """The frames of one of the videos that were given."""
    if isinstance(video, (list, tuple)) or getattr(video, "ndim", None) == 4:
        return list(video)
    shape = f" of shape {tuple(video.shape)}" if hasattr(video, "shape") else ""
    raise TypeError(
        f"video {number} is a {type(video).__name__}{shape}: expected a list of frames, or an array (T, h, w, c) or "
        "(T, c, h, w). Videos come as a list of them: put the frames of one video into a list of their own"
    )


def split_steps(sizes: Sequence[int], bound: int | None) -> list[slice]:
    """Neighbouring items of these sizes in groups of at most ``bound`` in all; a larger item is a group of its own."""
    starts, filled = [0], 0
    for number, size in enumerate(sizes):
        if number > starts[-1] and bound is not None and filled + size > bound:
            starts.append(number)
            filled = 0
        filled += size
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(sizes)], strict=True)]


def num_rows(plan: SlicePlan) -> int:
    """Rows of an image's :attr:`EncodedImage.tokens`."""
    return plan.num_visual_tokens if plan.packing is None else plan.num_tokens


class VisualEncoder(nn.Module):
    """Images of any sizes in, per-image visual tokens and layouts out.

    Any part may be the caller's own. ``vision(patches (N, P), grids) -> (N', D_v)`` needs a ``patch_size``; where its
    output has another grid than its input, ``output_grids(grids)``. ``compressor(features (N', D_v), grids)`` gives
    (V, Q, D), or packed (N'', D) and then has ``output_lengths(grids)``.

    Args:
        vision: The vision encoder, e.g. :class:`uhd.vision.ViT` or :class:`uhd.vision.VisionTower`.
        compressor: Turns a view's features into tokens, e.g. :class:`uhd.resampler.PerceiverResampler`.
        slicing: How images are cut: settings of the adaptive planner or of any strategy, the name of either (see
            :func:`uhd.strategies`), or your own function from (height, width) to a plan; ``None`` is
            ``"llava-uhd-safe"`` for this vision encoder. Counts and order are set to what the compressor and the
            schema say: a compressor with fixed ``tokens_per_view`` takes the place of a strategy's counts and packing.
            Where the strategy is ``nested`` (OpenAI's), a view keeps as many of its first latents as the strategy
            counts for it.
        schema: How tokens are laid out; ``None`` is the ``"llava-uhd"`` schema for the adaptive planner. Other
            strategies then have none: views in their own order, learned newlines where their packing has them.
        packer: The learned embeddings of a strategy's packing; ``None`` makes new ones where a named strategy has any.
        pixels: Mean and std that the vision encoder was trained with, and a filter; with ``resample=None`` every rule
            has the one that it was released with.
        check_image_size: Require ``slicing.image_size`` to be the vision encoder's native size. Models that are meant
            for other sizes (MiniCPM-V: 448 px slices, a 980 px encoder) turn it off.
        note: What a user of the tokens must know, such as untrained weights. Saved, and shown by the command line;
            set ``encoder.note = ""`` once it is no longer true.
        max_patches_per_step: Most patches that are encoded at once, which bounds the memory that is needed beside
            patches and tokens; a view is never divided, so one that has more is a step of its own. Results do not
            depend on it beyond rounding, unless a part looks at all views together, as BatchNorm does in training.
            ``None``: on a CPU in eval mode ``STEP_PATCHES`` for each thread, since activations then stay near the
            cores; else no bound. An attribute, not saved.

    Raises:
        ValueError: Parts do not fit: another patch or image size, other widths, no mean and std.
    """

    def __init__(
        self,
        vision: nn.Module,
        compressor: nn.Module,
        *,
        slicing: SlicingLike | None = None,
        schema: SpatialSchema | str | None = None,
        pixels: PixelSettings,
        packer: FeaturePacker | None = None,
        check_image_size: bool = True,
        note: str = "",
        max_patches_per_step: int | None = None,
    ) -> None:
        super().__init__()
        self.max_patches_per_step = max_patches_per_step
        if not isinstance(pixels, PixelSettings):
            raise TypeError(f"pixels must be PixelSettings with a mean and std, got {type(pixels).__name__}")
        pixels.mean_std()  # raises here rather than at the first image
        if not hasattr(vision, "patch_size"):
            raise TypeError(f"a vision encoder needs a patch_size, {type(vision).__name__} has none: see VisionTower")
        self.vision, self.compressor, self.pixels = vision, compressor, pixels
        rule = self._default_slicing() if slicing is None else find(slicing)
        if schema is None and not rule.uses_schema:
            schema = PLAIN
        self.schema = schema if isinstance(schema, SpatialSchema) else SpatialSchema.preset(schema or "llava-uhd")
        self.check_image_size = check_image_size
        self.note = note
        self._check_widths()
        self._check_backbone(rule)
        self.slicing = counted(rule, getattr(compressor, "tokens_per_view", None), self.schema)
        self.packer = self._fitted_packer(packer)

    def _check_widths(self) -> None:
        widths = getattr(self.vision, "out_dim", None), getattr(self.compressor, "in_dim", None)
        if None not in widths and widths[0] != widths[1]:
            raise ValueError(
                f"the vision encoder gives features of width {widths[0]}, the compressor takes {widths[1]}"
            )

    def _default_slicing(self) -> Slicing:
        return find(None).for_vision(
            image_size=getattr(self.vision, "image_size", None), patch_size=self.vision.patch_size
        )

    def _check_backbone(self, slicing: Slicing) -> None:
        """The slicing plans for this vision encoder, unless only its plans tell what it plans for."""
        patch_size, image_size = self.vision.patch_size, getattr(self.vision, "image_size", None)
        side = slicing.view_side
        wanted = (image_size if image_size and side and self.check_image_size else side, patch_size)
        if slicing.patch_size is not None and (side, slicing.patch_size) != wanted:
            raise ValueError(
                f"slicing {slicing.name!r} plans for image_size={side}, "
                f"patch_size={slicing.patch_size}; the vision encoder has image_size={image_size}, "
                f"patch_size={patch_size}: use slicing.for_vision(image_size={wanted[0]}, patch_size={wanted[1]}); "
                f"slicing = uhd.strategy({slicing.name!r}), where you gave its name"
            )

    def _fitted_packer(self, packer: FeaturePacker | None) -> FeaturePacker | None:
        """The given one, or a new one for the learned embeddings that a named strategy's packing needs, if any."""
        learned = self.slicing.learned
        if not learned or getattr(self.compressor, "tokens_per_view", None) is not None:
            return packer
        if packer is not None:
            missing = [kind for kind in learned if getattr(packer, kind) is None]
            if missing:
                raise ValueError(
                    f"{self.slicing.name!r} needs learned embeddings, the packer has none for {', '.join(missing)}"
                )
            return packer
        if self.out_dim is None:
            raise ValueError(
                f"{self.slicing.name!r} needs learned embeddings ({', '.join(learned)}) as wide as the tokens, and "
                f"the compressor {type(self.compressor).__name__} has no out_dim: give it one, or pass "
                "packer=uhd.resampler.FeaturePacker(width)"
            )
        weight = next(self.compressor.parameters(), torch.empty(0))
        packer = FeaturePacker(self.out_dim, newline="newline" in learned, separator="separator" in learned)
        return packer.to(weight.device, weight.dtype)

    @property
    def out_dim(self) -> int | None:
        """Width of the tokens, where the compressor tells it."""
        return getattr(self.compressor, "out_dim", None)

    def plan(self, image_hw: tuple[int, int]) -> SlicePlan:
        """The plan this encoder makes for an image of this (height, width), px."""
        return self.slicing.plan(image_hw)

    def plan_images(
        self, sizes_hw: Sequence[tuple[int, int]], *, max_tokens: int | None = None, multi_image: bool = False
    ) -> tuple[SlicePlan, ...]:
        """The plans of one sample's images, by :func:`uhd.slicing.plan_images` with this encoder's counts."""
        return plan_images(sizes_hw, self.slicing, max_tokens=max_tokens, multi_image=multi_image)

    def plan_video(
        self, frame_hw: tuple[int, int], num_frames: int, *, frames: str = "video", max_tokens: int | None = None
    ) -> VideoPlan:
        """The plan of a video, by :func:`uhd.slicing.plan_video` with this encoder's counts."""
        return plan_video(frame_hw, num_frames, self.slicing, frames=frames, max_tokens=max_tokens)

    def prepare(
        self, images: Sequence[Any], *, max_tokens: int | None = None, multi_image: bool = False
    ) -> SliceBatch:
        """Load, plan, resize and cut images; uint8 patches on the CPU. For workers: :class:`uhd.Preparation`.

        Args:
            images: A list of what :func:`uhd.pixels.load_image` takes: PIL, path, bytes, array, tensor.
            max_tokens: Bound on the tokens of all images together; see :func:`uhd.slicing.plan_images`.
            multi_image: The images are one sample's, and are planned as the strategy does with several.
        """
        return Preparation.of(self)(images, max_tokens=max_tokens, multi_image=multi_image)

    def forward(
        self, images: Sequence[Any] | SliceBatch, *, max_tokens: int | None = None, multi_image: bool = False
    ) -> list[EncodedImage]:
        """Encode a list of images, or a batch that :meth:`prepare` made.

        Args:
            images: As in :meth:`prepare`, or its result, which is planned already.
            max_tokens, multi_image: As in :meth:`prepare`.

        Returns:
            One :class:`EncodedImage` an image, on the encoder's device and in its dtype.

        Raises:
            ValueError: A part returned another number of features or tokens than the plan counts.
        """
        if not isinstance(images, SliceBatch):
            images = self.prepare(images, max_tokens=max_tokens, multi_image=multi_image)
        elif max_tokens is not None or multi_image:
            raise ValueError("a prepared batch is planned already: give max_tokens and multi_image to prepare")
        return self._split(self.encode(images), images.plans)

    def _split(self, tokens: Tensor, plans: Sequence[SlicePlan]) -> list[EncodedImage]:
        parts = tokens.split([num_rows(p) for p in plans]) if plans else ()
        return [EncodedImage(part, p, layout_of(p, self.schema)) for part, p in zip(parts, plans, strict=True)]

    def encode_videos(
        self, videos: Sequence[Sequence[Any]], *, frames: str = "video", max_tokens: int | None = None
    ) -> list[EncodedVideo]:
        """Encode videos, each a list of equally large frames.

        Args:
            videos: A list of videos: each a list of what :func:`uhd.pixels.load_image` takes, or an array or tensor
                (T, h, w, c) or (T, c, h, w).
            frames: As in :func:`uhd.slicing.plan_video`: ``"video"``, ``"single"`` or ``"rule"``.
            max_tokens: Bound on the tokens of each video.

        Raises:
            ValueError: A video has no frames, or frames of different sizes; as in :meth:`forward`.
        """
        prepare = Preparation.of(self)
        loaded = [prepare.load(_frames_of(video, number)) for number, video in enumerate(videos)]
        plans = []
        for number, video in enumerate(loaded):
            sizes = sorted({(frame.height, frame.width) for frame in video})
            if len(sizes) != 1:
                raise ValueError(
                    f"video {number} has {len(video)} frames of the sizes {sizes} (height, width): need one size"
                )
            plans.append(self.plan_video(sizes[0], len(video), frames=frames, max_tokens=max_tokens))
        flat = [frame for video in loaded for frame in video]
        tokens = self.encode(prepare.cut(flat, [p for video in plans for p in video.plans]))
        parts = tokens.split([sum(map(num_rows, video.plans)) for video in plans]) if plans else ()
        return [self._finish_video(part, video) for part, video in zip(parts, plans, strict=True)]

    def _finish_video(self, tokens: Tensor, video: VideoPlan) -> EncodedVideo:
        if video.newline:
            tokens = torch.cat([tokens, self.packer.newline.to(tokens).unsqueeze(0)])
        return EncodedVideo(tokens, video, video_layout(video, self.schema))

    def encode(self, batch: SliceBatch) -> Tensor:
        """All views of a batch -> the :func:`num_rows` of all images, D; in order. The part with gradients."""
        self._check_batch(batch)
        tokens, lengths = self.encode_packed(batch.patches, batch.grids, inner=batch.inner)
        tokens, lengths = self._nested(tokens, lengths, batch)
        self._check_tokens(batch, lengths)
        if all(p.packing is None for p in batch.plans):
            return tokens
        parts = tokens.split([sum(feature_lengths(p)) for p in batch.plans])
        return torch.cat([self.pack(part, p) for part, p in zip(parts, batch.plans, strict=True)])

    def _nested(self, tokens: Tensor, lengths: list[int], batch: SliceBatch) -> tuple[Tensor, list[int]]:
        """The first latents of every view, as many as its plan counts, where the rule says that counts nest."""
        wanted = [view.num_tokens for p in batch.plans for view in p.views]
        fixed = getattr(self.compressor, "tokens_per_view", None) is not None
        if wanted == lengths or len(wanted) != len(lengths) or not (fixed and self.slicing.nested):
            return tokens, lengths
        kept = [min(count, got) for count, got in zip(wanted, lengths, strict=True)]
        return torch.cat([part[:count] for part, count in zip(tokens.split(lengths), kept, strict=True)]), kept

    def pack(self, features: Tensor, plan: SlicePlan) -> Tensor:
        """One image's compressed views, packed (n, D), to its tokens: :func:`uhd.resampler.pack_features`."""
        return pack_features(features, plan) if self.packer is None else self.packer(features, plan)

    def encode_packed(
        self, patches: Tensor, grids: Sequence[tuple[int, int]], *, inner: str = "chw"
    ) -> tuple[Tensor, list[int]]:
        """Packed patches (N, P), raw uint8 or normalised, of V views -> packed tokens (M, D) and V numbers of them.

        ``inner`` is the order inside the patches, see :class:`uhd.batch.SliceBatch`.

        Raises:
            ValueError: A part returned another number of features or tokens than the grids hold.
        """
        grids = check_grids(grids)
        if len(patches) != (total := sum(h * w for h, w in grids)):
            raise ValueError(f"{len(grids)} grids hold {total} patches in all; got {len(patches)} patches")
        steps = split_steps([h * w for h, w in grids], self._step_bound(patches))
        if len(steps) < 2:
            return self._encode_step(patches, grids, inner)
        tokens, lengths, first = [], [], 0
        for views in steps:
            last = first + sum(h * w for h, w in grids[views])
            part, counts = self._encode_step(patches[first:last], grids[views], inner)
            tokens.append(part)
            lengths += counts
            first = last
        return torch.cat(tokens), lengths

    def _step_bound(self, patches: Tensor) -> int | None:
        """Patches of a step at most, ``None`` without a bound."""
        bound = self.max_patches_per_step
        if bound is not None:
            if isinstance(bound, bool) or not hasattr(bound, "__index__") or bound < 1:
                raise ValueError(f"max_patches_per_step must be a positive integer or None, got {bound!r}")
            return operator.index(bound)
        device = float_parameter(self.vision, patches).device
        if self.training or device.type != "cpu" or transformed():
            return None
        config = getattr(self.vision, "config", None)
        patches = max(STEP_NUMBERS // config.mlp_width, 1) if isinstance(config, ViTConfig) else STEP_PATCHES
        return patches * torch.get_num_threads()

    def _encode_step(
        self, patches: Tensor, grids: tuple[tuple[int, int], ...], inner: str
    ) -> tuple[Tensor, list[int]]:
        """As :meth:`encode_packed`, all at once."""
        anchor = float_parameter(self.vision, torch.zeros(()))
        # offloaded weights are on no device: whoever loads them moves what they are called on
        patches = patches.to(patches.device if anchor.is_meta else anchor.device)
        features = self._see(patches, grids, anchor.dtype, inner)
        grids = self._output_grids(grids)
        if len(features) != sum(h * w for h, w in grids):
            raise ValueError(
                f"vision returned {len(features)} features for {sum(h * w for h, w in grids)} patches: "
                "a vision encoder of another stride needs output_grids(grids)"
            )
        weight = float_parameter(self.compressor, features)
        features = features.to(features.device if weight.is_meta else weight.device, weight.dtype)
        tokens = self._compress(features, grids)
        dense = tokens.dim() == 3
        lengths = [tokens.shape[1]] * len(tokens) if dense else list(self.compressor.output_lengths(grids))
        tokens = tokens.flatten(0, 1) if dense else tokens
        if len(tokens) != sum(lengths):
            raise ValueError(
                f"the compressor returned {len(tokens)} packed tokens, its output_lengths add up to {sum(lengths)}"
            )
        return tokens, lengths

    def _compress(self, features: Tensor, grids: tuple[tuple[int, int], ...]) -> Tensor:
        """The compressor's tokens; a projector of a compiled encoder in the dtype that is fastest here."""
        if not (getattr(self.vision, "compiled", False) and isinstance(self.compressor, PROJECTORS)):
            return self.compressor(features, grids)
        compressor = in_fastest_dtype(self.compressor, features)
        weight = float_parameter(compressor, features)
        return compressor(features.to(weight.dtype), grids).to(features.dtype)

    def compile(self, *, backend: str | None = "inductor") -> VisualEncoder:
        """Run the ViT by compiled layers wherever no gradients are wanted, from now on; returns the encoder.

        The layers are compiled at the first call, once for all blocks and all image sizes. A ViT in bfloat16 or
        float16 on a CPU without a matrix unit for these computes in float32, and so does a projector behind it; with
        one the ViT's weights are kept packed. See :mod:`uhd.vision.compiled`. Resamplers have their own faster
        inference, compiled or not.

        Args:
            backend: Of ``torch.compile``; ``"none"`` leaves the layers uncompiled, in the faster dtype still; ``None``
                undoes. Where compiling fails, a ``RuntimeWarning`` says why and the layers run uncompiled.

        Raises:
            TypeError: The vision encoder is not :class:`uhd.vision.ViT`: compile the backbone itself.
            ValueError: There is no such backend.
        """
        self._packed_vit("compile").compile_blocks(backend)
        return self

    def quantize(self) -> VisualEncoder:
        """Make the linear layers of the ViT's blocks int8, in place and for good, for inference on a CPU.

        See :mod:`uhd.vision.int8`. Save before: a quantised encoder cannot be saved or trained. Returns the encoder.

        Raises:
            TypeError: The vision encoder is not :class:`uhd.vision.ViT`.
            ValueError: There is no linear layer left that could be quantised: those that LoRA or others have wrapped
                stay as they are.
        """
        if not quantize_linears(self._packed_vit("quantize").blocks):
            raise ValueError("the ViT's blocks have no nn.Linear: they are quantised, wrapped or offloaded already")
        return self

    def _packed_vit(self, verb: str) -> ViT:
        if not isinstance(self.vision, ViT):
            raise TypeError(
                f"only uhd.vision.ViT can be {verb}d here, the vision encoder is {type(self.vision).__name__}: "
                f"{verb} its backbone before it is wrapped"
            )
        return self.vision

    def _see(self, patches: Tensor, grids: tuple[tuple[int, int], ...], dtype: torch.dtype, inner: str) -> Tensor:
        """The vision encoder's features, by the shortest way from raw pixels that it knows."""
        if inner != "chw" and not getattr(self.vision, "folds_pixels", False):
            patches, inner = reorder(patches, inner, "chw"), "chw"
        how = {} if inner == "chw" else {"inner": inner}
        if not patches.is_floating_point() and how and dtype == torch.float32:
            return self.vision(patches, grids, mean_std=self.pixels.mean_std(), **how)
        if not patches.is_floating_point():
            patches = normalize(patches, self.pixels, inner=inner)
        return self.vision(patches.to(dtype), grids, **how)

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
            separators = layout_of(p, self.schema).num_separators
            if p.packing is None and p.num_separators != separators:
                advice = "plan it with encoder.plan(image_hw)"
                if self.schema == PLAIN:
                    advice = "give the encoder the schema that they are in, or let the plan count none"
                raise ValueError(
                    f"image {number} is planned by {p.strategy!r} with {p.num_separators} separators, schema "
                    f"{self.schema.name!r} has {separators}: {advice}"
                )

    def _check_tokens(self, batch: SliceBatch, lengths: list[int]) -> None:
        views = [(number, view) for number, p in enumerate(batch.plans) for view in p.views]
        if len(lengths) != len(views):
            raise ValueError(f"the compressor returned {len(lengths)} views, the batch has {len(views)}")
        wanted = [count for p in batch.plans for count in feature_lengths(p)]
        for (image, view), count, got in zip(views, wanted, lengths, strict=True):
            if got != count:
                advice = "set slicing.tokens_per_view, or slicing.merge to the patches that one token covers per side"
                if not self.slicing.uses_schema:
                    advice = "take a compressor that gives as many, or set the strategy's merge or rate, if it has one"
                raise ValueError(
                    f"image {image}, view {view.index} ({view.patches_hw[0]}x{view.patches_hw[1]} patches): the plan "
                    f"counts {count} tokens, the compressor gave {got}: {advice}"
                )

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write ``model.safetensors`` and ``uhd_encoder.json`` (parts, slicing, schema, mean and std).

        A slicing function of the caller's own is not written: loading asks for it.
        """
        refuse_int8(self)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "format": 1,
            "vision": describe_part(self.vision),
            "compressor": describe_part(self.compressor),
            "slicing": self.slicing.to_dict(),
            "packer": self.packer and self.packer.to_dict(),
            "schema": self.schema.to_dict(),
            "pixels": self.pixels.to_dict(),
            "check_image_size": self.check_image_size,
            "note": self.note,
        }
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        try:
            save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        except RuntimeError as problem:  # before the config is written, so that an older save stays whole
            raise ValueError(f"weights that share memory cannot be saved: untie them first. {problem}") from None
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike | nn.Module,
        *,
        out_dim: int | None = None,
        vision: nn.Module | None = None,
        compressor: nn.Module | None = None,
        slicing: SlicingLike | None = None,
        schema: SpatialSchema | str | None = None,
        pixels: PixelSettings | None = None,
    ) -> VisualEncoder:
        """An encoder that was saved, or a new one around a pretrained vision model.

        A released model with its own compressor is read by :func:`uhd.pretrained.load`.

        Args:
            source: A folder written by :meth:`save_pretrained`; or a Hugging Face folder or model with a CLIP, SigLIP,
                SigLIP2 or DINOv2 vision encoder, or a timm ViT. The latter get a new, untrained perceiver resampler,
                and ``encoder.note`` says so. Nothing is downloaded.
            out_dim: Width of that resampler's tokens, the language model's ``hidden_size``.
            vision, compressor: The caller's own parts. Needed to load an encoder that was saved with such.
            slicing, schema: As in the constructor; they replace what was saved. A schema for the adaptive planner does
                not outlive another strategy, nor the other way round: the default is taken. Newlines that the saved
                encoder had none of are new, and ``encoder.note`` says so.
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
        vision, note = load_vision(source) if vision is None else vision, ""
        if compressor is None:
            if out_dim is None or not hasattr(vision, "out_dim"):
                raise ValueError(
                    "a new compressor needs out_dim, the language model's hidden_size, and a vision encoder that "
                    "tells its own out_dim; or pass compressor=..."
                )
            compressor = PerceiverResampler(
                PerceiverConfig(width=out_dim, vision_width=vision.out_dim, num_heads=default_heads(out_dim))
            )
            note = "the compressor has new, UNTRAINED weights"
        pixels = find_pixels(source) if pixels is None else pixels
        return cls(vision, compressor, slicing=slicing, schema=schema, pixels=pixels, note=note).eval()

    @classmethod
    def _load(
        cls,
        folder: Path,
        vision: nn.Module | None,
        compressor: nn.Module | None,
        slicing: SlicingLike | None,
        schema: SpatialSchema | str | None,
        pixels: PixelSettings | None,
    ) -> VisualEncoder:
        with damage_named(folder / CONFIG_FILE):
            config = json.loads((folder / CONFIG_FILE).read_text())
            if config["format"] != 1:
                raise ValueError(f"it has format {config['format']!r}; this version reads format 1")
            saved = config["slicing"]
            if schema is None and (slicing is None or find(slicing).uses_schema == (saved.get("rule") in RULES)):
                schema = SpatialSchema.from_dict(config["schema"])
            encoder = cls(
                rebuild_part(config["vision"], "vision") if vision is None else vision,
                rebuild_part(config["compressor"], "compressor") if compressor is None else compressor,
                slicing=slicing_from_dict(saved) if slicing is None else slicing,
                schema=schema,
                pixels=PixelSettings.from_dict(config["pixels"]) if pixels is None else pixels,
                check_image_size=config["check_image_size"],
                note=config["note"],
            )
        new = encoder._take_packer(config.get("packer"))
        with damage_named(folder / WEIGHTS_FILE):
            # assigned, not copied: every tensor keeps the dtype it was saved in
            found = encoder.load_state_dict(load_file(folder / WEIGHTS_FILE), strict=False, assign=True)
            missing = [name for name in found.missing_keys if name not in new]
            if missing or found.unexpected_keys:
                raise ValueError(f"missing {missing}, unexpected {found.unexpected_keys}")
        if new:
            note = f"{', '.join(new)}: new, UNTRAINED weights, since the saved encoder had another slicing"
            encoder.note = "; ".join(filter(None, (encoder.note, note)))
        return encoder.eval()

    def _take_packer(self, saved: dict[str, Any] | None) -> list[str]:
        """Make room for a saved packer's embeddings; returns the names of those that are needed and were not saved."""
        saved = saved or {"newline": False, "separator": False}
        kinds = ("newline", "separator")
        own = {kind: getattr(self.packer, kind, None) is not None for kind in kinds}
        if any(saved[kind] and not own[kind] for kind in kinds):
            width = saved["width"]
            self.packer = FeaturePacker(width, **{kind: saved[kind] or own[kind] for kind in kinds})
        return [f"packer.{kind}" for kind in kinds if own[kind] and not saved[kind]]
