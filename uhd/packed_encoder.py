"""Packed patches to packed tokens: a vision encoder and a compressor, which know views by their grids alone."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from uhd.grids import check_grids
from uhd.pixels import PixelSettings, reorder
from uhd.pixels.normalize import normalize
from uhd.ranks import gathered_dtype, is_sharded
from uhd.resampler import MergeProjector, MLPProjector, PixelShuffleProjector, PoolProjector
from uhd.shortcuts import at_its_fastest, float_parameter, transformed
from uhd.vision import ViT, ViTConfig
from uhd.vision.int8 import quantize_linears

STEP_NUMBERS = 4 << 20
"""Numbers in the widest activation that a CPU thread makes at once: 16 MiB in float32, which the caches hold."""

STEP_PATCHES = 1024
"""The same in patches, for vision encoders that do not tell their width."""

PROJECTORS = (MergeProjector, MLPProjector, PixelShuffleProjector, PoolProjector)


def split_steps(sizes: Sequence[int], bound: int | None) -> list[slice]:
    """Neighbouring items of these sizes in groups of at most ``bound`` in all; a larger item is a group of its own."""
    starts, filled = [0], 0
    for number, size in enumerate(sizes):
        if number > starts[-1] and bound is not None and filled + size > bound:
            starts.append(number)
            filled = 0
        filled += size
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(sizes)], strict=True)]


class PackedEncoder(nn.Module):
    """The half of :class:`uhd.VisualEncoder` that no plan enters; arguments and errors as there.

    Args:
        max_patches_per_step: Most patches that are encoded at once, which bounds the memory; a view is never divided.
            Results do not depend on it beyond rounding, unless a part looks at all views together, as BatchNorm does
            in training. ``None``: on a CPU in eval mode ``STEP_PATCHES`` for each thread, since activations then stay
            near the cores; else no bound. An attribute, not saved. Refused where FSDP or ZeRO-3 spread the parameters
            over ranks: these must all take the same steps, so there is no bound.
    """

    def __init__(
        self,
        vision: nn.Module,
        compressor: nn.Module,
        *,
        pixels: PixelSettings,
        max_patches_per_step: int | None = None,
    ) -> None:
        super().__init__()
        if not hasattr(vision, "patch_size"):
            raise TypeError(f"a vision encoder needs a patch_size, {type(vision).__name__} has none: see VisionTower")
        widths = getattr(vision, "out_dim", None), getattr(compressor, "in_dim", None)
        if None not in widths and widths[0] != widths[1]:
            raise ValueError(f"the vision encoder gives width {widths[0]}, the compressor takes {widths[1]}")
        self.vision, self.compressor = vision, compressor
        self.pixels = pixels
        self.max_patches_per_step = max_patches_per_step

    def extra_repr(self) -> str:
        """What ``repr`` says beside the parts: names of the rule and the layout, tokens of a view, and the note."""
        told = {name: getattr(getattr(self, name, None), "name", None) for name in ("slicing", "schema")}
        told["tokens_per_view"] = getattr(self.compressor, "tokens_per_view", None)
        told["note"] = getattr(self, "note", None) or None
        return ", ".join(f"{name}={value!r}" for name, value in told.items() if value is not None)

    @property
    def pixels(self) -> PixelSettings:
        """Mean, std and filter; others may be set, and are what is saved."""
        return self._pixels

    @pixels.setter
    def pixels(self, pixels: PixelSettings) -> None:
        if not isinstance(pixels, PixelSettings):
            raise TypeError(f"pixels must be PixelSettings with a mean and std, got {type(pixels).__name__}")
        pixels.mean_std()  # raises here rather than at the first image
        self._pixels = pixels

    @property
    def out_dim(self) -> int | None:
        """Width of the tokens, where the compressor tells it."""
        return getattr(self.compressor, "out_dim", None)

    def encode_packed(
        self,
        patches: Tensor,
        grids: Sequence[tuple[int, int]],
        *,
        inner: str = "chw",
        latents: Sequence[tuple[int, int] | None] = (),
    ) -> tuple[Tensor, list[int]]:
        """Packed patches (N, P), raw uint8 or normalised, of V views -> packed tokens (M, D) and V numbers of them.

        ``inner`` is the order inside the patches, see :class:`uhd.batch.SliceBatch`. ``latents``: (rows, columns) of
        each view's tokens, ``None`` for the compressor's own; nothing given: of no view.

        Raises:
            ValueError: A part returned another number of features or tokens than the grids hold; the compressor does
                not fit its latents to views.
        """
        grids = check_grids(grids)
        if len(patches) != (total := sum(h * w for h, w in grids)):
            raise ValueError(f"{len(grids)} grids hold {total} patches in all; got {len(patches)} patches")
        latents, done = self.asked(latents), []
        for part, views in self.steps(patches, grids):
            done.append(self._encode_step(part, views, inner, latents[: len(views)]))
            latents = latents[len(views) :]
        if len(done) == 1:
            return done[0]
        return torch.cat([tokens for tokens, _ in done]), [count for _, lengths in done for count in lengths]

    def asked(self, latents: Sequence[tuple[int, int] | None]) -> list[tuple[int, int] | None]:
        """Grids of latents, where any view asks for one; else none at all, since not every compressor takes them."""
        wanted = next((grid for grid in latents if grid is not None), None)
        if wanted is None:
            return []
        if not getattr(self.compressor, "fits_latents", False):
            raise ValueError(
                f"a view is planned with {tuple(wanted)} latents, and {type(self.compressor).__name__} does not fit "
                "its latents to views: take a PerceiverResampler with a square number of them, or leave the slicing's "
                "one_view_below and latents alone"
            )
        return list(latents)

    def steps(
        self, patches: Tensor, grids: tuple[tuple[int, int], ...]
    ) -> list[tuple[Tensor, tuple[tuple[int, int], ...]]]:
        """Patches (n, P) and grids of the views that are encoded at once; one step where there is no view."""
        sizes = [h * w for h, w in grids]
        steps = split_steps(sizes, self._step_bound(patches))
        if len(steps) < 2:
            return [(patches, grids)]
        parts = patches.split([sum(sizes[views]) for views in steps])
        return [(part, grids[views]) for part, views in zip(parts, steps, strict=True)]

    def _step_bound(self, patches: Tensor) -> int | None:
        bound = self.max_patches_per_step
        if is_sharded(self):  # in as many steps as the images ask for, each rank would gather another number of times
            if bound is not None:
                raise ValueError(
                    f"max_patches_per_step is {bound}, and the encoder's parameters are spread over ranks, which must "
                    "all take the same steps: set it to None, and bound the images of a batch"
                )
            return None
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

    def features(
        self, patches: Tensor, grids: tuple[tuple[int, int], ...], inner: str
    ) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
        """The vision encoder's features as the compressor takes them, and their grids."""
        anchor = float_parameter(self.vision, torch.zeros(()))
        # offloaded weights are on no device: whoever loads them moves what they are called on
        patches = patches.to(patches.device if anchor.is_meta else anchor.device)
        features = self._see(patches, grids, anchor.dtype, inner)
        if hasattr(self.vision, "output_grids"):
            grids = tuple(self.vision.output_grids(grids))
        if len(features) != (total := sum(h * w for h, w in grids)):
            told = f"vision returned {len(features)} features for {total} patches"
            raise ValueError(f"{told}: a vision encoder of another stride needs output_grids(grids)")
        weight = float_parameter(self.compressor, features)
        dtype = gathered_dtype(self.compressor, weight.dtype)
        return features.to(features.device if weight.is_meta else weight.device, dtype), grids

    def _encode_step(
        self,
        patches: Tensor,
        grids: tuple[tuple[int, int], ...],
        inner: str,
        latents: Sequence[tuple[int, int] | None] = (),
    ) -> tuple[Tensor, list[int]]:
        features, grids = self.features(patches, grids, inner)
        tokens = self.compressor(features, grids, latents) if latents else self._compress(features, grids)
        dense = tokens.dim() == 3
        lengths = [tokens.shape[1]] * len(tokens) if dense else list(self.compressor.output_lengths(grids))
        if latents:
            lengths = [own if grid is None else math.prod(grid) for own, grid in zip(lengths, latents, strict=True)]
        tokens = tokens.flatten(0, 1) if dense else tokens
        if len(tokens) != (total := sum(lengths)):
            raise ValueError(f"the compressor returned {len(tokens)} packed tokens, its output_lengths {total}")
        return tokens, lengths

    def _compress(self, features: Tensor, grids: tuple[tuple[int, int], ...]) -> Tensor:
        """The compressor's tokens; a projector's by the products that are fastest here."""
        if not isinstance(self.compressor, PROJECTORS):
            return self.compressor(features, grids)
        compressor = at_its_fastest(self.compressor, features)
        weight = float_parameter(compressor, features)
        return compressor(features.to(weight.dtype), grids).to(features.dtype)

    def compile(self, *, backend: str | None = "inductor") -> PackedEncoder:
        """Let the ViT keep what makes its inference faster, from now on; returns the encoder.

        Its weights are kept packed for oneDNN's products, where this machine multiplies fastest by these; else its
        layers are compiled at the first call, once for all blocks and all image sizes. See :mod:`uhd.vision.compiled`
        and :mod:`uhd.machine`. Resamplers have their own faster inference, compiled or not.

        Args:
            backend: Of ``torch.compile``; ``"none"`` leaves the layers uncompiled, in the faster dtype still; ``None``
                undoes. Where compiling fails, a ``RuntimeWarning`` says why and the layers run uncompiled.

        Raises:
            TypeError: The vision encoder is not :class:`uhd.vision.ViT`: compile the backbone itself.
            ValueError: There is no such backend.
        """
        self._packed_vit("compile").compile_blocks(backend)
        return self

    def quantize(self) -> PackedEncoder:
        """Make the linear layers of the ViT's blocks int8, in place and for good, for inference on a CPU.

        See :mod:`uhd.vision.int8`. Save before: a quantised encoder cannot be saved or trained. Returns the encoder.

        Raises:
            TypeError: The vision encoder is not :class:`uhd.vision.ViT`.
            ValueError: No linear layer is left: those that LoRA or others have wrapped stay as they are.
        """
        if not quantize_linears(self._packed_vit("quantize").blocks):
            raise ValueError("the ViT's blocks have no nn.Linear: they are quantised, wrapped or offloaded already")
        return self

    def _packed_vit(self, verb: str) -> ViT:
        if not isinstance(self.vision, ViT):
            kind = type(self.vision).__name__
            raise TypeError(f"the vision encoder is {kind}, not uhd.vision.ViT: {verb} its backbone before that")
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
