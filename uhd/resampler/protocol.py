"""What an encoder asks of a compressor, what those with latents share, and the check of packed features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from uhd.positions import sincos_2d


class Compressor(Protocol):
    """Anything that turns packed patch features into visual tokens.

    Called as `compressor(features (N, in_dim), grids)`: one (rows, columns) in patches for each of the V views, the
    views packed in that order, patches row-major. Returns (V, Q, out_dim) where every view gets the same number of
    tokens, else (N', out_dim) packed in the same order.
    """

    in_dim: int  # width of the features
    out_dim: int  # width of the tokens
    tokens_per_view: int | None  # Q, or None where it depends on the grid

    def __call__(self, features: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor: ...

    def output_lengths(self, grids: Sequence[tuple[int, int]]) -> list[int]:
        """Count the tokens of every view, in order."""
        ...


class LatentResampler(nn.Module):
    """Base of the resamplers that have Q learned latents, and so give Q tokens for every view.

    Attributes:
        config: what it was made from.
        in_dim, out_dim, tokens_per_view: D_v, D and Q.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.in_dim, self.out_dim, self.tokens_per_view = config.vision_width, config.width, config.num_latents

    def output_lengths(self, grids: Sequence[tuple[int, int]]) -> list[int]:
        """Count the tokens of every view: Q, whatever the grid."""
        return [self.tokens_per_view] * len(grids)

    def _make_kv_proj(self) -> nn.Module:
        """The features' projection to the latents' width, where these differ."""
        return nn.Identity() if self.in_dim == self.out_dim else nn.Linear(self.in_dim, self.out_dim, bias=False)

    def _latent_positions(self) -> Tensor:
        """Sines and cosines over the latents' own square grid, (Q, D)."""
        return sincos_2d(self.out_dim, (self.config.side, self.config.side))


def check_features(features: Tensor, grids: Sequence[tuple[int, int]], like: Tensor, in_dim: int) -> None:
    """Check that features fit the grids and the module's weights, of which `like` is one.

    Raises:
        ValueError: the shape does not fit `in_dim` or the sum of the grids' areas.
        TypeError: the dtype is not that of the weights, outside autocast.
    """
    rows = sum(h * w for h, w in grids)
    if features.dim() != 2 or features.shape[1] != in_dim:
        raise ValueError(f"features have shape {tuple(features.shape)}; expected (N, {in_dim}), all views packed")
    if features.shape[0] != rows:
        raise ValueError(
            f"features have {features.shape[0]} rows, but the {len(grids)} grids add up to {rows} patches"
        )
    if features.dtype != like.dtype and not torch.is_autocast_enabled(features.device.type):
        raise TypeError(f"features are {features.dtype} and the weights {like.dtype}: cast one, or use torch.autocast")
