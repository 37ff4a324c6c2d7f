"""What an encoder asks of a compressor, and the base of those here, which checks what comes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from uhd.grids import Grid, check_grids
from uhd.shortcuts import float_parameter


class Compressor(Protocol):
    """Anything that turns packed patch features into visual tokens.

    Called as `compressor(features (N, in_dim), grids)`: one (rows, columns) in patches for each of the V views, the
    views packed in that order, patches row-major. Returns (V, Q, out_dim) where every view gets the same number of
    tokens, else (N', out_dim) packed in the same order.
    """

    in_dim: int  # width of the features
    out_dim: int  # width of the tokens
    tokens_per_view: int | None  # Q, or None where it depends on the grid

    def __call__(self, features: Tensor, grids: Sequence[Grid]) -> Tensor: ...

    def output_lengths(self, grids: Sequence[Grid]) -> list[int]:
        """Count the tokens of every view, in order."""
        ...

    # Where it can fit its latents to views: `fits_latents = True`, and `compressor(features, grids, latents)` with the
    # (rows, columns) of each view's tokens, or None for its own; then always packed (N', out_dim).

    # And for `VisualEncoder.attention`, where a compressor can tell:
    # attention_weights(features, grids) -> for every view (Q, H, n), float32: what each of its Q tokens takes of each
    # of its n features, by H heads (1 without heads). Sums over n are 1, or less where some came from outside the map.
    # With `latents` after the grids, as above, where it fits them.


class CompressorModule(nn.Module):
    """Base of the compressors here: `forward` checks what comes, `compress` gets what fits."""

    in_dim: int
    out_dim: int
    tokens_per_view: int | None = None

    def forward(self, features: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Compress every view on its own.

        Args:
            features: (N, in_dim), all views packed, patches row-major; dtype and device of the weights.
            grids: V pairs (rows, columns) in patches, in the order of the views, on the host.

        Returns:
            (V, Q, out_dim) where every view gets Q tokens, else (sum of `output_lengths`, out_dim), views in order.

        Raises:
            ValueError: a grid has a side below 1 or that cannot be divided, or the features do not fit the grids or
                `in_dim`.
            TypeError: the dtype is not that of the weights, outside autocast.
        """
        grids = check_grids(grids)
        self._check(features, grids)
        return self.compress(features, grids)

    def _check(self, features: Tensor, grids: tuple[Grid, ...]) -> None:
        check_features(features, grids, float_parameter(self, features), self.in_dim)

    def output_lengths(self, grids: Sequence[Grid]) -> list[int]:
        """Count the tokens of every view, in order."""
        raise NotImplementedError

    def compress(self, features: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        """Do what `forward` says, with checked features and grids."""
        raise NotImplementedError


def check_features(features: Tensor, grids: Sequence[Grid], like: Tensor, in_dim: int) -> None:
    """Refuse features whose shape does not fit the grids and `in_dim`, or whose dtype is not that of `like`."""
    rows = sum(h * w for h, w in grids)
    if features.dim() != 2 or features.shape[1] != in_dim:
        raise ValueError(f"features have shape {tuple(features.shape)}; expected (N, {in_dim}), all views packed")
    if features.shape[0] != rows:
        raise ValueError(
            f"features have {features.shape[0]} rows, but the {len(grids)} grids add up to {rows} patches"
        )
    if features.dtype != like.dtype and not torch.is_autocast_enabled(features.device.type):
        raise TypeError(f"features are {features.dtype} and the weights {like.dtype}: cast one, or use torch.autocast")
