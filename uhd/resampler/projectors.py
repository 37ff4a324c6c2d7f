"""Compressors without attention: of released models, for comparison, or for those who do not want a perceiver."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from uhd.grids import Grid, check_grids, join_blocks, map_by_grid, shrink_grids, split_views
from uhd.resampler.protocol import CompressorModule
from uhd.settings import check_choice, check_range, kept_arguments
from uhd.weights import load_exactly, shape_of


class Projector(CompressorModule):
    """Base of the compressors whose attributes are their constructor's arguments."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        for name, value in settings.items():
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Give the constructor's arguments in values that JSON takes."""
        return kept_arguments(self, inspect.signature(type(self)).parameters)


class MLPProjector(Projector):
    """Applies a two-layer MLP to every patch, as in LLaVA-1.5: one token a patch, nothing compressed.

    Args:
        in_dim, out_dim: widths of the features and of the tokens.
        hidden_dim: width in between; None means `out_dim`.
        bias: of both layers.
        activation: between them: "gelu" (erf) or "gelu_tanh".

    Raises:
        ValueError: another activation, or a size below 1.
    """

    later = ("bias", "activation")

    def __init__(
        self, in_dim: int, out_dim: int, *, hidden_dim: int | None = None, bias: bool = True, activation: str = "gelu"
    ) -> None:
        hidden_dim = out_dim if hidden_dim is None else hidden_dim
        super().__init__(in_dim=in_dim, out_dim=out_dim, hidden_dim=hidden_dim, bias=bias, activation=activation)
        check_range(self, ("in_dim", "out_dim", "hidden_dim"))
        check_choice("activation", activation, ("gelu", "gelu_tanh"))
        gelu = nn.GELU(approximate="tanh" if activation == "gelu_tanh" else "none")
        up, down = nn.Linear(in_dim, hidden_dim, bias=bias), nn.Linear(hidden_dim, out_dim, bias=bias)
        self.mlp = nn.Sequential(up, gelu, down)

    def output_lengths(self, grids: Sequence[Grid]) -> list[int]:
        """Count the tokens of every view: rows times columns."""
        return [h * w for h, w in check_grids(grids)]

    def attention_weights(self, features: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """Each token is one feature: see `uhd.resampler.protocol.Compressor`."""
        return _block_weights(grids, 1, features.device)

    def compress(self, features: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        return self.mlp(features)


class PixelShuffleProjector(Projector):
    """Joins blocks of `factor` x `factor` patches to one token: space to depth, LayerNorm, two-layer MLP.

    The channels of a block are its patches one after another, row-major, each with its own channels in order; tokens
    are row-major. Source of order and MLP: InternVL's released models (`pixel_shuffle`, `ps_version` v2).

    Args:
        in_dim, out_dim: widths of the features and of the tokens.
        factor: side of a block in patches; both sides of every grid must be multiples of it.

    Raises:
        ValueError: a size below 1.

    >>> PixelShuffleProjector(16, 32, factor=2)(torch.zeros(4 * 6, 16), [(4, 6)]).shape
    torch.Size([6, 32])
    """

    def __init__(self, in_dim: int, out_dim: int, *, factor: int = 2) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim, factor=factor)
        check_range(self, ("in_dim", "out_dim", "factor"))
        block = in_dim * factor**2
        self.mlp = nn.Sequential(
            nn.LayerNorm(block), nn.Linear(block, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim)
        )

    def output_lengths(self, grids: Sequence[Grid]) -> list[int]:
        """Count the tokens of every view, one a block; ValueError for a side that is no multiple of `factor`."""
        return _blocks(grids, self.factor, f"divisible by factor={self.factor}")

    def attention_weights(self, features: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """A token's block, evenly: see `uhd.resampler.protocol.Compressor`."""
        return _block_weights(grids, self.factor, features.device)

    def compress(self, features: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        self.output_lengths(grids)  # refuses what cannot be divided
        return self.mlp(join_blocks(features, grids, self.factor).flatten(1))


class MergeProjector(Projector):
    """Joins 2 x 2 neighbours, once or several times: concatenation, LayerNorm, Linear, GELU (erf), Linear.

    All rounds but the last keep the width. The channels of a block are its features one after another, row-major.
    With a ViT that compresses inside (`uhd.vision.CompressedViT`) one round gives 16 patches a token, without 4.

    Source: class `MiniCPMV4_6Merger` of transformers (models/minicpmv4_6), as in LLaVA-UHD v4, whose parameter names
    these are: mlp.R.pre_norm, mlp.R.linear_1, mlp.R.linear_2 for round R.

    Args:
        in_dim, out_dim: widths of the features and of the tokens.
        rounds: how often blocks are joined; both sides of every grid must be multiples of 2 ** rounds.
        eps: of the LayerNorms.

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(self, in_dim: int, out_dim: int, *, rounds: int = 1, eps: float = 1e-6) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim, rounds=rounds, eps=eps)
        check_range(self, ("in_dim", "out_dim"))
        check_range(self, ("rounds",), 1, 16)
        check_range(self, ("eps",), 0)
        widths = [in_dim] * (rounds - 1) + [out_dim]
        self.mlp = nn.ModuleList(_Round(in_dim, width, eps) for width in widths)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], *, eps: float = 1e-6) -> MergeProjector:
        """Read weights under the names of transformers, without a prefix; every size is read off the tensors.

        Raises:
            ValueError: names are missing or unexpected (listed), or shapes disagree.
        """
        rounds = len({name.split(".")[1] for name in state if name.startswith("mlp.")})
        in_dim = shape_of(state, "mlp.0.linear_1.weight", 2)[1] // 4
        out_dim = shape_of(state, f"mlp.{rounds - 1}.linear_2.weight", 2)[0]
        make = partial(cls, in_dim, out_dim, rounds=rounds, eps=eps)
        return load_exactly(make, state, "a MergeProjector", like="mlp.0.linear_1.weight")

    def output_lengths(self, grids: Sequence[Grid]) -> list[int]:
        """Count the tokens of every view, one a block; ValueError for a side that is no multiple of 2 ** rounds."""
        return _blocks(grids, 2**self.rounds, "that are, times what the ViT joins itself (slicing.merge)")

    def attention_weights(self, features: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """A token's block, evenly: see `uhd.resampler.protocol.Compressor`."""
        return _block_weights(grids, 2**self.rounds, features.device)

    def compress(self, features: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        self.output_lengths(grids)  # refuses what cannot be divided
        for layer in self.mlp:
            features = layer(join_blocks(features, grids, 2).flatten(1))
            grids = tuple((h // 2, w // 2) for h, w in grids)
        return features


class _Round(nn.Module):
    """(n, 4*D) -> (n, out)."""

    def __init__(self, width: int, out_dim: int, eps: float) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(4 * width, eps=eps)
        self.linear_1 = nn.Linear(4 * width, 4 * width)
        self.linear_2 = nn.Linear(4 * width, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(self.pre_norm(x))))


class PoolProjector(Projector):
    """Applies a two-layer MLP to every patch, then pools each view's map by `factor` a side; a rest counts as one.

    Perception-LM averages blocks of 2 x 2 after its MLP; LLaVA-OneVision resizes a video's frames bilinearly after its
    own, 27 x 27 patches to 14 x 14.

    Args:
        in_dim, out_dim: widths of the features and of the tokens.
        factor: sides shrink by it, rounded up.
        mode: "average": the mean of blocks, those at the bottom and right may be smaller; "bilinear": resized, corners
            not aligned, not antialiased.

    Raises:
        ValueError: a size below 1, or another mode.
    """

    def __init__(self, in_dim: int, out_dim: int, *, factor: int = 2, mode: str = "average") -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim, factor=factor, mode=mode)
        check_range(self, ("in_dim", "out_dim", "factor"))
        check_choice("mode", mode, ("average", "bilinear"))
        self.mlp = nn.Sequential(nn.Linear(in_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))

    def output_lengths(self, grids: Sequence[Grid]) -> list[int]:
        """Count the tokens of every view: both sides divided by `factor`, rounded up."""
        return [-(-h // self.factor) * -(-w // self.factor) for h, w in check_grids(grids)]

    def compress(self, features: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        tokens = self.mlp(features)
        if self.factor == 1 or not grids:
            return tokens
        per_view = split_views(tokens, grids)
        return torch.cat(
            map_by_grid(lambda grid, views: self._pool(torch.stack([per_view[view] for view in views]), grid), grids)
        )

    def attention_weights(self, features: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """What pooling weighs each feature with: see `uhd.resampler.protocol.Compressor`."""
        each = [torch.eye(h * w, device=features.device)[None] for h, w in grids]
        return [self._pool(one, grid)[0][:, None] for one, grid in zip(each, grids, strict=True)]

    def _pool(self, views: Tensor, grid: Grid) -> Tensor:
        """(V, h * w, D) -> (V, fewer, D)."""
        maps = rearrange(views, "v (h w) d -> v d h w", h=grid[0], w=grid[1])
        if self.mode == "average":
            maps = F.avg_pool2d(maps, self.factor, ceil_mode=True)
        else:
            size = [-(-side // self.factor) for side in grid]
            maps = F.interpolate(maps, size, mode="bilinear", align_corners=False)
        return rearrange(maps, "v d h w -> v (h w) d")


def _block_weights(grids: Sequence[Grid], side: int, device: torch.device) -> list[Tensor]:
    """V tensors (blocks, 1, h * w): 1 / side**2 for each feature of a block."""
    each = [join_blocks(torch.eye(h * w, device=device), [(h, w)], side) for h, w in grids]
    return [one.mean(1)[:, None] for one in each]


def _blocks(grids: Sequence[Grid], side: int, wanted: str) -> list[int]:
    advice = f"plan slices with patch sides {wanted}, or use another compressor"
    return [h * w for h, w in shrink_grids(grids, side, advice)]
