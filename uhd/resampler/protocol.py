"""What an encoder asks of a compressor, and the check of packed features that all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


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
        """Tokens of every view, in order."""
        ...


def check_features(features: Tensor, grids: Sequence[tuple[int, int]], like: Tensor, in_dim: int) -> None:
    """Features fit the grids and the module's weights, of which `like` is one.

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
