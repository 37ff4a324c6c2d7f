"""Compressors without attention, for comparison or for those who do not want a perceiver."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from uhd.grids import Grid, check_grids, join_blocks, map_by_grid, shrink_grids, split_views
from uhd.resampler.protocol import check_features


class MLPProjector(nn.Module):
    """Applies a two-layer MLP to every patch, as in LLaVA-1.5: one token a patch, nothing compressed.

    Args:
        in_dim: width of the features.
        out_dim: width of the tokens.
        hidden_dim: width in between; None means `out_dim`.
        bias: of both layers.
        activation: between them: "gelu" (erf) or "gelu_tanh".
    """

    tokens_per_view = None  # as many as the view has patches

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        hidden_dim: int | None = None,
        bias: bool = True,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        if activation not in ("gelu", "gelu_tanh"):
            raise ValueError(f"activation={activation!r}: choose 'gelu' or 'gelu_tanh'")
        self.in_dim, self.out_dim, self.activation = in_dim, out_dim, activation
        hidden_dim = out_dim if hidden_dim is None else hidden_dim
        gelu = nn.GELU(approximate="tanh" if activation == "gelu_tanh" else "none")
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim, bias=bias), gelu, nn.Linear(hidden_dim, out_dim, bias=bias)
        )

    def to_dict(self) -> dict[str, int | bool | str]:
        """Give the constructor's arguments in values that JSON takes."""
        return {
            "in_dim": self.in_dim,
            "out_dim": self.out_dim,
            "hidden_dim": self.mlp[0].out_features,
            "bias": self.mlp[0].bias is not None,
            "activation": self.activation,
        }

    def output_lengths(self, grids: Sequence[tuple[int, int]]) -> list[int]:
        """Count the tokens of every view: rows times columns."""
        return [h * w for h, w in check_grids(grids)]

    def forward(self, features: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Project packed features: (N, in_dim) -> (N, out_dim) in the same order.

        Raises:
            ValueError, TypeError: see `uhd.grids.check_grids` and `protocol.check_features`.
        """
        check_features(features, check_grids(grids), self.mlp[0].weight, self.in_dim)
        return self.mlp(features)


class PixelShuffleProjector(nn.Module):
    """Joins blocks of `factor` x `factor` patches to one token: space to depth, LayerNorm, two-layer MLP.

    The channels of a block are its patches one after another, row-major, each with its own channels in order; tokens
    are row-major. Source of order and MLP: InternVL's released models (`pixel_shuffle`, `ps_version` v2).

    Args:
        in_dim: width of the features.
        out_dim: width of the tokens.
        factor: side of a block in patches; both sides of every grid must be multiples of it.

    >>> PixelShuffleProjector(16, 32, factor=2)(torch.zeros(4 * 6, 16), [(4, 6)]).shape
    torch.Size([6, 32])
    """

    tokens_per_view = None  # depends on the grid

    def __init__(self, in_dim: int, out_dim: int, *, factor: int = 2) -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"factor={factor}: must be at least 1")
        self.in_dim, self.out_dim, self.factor = in_dim, out_dim, factor
        block = in_dim * factor**2
        self.mlp = nn.Sequential(
            nn.LayerNorm(block), nn.Linear(block, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim)
        )

    def to_dict(self) -> dict[str, int]:
        """Give the constructor's arguments in values that JSON takes."""
        return {"in_dim": self.in_dim, "out_dim": self.out_dim, "factor": self.factor}

    def output_lengths(self, grids: Sequence[tuple[int, int]]) -> list[int]:
        """Count the tokens of every view: one a block.

        Raises:
            ValueError: a side of a grid is not a multiple of `factor`.
        """
        advice = f"plan slices with patch sides divisible by factor={self.factor}, or use another compressor"
        return [h * w for h, w in shrink_grids(grids, self.factor, advice)]

    def forward(self, features: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Join blocks of packed features: (N, in_dim) -> (N / factor ** 2, out_dim), views in the same order.

        Raises:
            ValueError, TypeError: see `output_lengths`, `uhd.grids.check_grids` and `protocol.check_features`.
        """
        grids = check_grids(grids)
        check_features(features, grids, self.mlp[1].weight, self.in_dim)
        self.output_lengths(grids)
        return self.mlp(join_blocks(features, grids, self.factor).flatten(1))


class PoolProjector(nn.Module):
    """Applies a two-layer MLP to every patch, then pools each view's map by `factor` a side; a rest counts as one.

    Perception-LM averages blocks of 2 x 2 after its MLP; LLaVA-OneVision resizes a video's frames bilinearly after its
    own, 27 x 27 patches to 14 x 14.

    Args:
        in_dim: width of the features.
        out_dim: width of the tokens.
        factor: sides shrink by it, rounded up.
        mode: "average": the mean of blocks, those at the bottom and right may be smaller; "bilinear": resized, corners
            not aligned, not antialiased.
    """

    tokens_per_view = None  # depends on the grid

    def __init__(self, in_dim: int, out_dim: int, *, factor: int = 2, mode: str = "average") -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"factor={factor}: must be at least 1")
        if mode not in ("average", "bilinear"):
            raise ValueError(f"mode={mode!r}: choose 'average' or 'bilinear'")
        self.in_dim, self.out_dim, self.factor, self.mode = in_dim, out_dim, factor, mode
        self.mlp = nn.Sequential(nn.Linear(in_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))

    def to_dict(self) -> dict[str, int | str]:
        """Give the constructor's arguments in values that JSON takes."""
        return {"in_dim": self.in_dim, "out_dim": self.out_dim, "factor": self.factor, "mode": self.mode}

    def output_lengths(self, grids: Sequence[tuple[int, int]]) -> list[int]:
        """Count the tokens of every view: both sides divided by `factor`, rounded up."""
        return [-(-h // self.factor) * -(-w // self.factor) for h, w in check_grids(grids)]

    def forward(self, features: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Project and pool packed features: (N, in_dim) -> (sum of `output_lengths`, out_dim), views in order.

        Raises:
            ValueError, TypeError: see `uhd.grids.check_grids` and `protocol.check_features`.
        """
        grids = check_grids(grids)
        check_features(features, grids, self.mlp[0].weight, self.in_dim)
        tokens = self.mlp(features)
        if self.factor == 1 or not grids:
            return tokens
        per_view = split_views(tokens, grids)
        return torch.cat(
            map_by_grid(lambda grid, views: self._pool(torch.stack([per_view[view] for view in views]), grid), grids)
        )

    def _pool(self, views: Tensor, grid: Grid) -> Tensor:
        """(V, h * w, D) -> (V, fewer, D)."""
        maps = rearrange(views, "v (h w) d -> v d h w", h=grid[0], w=grid[1])
        if self.mode == "average":
            maps = F.avg_pool2d(maps, self.factor, ceil_mode=True)
        else:
            size = [-(-side // self.factor) for side in grid]
            maps = F.interpolate(maps, size, mode="bilinear", align_corners=False)
        return rearrange(maps, "v d h w -> v (h w) d")
