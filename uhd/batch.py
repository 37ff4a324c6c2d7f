"""Every view of every image in one packed batch, without padding; the only place where its ``cu_seqlens`` is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uhd.grids import sent
from uhd.machine import in_threads
from uhd.pixels import DEFAULT, PixelSettings, cut, fold_into, inner_axes, reorder
from uhd.pixels.normalize import normalize
from uhd.slicing.plan import SlicePlan


@dataclass(frozen=True, eq=False)
class SliceBatch:
    """The views of I images as V packed sequences, N patches in all.

    Attributes:
        patches: (N, P), P = 3 * p * p; a view's patches are row-major. uint8: raw pixels. Floating: normalised, see
            :meth:`normalized`.
        cu_seqlens: (V + 1,) int32 beside ``patches``: view v is ``patches[cu_seqlens[v] : cu_seqlens[v + 1]]``.
        grids: V pairs (rows, columns) in patches, on the host: no length is ever read back from a device.
        plans: I plans; their views, in order, are the batch's.
        inner: Order of a patch's values: ``"chw"`` is (channel, py, px), as the weights of vision encoders are;
            ``"hwc"`` is (py, px, channel), as pixels lie in memory, which is quicker to make. See :meth:`ordered`.

    Raises:
        ValueError: Plans, grids, ``cu_seqlens`` and patches do not agree. The values of ``cu_seqlens`` are compared on
            the CPU only, since reading them elsewhere would wait for the device.
        TypeError: A tensor has a dtype that is not named above.

    >>> from uhd.slicing import plan
    >>> images = [np.zeros((672, 1008, 3), dtype=np.uint8), np.zeros((30, 40, 3), dtype=np.uint8)]
    >>> batch = SliceBatch.from_images(images, [plan(image.shape[:2]) for image in images])
    >>> batch.views_per_image, batch.grids[-1], tuple(batch.patches.shape)
    ((7, 1), (20, 27), (4547, 588))
    """

    patches: Tensor
    cu_seqlens: Tensor
    grids: tuple[tuple[int, int], ...]
    plans: tuple[SlicePlan, ...]
    inner: str = "chw"

    def __post_init__(self) -> None:
        object.__setattr__(self, "grids", tuple((int(rows), int(cols)) for rows, cols in self.grids))
        object.__setattr__(self, "plans", tuple(self.plans))
        inner_axes(self.inner)  # raises where there is no such order
        _check_grids(self.plans, self.grids)
        _check_patches(self.patches, self.plans, self.lengths)
        _check_cu_seqlens(self.cu_seqlens, self.patches.device, self.lengths)

    @classmethod
    def from_images(
        cls,
        images: Sequence[Any],
        plans: Sequence[SlicePlan],
        *,
        settings: PixelSettings = DEFAULT,
        patch_size: int | None = None,
        inner: str = "chw",
    ) -> SliceBatch:
        """Load, resize, cut and pack: a uint8 batch on the CPU.

        Args:
            images: I of anything :func:`uhd.pixels.load_image` takes. None at all gives a valid empty batch.
            plans: I plans, one an image.
            settings: How pixels are made.
            patch_size: Gives an empty batch, which has no plan, its P; otherwise P = 0 there.
            inner: The order inside a patch, see above.

        Raises:
            ValueError: There is not one plan an image, an image is not its plan's size, or it is refused.
        """
        _check_count("images", images, plans)

        def fill(image: Any, plan: SlicePlan, patches: np.ndarray) -> None:
            _fold(cut(image, plan, settings=settings), plan, patches, inner)

        return cls._filled(fill, images, plans, patch_size, inner)

    @classmethod
    def from_views(
        cls,
        views: Sequence[Sequence[np.ndarray]],
        plans: Sequence[SlicePlan],
        *,
        patch_size: int | None = None,
        inner: str = "chw",
    ) -> SliceBatch:
        """Pack views that are cut already, for example by :func:`uhd.pixels.render` in worker processes.

        Args:
            views: For each of I images its (h, w, 3) uint8 arrays, in the order of ``plan.views``.
            plans: I plans.
            patch_size, inner: As in :meth:`from_images`.

        Raises:
            ValueError: The number of images or of views, a view's shape or its dtype is not the plan's.
        """
        _check_count("lists of views", views, plans)
        for place, (of_image, plan) in enumerate(zip(views, plans, strict=True)):
            if len(of_image) != plan.num_views:
                raise ValueError(f"the plan of image {place} has {plan.num_views} views, got {len(of_image)}")
        return cls._filled(partial(_fold, inner=inner), views, plans, patch_size, inner)

    @classmethod
    def _filled(
        cls,
        fill: Callable[[Any, SlicePlan, np.ndarray], None],
        items: Sequence[Any],
        plans: Sequence[SlicePlan],
        patch_size: int | None,
        inner: str,
    ) -> SliceBatch:
        """Have ``fill(item, plan, its patches)`` write every image's part of the batch, on all threads."""
        inner_axes(inner)  # raises before anything is read
        side = _patch_size(plans) or patch_size or 0
        offsets = _offsets([plan.num_patches for plan in plans])
        patches = np.empty((offsets[-1], 3 * side**2), dtype=np.uint8)
        in_threads(fill, items, plans, [patches[start:stop] for start, stop in pairwise(offsets)])
        return cls.from_patches(torch.from_numpy(patches), plans, inner=inner)

    @classmethod
    def from_patches(cls, patches: Tensor, plans: Sequence[SlicePlan], *, inner: str = "chw") -> SliceBatch:
        """Make a batch of patches that were packed before, raw or normalised, on any device; check their number."""
        grids = tuple(view.patches_hw for plan in plans for view in plan.views)
        offsets = _offsets([rows * cols for rows, cols in grids])
        cu_seqlens = sent(torch.tensor(offsets, dtype=torch.int32, device="cpu"), patches.device)
        return cls(patches=patches, cu_seqlens=cu_seqlens, grids=grids, plans=tuple(plans), inner=inner)

    @classmethod
    def cat(cls, batches: Sequence[SliceBatch]) -> SliceBatch:
        """Join batches, images in order; the inverse of :meth:`split_images`. Mixed :attr:`inner` become ``"chw"``.

        Raises:
            ValueError: Patch sizes differ.
            TypeError: Raw and normalised patches, or two float dtypes, are mixed.
        """
        full = [batch for batch in batches if batch.plans] or list(batches[:1])
        if not full:
            return cls.from_patches(torch.empty(0, 0, dtype=torch.uint8), ())
        if len({batch.inner for batch in full}) > 1:
            full = [batch.ordered("chw") for batch in full]
        dtypes = {batch.patches.dtype for batch in full}
        if len(dtypes) > 1:
            raise TypeError(f"patches of one dtype can be joined, got {sorted(map(str, dtypes))}")
        plans = [plan for batch in full for plan in batch.plans]
        _patch_size(plans)  # before torch.cat complains about widths
        return cls.from_patches(torch.cat([batch.patches for batch in full]), plans, inner=full[0].inner)

    @property
    def num_views(self) -> int:
        """Number of views, V."""
        return len(self.grids)

    @property
    def views_per_image(self) -> tuple[int, ...]:
        """Number of views of each image."""
        return tuple(plan.num_views for plan in self.plans)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of patches of each view."""
        return tuple(rows * cols for rows, cols in self.grids)

    @property
    def max_seqlen(self) -> int:
        """The largest of :attr:`lengths`; 0 for an empty batch."""
        return max(self.lengths, default=0)

    def split(self) -> tuple[Tensor, ...]:
        """Split the patches into V tensors (rows * cols, P), which share memory with the batch."""
        return self.patches.split(self.lengths) if self.grids else ()

    def split_images(self) -> list[SliceBatch]:
        """Split into I batches of one image each, which share memory with this one; :meth:`cat` is the inverse."""
        if not self.plans:
            return []
        parts = self.patches.split([plan.num_patches for plan in self.plans])
        pairs = zip(parts, self.plans, strict=True)
        return [SliceBatch.from_patches(patches, [plan], inner=self.inner) for patches, plan in pairs]

    def normalized(self, settings: PixelSettings) -> SliceBatch:
        """Return the same batch with normalised float32 patches; see :func:`uhd.pixels.normalize.normalize`."""
        return replace(self, patches=normalize(self.patches, settings, inner=self.inner))

    def ordered(self, inner: str) -> SliceBatch:
        """Return the same batch with its patches in this order inside, itself where they are; see :attr:`inner`."""
        if inner == self.inner:
            return self
        return replace(self, patches=reorder(self.patches, self.inner, inner), inner=inner)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None, *, non_blocking: bool = False
    ) -> SliceBatch:
        """Move both tensors to ``device``, and cast normalised patches to ``dtype``.

        Raises:
            TypeError: ``dtype`` for raw uint8 patches: a cast would leave 0..255 where normalised values are meant.
        """
        if dtype is not None and dtype != self.patches.dtype and not self.patches.is_floating_point():
            raise TypeError(f"raw uint8 patches are not cast to {dtype}: call .normalized(settings) first")
        patches = self.patches.to(device=device, dtype=dtype, non_blocking=non_blocking)
        return replace(self, patches=patches, cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SliceBatch:
        """Copy both tensors to page-locked memory for ``to(..., non_blocking=True)``; a ``DataLoader`` does so too."""
        return replace(self, patches=self.patches.pin_memory(), cu_seqlens=self.cu_seqlens.pin_memory())


def _offsets(lengths: Sequence[int]) -> list[int]:
    return list(accumulate(lengths, initial=0))


def _fold(views: Sequence[np.ndarray], plan: SlicePlan, patches: np.ndarray, inner: str) -> None:
    """Write the views of one image to its patches (N, P)."""
    offsets = _offsets([view.num_patches for view in plan.views])
    for view, array, (start, stop) in zip(plan.views, views, pairwise(offsets), strict=True):
        if array.shape != (*view.size_hw, 3) or array.dtype != np.uint8:
            planned = f"view {view.index} ({view.kind}) of its image is planned as uint8 {(*view.size_hw, 3)}"
            raise ValueError(f"{planned}, got {array.dtype} {array.shape}: make it with uhd.pixels.render")
        fold_into(patches[start:stop], array, plan.patch_size, inner)


def _check_count(what: str, items: Sequence[Any], plans: Sequence[SlicePlan]) -> None:
    if len(items) != len(plans):
        raise ValueError(f"every image needs one plan: got {len(items)} {what} and {len(plans)} plans")


def _patch_size(plans: Sequence[SlicePlan]) -> int | None:
    sizes = sorted({plan.patch_size for plan in plans})
    if len(sizes) > 1:
        raise ValueError(f"the plans of a batch share one patch size, got {sizes} px: use one batch for each")
    return sizes[0] if sizes else None


def _check_grids(plans: tuple[SlicePlan, ...], grids: tuple[tuple[int, int], ...]) -> None:
    planned = [view.patches_hw for plan in plans for view in plan.views]
    if len(planned) != len(grids):
        raise ValueError(f"the {len(plans)} plans have {len(planned)} views, there are {len(grids)} grids")
    for place, (expected, grid) in enumerate(zip(planned, grids, strict=True)):
        if grid != expected:
            raise ValueError(f"view {place} is planned as {expected} patches (rows, columns), its grid is {grid}")


def _check_patches(patches: Tensor, plans: tuple[SlicePlan, ...], lengths: tuple[int, ...]) -> None:
    if patches.dtype != torch.uint8 and not patches.is_floating_point():
        raise TypeError(f"patches are uint8 (raw) or floating (normalised), got {patches.dtype}")
    if patches.ndim != 2 or patches.shape[0] != sum(lengths):
        raise ValueError(f"{len(lengths)} grids hold {sum(lengths)} patches, the tensor is {tuple(patches.shape)}")
    side = _patch_size(plans)
    if side is not None and patches.shape[1] != 3 * side**2:
        raise ValueError(f"patches of {side} px have 3 * {side}**2 = {3 * side**2} values, got {patches.shape[1]}")


def _check_cu_seqlens(cu_seqlens: Tensor, device: torch.device, lengths: tuple[int, ...]) -> None:
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens is int32, got {cu_seqlens.dtype}")
    if cu_seqlens.shape != (len(lengths) + 1,) or cu_seqlens.device != device:
        raise ValueError(
            f"cu_seqlens of {len(lengths)} views is ({len(lengths) + 1},) on {device}, "
            f"got {tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
        )
    if device.type == "cpu" and cu_seqlens.tolist() != _offsets(lengths):
        raise ValueError(f"the grids make cu_seqlens {_offsets(lengths)}, got {cu_seqlens.tolist()}")
