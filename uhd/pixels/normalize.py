"""Raw pixels to what a vision encoder was trained on, ``(x / 255 - mean) / std``: in the patches or its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from uhd.grids import sent

from .patches import inner_axes, reorder
from .settings import PixelSettings


def normalize(patches: Tensor, settings: PixelSettings, *, inner: str = "chw") -> Tensor:
    """Turn raw patches into ``(x / 255 - mean) / std``, channel by channel.

    >>> half = PixelSettings(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    >>> normalize(torch.tensor([[0, 255, 51]], dtype=torch.uint8), half)
    tensor([[-1.0000,  1.0000, -0.6000]])

    Args:
        patches: (N, P) uint8.
        settings: With mean and std.
        inner: Order inside the patches, as :attr:`uhd.SliceBatch.inner`; it stays.

    Returns:
        (N, P) float32.

    Raises:
        ValueError: The settings have no mean and std, P is not three channels, or there is no such order.
        TypeError: The patches are not uint8, so they may be normalised already.
    """
    mean, std = settings.mean_std()
    if patches.dtype != torch.uint8:
        raise TypeError(f"only raw uint8 patches are normalised, got {patches.dtype}: they may be normalised already")
    if patches.ndim != 2 or patches.shape[1] % 3:
        raise ValueError(f"patches are (N, 3 * p * p), got {tuple(patches.shape)}")
    mean, std = (_sent(values, patches.device, torch.float32) for values in (mean, std))  # (3,)
    area = patches.shape[1] // 3
    if inner_axes(inner) == inner_axes("hwc"):  # rows as long as a patch are much quicker than rows of three
        return patches.to(torch.float32).mul_((1 / (255 * std)).repeat(area)).sub_((mean / std).repeat(area))
    channels = patches.unflatten(1, (3, area)).to(torch.float32)  # (N, 3, p * p)
    return channels.div_(255).sub_(mean[:, None]).div_(std[:, None]).flatten(1)


def fold_pixels(
    weight: Tensor, bias: Tensor | None, inner: str, mean_std: tuple[tuple[float, ...], tuple[float, ...]] | None
) -> tuple[Tensor, Tensor | None]:
    """Make a patch embedding take patches of another inner order, and raw pixels; differentiable.

        W ((x / 255 - mean) / std) + b  =  W' x + (b - W' (255 mean)),   W' = W / (255 std)

    It is made anew on every call, which costs less than normalising a few hundred patches: so it is never stale.

    Args:
        weight: (D, C*p*p), inner order (c, py, px).
        bias: (D,) or ``None``.
        inner: Order inside the patches that it will take.
        mean_std: C means and C standard deviations in 0..1 units; ``None`` for patches that are normalised already.
    """
    channels = 3 if mean_std is None else len(mean_std[0])
    if mean_std is not None:
        mean, std = (_sent(values, weight.device, weight.dtype)[:, None] for values in mean_std)  # (C, 1)
        weight = weight.unflatten(1, (channels, -1)) / (255 * std)  # (D, C, p*p)
        shift = (weight * (255 * mean)).sum(dim=(1, 2))
        weight, bias = weight.flatten(1), -shift if bias is None else bias - shift
    return reorder(weight, "chw", inner, channels=channels), bias


def _sent(values: Sequence[float], device: torch.device, dtype: torch.dtype) -> Tensor:
    return sent(torch.tensor(values, dtype=dtype, device="cpu"), device)
