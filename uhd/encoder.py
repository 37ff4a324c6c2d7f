"""From images to visual tokens: a plan, a vision encoder and a compressor behind one call."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, overload

import torch
from torch import Tensor, nn

from uhd import saving
from uhd.attention import attention_maps
from uhd.batch import SliceBatch
from uhd.encoded import EncodedImage, EncodedVideo, num_rows
from uhd.loading import Errors, Preparation, named, one_size
from uhd.packed_encoder import PackedEncoder
from uhd.parts import find_pixels, load_vision
from uhd.pixels import PixelSettings
from uhd.resampler import FeaturePacker, PerceiverConfig, PerceiverResampler, pack_features
from uhd.resampler.stitch import feature_lengths
from uhd.schema import SpatialSchema, TokenLayout
from uhd.schema.counted import PLAIN, checked_layout, counted, video_layout
from uhd.slicing import SlicePlan, Slicing, SlicingLike, VideoPlan, find, plan_images, plan_video
from uhd.writing import is_file, read_whole


class _Call(Protocol):
    """:meth:`VisualEncoder.forward` for type checkers: ``errors="collect"`` and a function have their own results."""

    @overload
    def __call__(self, images: Callable[[], Tensor]) -> Tensor: ...

    @overload
    def __call__(
        self,
        images: Sequence[Any] | SliceBatch,
        *,
        max_tokens: int | None = None,
        multi_image: bool = False,
        errors: Literal["raise"] = "raise",
    ) -> list[EncodedImage]: ...

    @overload
    def __call__(
        self,
        images: Sequence[Any],
        *,
        max_tokens: int | None = None,
        multi_image: bool = False,
        errors: Literal["collect"],
    ) -> tuple[list[EncodedImage | None], Errors]: ...


class VisualEncoder(PackedEncoder):
    """Images of any sizes in, per-image visual tokens and layouts out.

    Any part may be the caller's own. ``vision(patches (N, P), grids) -> (N', D_v)`` needs a ``patch_size``; where its
    output has another grid than its input, ``output_grids(grids)``. ``compressor(features (N', D_v), grids)`` gives
    (V, Q, D) and then has ``tokens_per_view``, or packed (N'', D) and then has ``output_lengths(grids)``.

    Args:
        vision: The vision encoder, e.g. :class:`uhd.vision.ViT` or :class:`uhd.vision.VisionTower`.
        compressor: Turns a view's features into tokens, e.g. :class:`uhd.resampler.PerceiverResampler`.
        slicing: How images are cut: settings of the adaptive planner or of any strategy, the name of either (see
            :func:`uhd.strategies`), or your own function from (height, width) to a plan; ``None`` is
            ``"llava-uhd-safe"`` for this vision encoder. Counts and order are set to what the compressor and the
            schema say: a compressor with fixed ``tokens_per_view`` takes the place of a strategy's counts and packing.
            Of a ``nested`` one (OpenAI's) a view keeps as many of its first latents as the strategy counts for it.
            With ``latents="fitted"`` the plan's counts stay: the compressor fits its latents to them.
        schema: How tokens are laid out; ``None`` is the ``"llava-uhd"`` schema for the adaptive planner. Other
            strategies have none: views in their own order, learned newlines where their packing has them.
        packer: The learned embeddings of a strategy's packing; ``None`` makes new ones where a named strategy has any.
        pixels: Mean and std that the vision encoder was trained with, and a filter; with ``resample=None`` every rule
            has the one that it was released with.
        check_image_size: Require ``slicing.image_size`` to be the vision encoder's native size. Models for other sizes
            (MiniCPM-V: 448 px slices, a 980 px encoder) turn it off.
        note: What a user of the tokens must know, such as untrained weights: saved and shown until it is set to "".
        max_patches_per_step: See :class:`uhd.packed_encoder.PackedEncoder`.

    Raises:
        ValueError: Parts do not fit: another patch or image size, other widths, no mean and std.
    """

    __call__: _Call

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
        super().__init__(vision, compressor, pixels=pixels, max_patches_per_step=max_patches_per_step)
        self.check_image_size = check_image_size
        self.note = note
        self.packer = packer
        if slicing is None:
            side = getattr(vision, "image_size", None)
            slicing = find(None).for_vision(image_size=side, patch_size=vision.patch_size)
        self._fit(find(slicing), schema)

    @property
    def slicing(self) -> Slicing:
        """How images are cut and counted. Another may be set, by name too; a schema that does not fit gives way."""
        return self._slicing

    @slicing.setter
    def slicing(self, slicing: SlicingLike) -> None:
        rule = find(slicing)
        self._fit(rule, self.schema if rule.uses_schema == self.slicing.uses_schema else None)

    @property
    def schema(self) -> SpatialSchema:
        """How tokens are laid out. Another one may be set, by name too; the slicing's counts follow it."""
        return self._schema

    @schema.setter
    def schema(self, schema: SpatialSchema | str) -> None:
        self._fit(self.slicing, schema)

    def _fit(self, rule: Slicing, schema: SpatialSchema | str | None) -> None:
        schema = schema or ("llava-uhd" if rule.uses_schema else PLAIN)
        schema = schema if isinstance(schema, SpatialSchema) else SpatialSchema.preset(schema)
        _check_backbone(self.vision, rule, self.check_image_size)
        slicing = counted(rule, getattr(self.compressor, "tokens_per_view", None), schema)
        _check_latents(self.compressor, slicing)
        packer, changed = _fitted_packer(self.packer, slicing, self.compressor), hasattr(self, "_slicing")
        if changed and packer is not self.packer:
            saving.add_note(self, "the learned newlines have new, UNTRAINED weights")
        self.packer, self._slicing, self._schema = packer, slicing, schema

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
        self, images: Sequence[Any], *, max_tokens: int | None = None, multi_image: bool = False, errors: str = "raise"
    ) -> SliceBatch | tuple[SliceBatch, Errors]:
        """Load, plan, resize and cut images; uint8 patches on the CPU. For workers: :class:`uhd.Preparation`.

        Args:
            images: A list of what :func:`uhd.pixels.load_image` takes: PIL, path, bytes, array, tensor.
            max_tokens: Bound on the tokens of all images together; see :func:`uhd.slicing.plan_images`.
            multi_image: The images are one sample's, and are planned as the strategy does with several.
            errors: ``"collect"``: images that are refused are left out, see :class:`uhd.Preparation`.
        """
        return Preparation.of(self, errors=errors)(images, max_tokens=max_tokens, multi_image=multi_image)

    def forward(
        self,
        images: Sequence[Any] | SliceBatch | Callable[[], Tensor],
        *,
        max_tokens: int | None = None,
        multi_image: bool = False,
        errors: str = "raise",
    ) -> list[EncodedImage] | tuple[list[EncodedImage | None], Errors] | Tensor:
        """Encode a list of images, or a batch that :meth:`prepare` made; arguments as there.

        In eval mode an image's tokens are the same alone and among others, but for the last bits: matrix products of
        other sizes may be summed in another order. At most 4 eps of the dtype times the largest token is left of that.

        A function is called for its tensor: :meth:`encode` inside ``forward``, where FSDP gathers parameters.

        Returns:
            One :class:`EncodedImage` an image, on the encoder's device and in its dtype. With ``errors="collect"``
            that list, ``None`` where an image is refused, and ``{number: error}``.

        Raises:
            ValueError: The encoder was only described; a part returned another number of features or tokens than the
                plan counts.
        """
        if callable(images):
            return images()
        if not isinstance(images, SliceBatch):
            images = self.prepare(images, max_tokens=max_tokens, multi_image=multi_image, errors=errors)
        elif max_tokens is not None or multi_image or errors != "raise":
            raise ValueError("a prepared batch is planned already: give max_tokens, multi_image and errors to prepare")
        if errors == "collect":
            batch, refused = images
            some = iter(self(batch))
            return [None if n in refused else next(some) for n in range(len(batch.plans) + len(refused))], refused
        tokens, layouts = self._encode(images)
        parts = tokens.split([num_rows(p) for p in images.plans]) if images.plans else ()
        return [EncodedImage(*each) for each in zip(parts, images.plans, layouts, strict=True)]

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
        loaded = [_loaded_frames(prepare, video, number) for number, video in enumerate(videos)]
        sizes = [one_size(video, number) for number, video in enumerate(loaded)]
        options: dict[str, Any] = {"frames": frames, "max_tokens": max_tokens}
        plans = [self.plan_video(size, len(video), **options) for size, video in zip(sizes, loaded, strict=True)]
        flat = [frame for video in loaded for frame in video]
        tokens = self.encode(prepare.cut(flat, [p for video in plans for p in video.plans]), videos=plans)
        parts = tokens.split(list(map(num_rows, plans))) if plans else ()
        pairs = zip(parts, plans, strict=True)
        return [EncodedVideo(part, video, video_layout(video, self.schema)) for part, video in pairs]

    def encode(self, batch: SliceBatch, *, videos: Sequence[VideoPlan] = (), whole: bool = False) -> Tensor:
        """Encode all views of a batch: (the :func:`uhd.encoded.num_rows` of all, D), in order, with gradients.

        Errors as in :meth:`forward`. ``videos``: whose frames the images are; some end with a newline, a row more.
        ``whole``: embeddings of the packing that no image needs have a gradient too, which is 0.
        """
        return self._encode(batch, videos, whole)[0]

    def _encode(
        self, batch: SliceBatch, videos: Sequence[VideoPlan] = (), whole: bool = False
    ) -> tuple[Tensor, list[TokenLayout]]:
        """As :meth:`encode`, and each image's layout, whose counts are checked before anything is computed."""
        saving.refuse_described(self)
        layouts = [self._checked_layout(p, number) for number, p in enumerate(batch.plans)]
        latents = [view.latents_hw for p in batch.plans for view in p.views]
        tokens, lengths = self.encode_packed(batch.patches, batch.grids, inner=batch.inner, latents=latents)
        tokens, lengths = _nested(self, tokens, lengths, batch)
        wanted = [feature_lengths(p) for p in batch.plans]
        _check_tokens(batch, wanted, lengths, self.slicing)
        learned = {} if self.packer is None else self.packer()
        if any(p.packing is not None for p in batch.plans):
            packed = zip(tokens.split(list(map(sum, wanted))), batch.plans, strict=True)
            tokens = torch.cat([pack_features(part, p, **learned) for part, p in packed])
        if any(video.newline for video in videos):
            tokens = _with_newlines(tokens, videos, learned.get("newline"))
        if whole and learned:
            tokens = tokens + 0 * sum(embedding.sum() for embedding in learned.values()).to(tokens)
        return tokens, layouts

    attention = attention_maps

    def pack(self, features: Tensor, plan: SlicePlan) -> Tensor:
        """One image's compressed views, packed (n, D), to its tokens: :func:`uhd.resampler.pack_features`."""
        return pack_features(features, plan) if self.packer is None else self.packer(features, plan)

    def _checked_layout(self, plan: SlicePlan, number: int) -> TokenLayout:
        advice = "plan it with encoder.plan(image_hw)"
        if plan.patch_size != (patch_size := self.vision.patch_size):
            planned = f"image {number} is planned for patch_size={plan.patch_size}"
            raise ValueError(f"{planned}, the vision encoder has {patch_size}: {advice}")
        if self.schema == PLAIN:
            advice = "give the encoder the schema that they are in, or let the plan count none"
        return checked_layout(plan, self.schema, where=f"image {number}", advice=advice)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``model.safetensors`` and ``uhd_encoder.json`` at once: the encoder as it is, but no slicing function.

        Raises:
            ValueError: It is quantised, has a part of two dtypes, or shared weights; as :func:`uhd.writing.new_files`.
        """
        saving.save(self, folder)

    @classmethod
    def describe(cls, folder: str | os.PathLike[str]) -> VisualEncoder:
        """The encoder of a folder that :meth:`save_pretrained` wrote without its weights: it plans, and prepares.

        Its parameters are on torch's ``meta`` device, so that only ``uhd_encoder.json`` is read; encoding raises.

        Raises:
            ValueError: There is no such folder or description, it is damaged, or a part is the caller's own.
        """
        return saving.described(cls, Path(folder))

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | nn.Module,
        *,
        out_dim: int | None = None,
        num_latents: int | None = None,
        num_heads: int | None = None,
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
            num_latents, num_heads: Its latents (64; a slicing that fits them counts a view's) and heads (of 128, or
                wider). In a saved encoder they change the compressor: what is new then ``encoder.note`` says.
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
        given = {"num_latents": num_latents, "num_heads": num_heads}
        sizes = {name: size for name, size in given.items() if size is not None}
        if isinstance(slicing, str):
            find(slicing)  # a name that is none is no damage of the folder
        if sizes and compressor is not None:
            raise ValueError(f"{' and '.join(sizes)} are those of the compressor, which is given: build it with them")
        saved = None if isinstance(source, nn.Module) else Path(source) / saving.CONFIG_FILE
        if saved is not None and not saved.parent.is_dir():
            raise ValueError(f"{source} is not a folder; give a local one, nothing is downloaded")
        if saved is not None and is_file(saved):
            if out_dim is not None:
                raise ValueError(f"{source} holds a whole encoder; out_dim is only for a new compressor")
            parts = {"vision": vision, "compressor": compressor, "sizes": sizes}
            with read_whole(saved.parent, saved.name):
                return saving.load(cls, saved.parent, slicing=slicing, schema=schema, pixels=pixels, **parts)
        vision, new = load_vision(source) if vision is None else vision, compressor is None
        compressor = _new_resampler(vision, out_dim, find(slicing).fits_latents, sizes) if new else compressor
        pixels = find_pixels(source) if pixels is None else pixels
        encoder = cls(vision, compressor, slicing=slicing, schema=schema, pixels=pixels).eval()
        if new:
            saving.add_note(encoder, "the compressor has new, UNTRAINED weights")
        if encoder.packer is not None:
            saving.add_note(encoder, "the learned newlines have new, UNTRAINED weights")
        return encoder


def saved_encoder(folder: Path, strategy: str | None = None) -> VisualEncoder:
    """The encoder in a folder, its images cut by another rule that is fitted to it where one is named, for a command.

    Raises:
        ValueError: The folder holds none, or one that is damaged; no such rule, or none that fits.
    """
    if not is_file(folder / saving.CONFIG_FILE):
        raise ValueError(
            f"{folder} holds no {saving.CONFIG_FILE}: give a folder that VisualEncoder.save_pretrained wrote, of a "
            "model's eyes model.visual.save_pretrained"
        )
    if strategy is None:
        return VisualEncoder.from_pretrained(folder)
    try:
        rule = saving.fitted_rule(saving.described(VisualEncoder, folder), strategy)
    except ValueError:  # such as of a slicing that no file holds, whose place this one takes
        rule = find(strategy)
    encoder = VisualEncoder.from_pretrained(folder, slicing=rule)
    saving.check_given(encoder, strategy)
    return encoder


def _new_resampler(
    vision: nn.Module, out_dim: int | None, fits_latents: bool, sizes: dict[str, int]
) -> PerceiverResampler:
    if out_dim is None or not hasattr(vision, "out_dim"):
        raise ValueError(
            "a new compressor needs out_dim, the language model's hidden_size, and a vision encoder that "
            "tells its own out_dim; or pass compressor=..."
        )
    return PerceiverResampler(PerceiverConfig.for_new(out_dim, vision.out_dim, fits_latents=fits_latents, **sizes))


def _check_backbone(vision: nn.Module, slicing: Slicing, check_image_size: bool) -> None:
    patch_size, image_size = vision.patch_size, getattr(vision, "image_size", None)
    side = slicing.view_side
    wanted = (image_size if image_size and side and check_image_size else side, patch_size)
    if slicing.patch_size is not None and (side, slicing.patch_size) != wanted:
        raise ValueError(
            f"slicing {slicing.name!r} plans for image_size={side}, patch_size={slicing.patch_size}; the vision "
            f"encoder has image_size={image_size}, patch_size={patch_size}: use slicing.for_vision(image_size="
            f"{wanted[0]}, patch_size={patch_size}); slicing = uhd.strategy({slicing.name!r}), where you gave a name, "
            "with its settings. check_image_size=False lets it see at other sizes than its own"
        )


def _check_latents(compressor: nn.Module, rule: Slicing) -> None:
    if rule.fits_latents and not getattr(compressor, "fits_latents", False):
        raise ValueError(
            f"slicing {rule.name!r} fits latents to views (one_view_below, latents), {type(compressor).__name__} does "
            "not: take a PerceiverResampler with a square number of latents, or leave these settings alone"
        )


def _fitted_packer(packer: FeaturePacker | None, slicing: Slicing, compressor: nn.Module) -> FeaturePacker | None:
    """The given one, or a new one for the learned embeddings that a named strategy's packing needs, if any."""
    learned = slicing.learned
    if not learned or getattr(compressor, "tokens_per_view", None) is not None:
        return packer
    if packer is not None:
        missing = [kind for kind in learned if getattr(packer, kind) is None]
        if missing:
            raise ValueError(f"{slicing.name!r} needs learned embeddings, the packer has no {', '.join(missing)}")
        return packer
    out_dim = getattr(compressor, "out_dim", None)
    if out_dim is None:
        raise ValueError(
            f"{slicing.name!r} needs learned embeddings ({', '.join(learned)}), and {type(compressor).__name__} tells "
            "no out_dim, their width: give it one, or pass packer=uhd.resampler.FeaturePacker(width)"
        )
    weight = next(compressor.parameters(), torch.empty(0))
    packer = FeaturePacker(out_dim, **{kind: kind in learned for kind in saving.LEARNED})
    packer = packer.to(weight.dtype)
    return packer if weight.is_meta else packer.to(weight.device)


def _nested(encoder: VisualEncoder, tokens: Tensor, lengths: list[int], batch: SliceBatch) -> tuple[Tensor, list[int]]:
    wanted = [view.num_tokens for p in batch.plans for view in p.views]
    fixed = getattr(encoder.compressor, "tokens_per_view", None) is not None
    if wanted == lengths or len(wanted) != len(lengths) or not (fixed and encoder.slicing.nested):
        return tokens, lengths
    kept = [min(count, got) for count, got in zip(wanted, lengths, strict=True)]
    return torch.cat([part[:count] for part, count in zip(tokens.split(lengths), kept, strict=True)]), kept


def _check_tokens(batch: SliceBatch, wanted: Sequence[Sequence[int]], lengths: Sequence[int], rule: Slicing) -> None:
    """Raise a ``ValueError`` where the compressor gave other counts than the plans'."""
    views = [(number, view) for number, p in enumerate(batch.plans) for view in p.views]
    if len(lengths) != len(views):
        raise ValueError(f"the compressor returned {len(lengths)} views, the batch has {len(views)}")
    counts = [count for each in wanted for count in each]
    for (image, view), count, got in zip(views, counts, lengths, strict=True):
        if got != count:
            advice = f"give the compressor tokens_per_view = {got} if that is so for every view, or set slicing.merge"
            if not rule.uses_schema:
                advice = "take a compressor that gives as many, or set the strategy's merge or rate, if it has one"
            raise ValueError(
                f"image {image}, view {view.index} ({view.patches_hw[0]}x{view.patches_hw[1]} patches): the plan "
                f"counts {count} tokens, the compressor gave {got}: {advice}"
            )


def _with_newlines(tokens: Tensor, videos: Sequence[VideoPlan], newline: Tensor | None) -> Tensor:
    """The tokens of videos' frames, and a newline behind those of every video whose plan ends with one."""
    if newline is None:
        raise ValueError(
            "a video's plan ends with a newline, this model's strategy has none: its processor plans "
            "otherwise than this model"
        )
    end, rows = newline.to(tokens)[None], []
    for part, video in zip(tokens.split([num_rows(v) - v.newline for v in videos]), videos, strict=True):
        rows += [part, end] if video.newline else [part]
    return torch.cat(rows)


def _loaded_frames(prepare: Preparation, video: Any, number: int) -> list[Any]:
    if isinstance(video, (list, tuple)) or getattr(video, "ndim", None) == 4:
        with named("video", number):
            return prepare.load(list(video))
    shape = f" of shape {tuple(video.shape)}" if hasattr(video, "shape") else ""
    raise TypeError(
        f"video {number} is a {type(video).__name__}{shape}: expected a list of frames, or an array (T, h, w, c) or "
        "(T, c, h, w); one video comes in a list too"
    )
