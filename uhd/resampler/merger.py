"""The last merger of LLaVA-UHD v4 and MiniCPM-V 4.6: blocks of 2 x 2 features become one, once or several times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from uhd.grids import check_grids, join_blocks, shrink_grids
from uhd.resampler.protocol import check_features
from uhd.resampler.weights import load_exactly, shape_of


class MergeProjector(nn.Module):
    """Joins 2 x 2 neighbours, once or several times: concatenation, LayerNorm, Linear, GELU (erf), Linear.

    All rounds but the last keep the width. The channels of a block are its features one after another, row-major.
    With a ViT that compresses inside (`uhd.vision.CompressedViT`) one round gives 16 patches a token, without 4.

    Source: class `MiniCPMV4_6Merger` of transformers (models/minicpmv4_6), whose parameter names these are:
    mlp.R.pre_norm, mlp.R.linear_1, mlp.R.linear_2 for round R.

    Args:
        in_dim: width of the features.
        out_dim: width of the tokens.
        rounds: how often blocks are joined; both sides of every grid must be multiples of 2 ** rounds.
        eps: of the LayerNorms.

    Raises:
        ValueError: a size is below 1.
    """

    tokens_per_view = None  # depends on the grid

    def __init__(self, in_dim: int, out_dim: int, *, rounds: int = 1, eps: float = 1e-6) -> None:
        super().__init__()
        if min(in_dim, out_dim, rounds) < 1:
            raise ValueError(f"in_dim={in_dim}, out_dim={out_dim}, rounds={rounds}: all must be at least 1")
        self.in_dim, self.out_dim, self.rounds, self.eps = in_dim, out_dim, rounds, eps
        self.mlp = nn.ModuleList(
            _Round(in_dim, out_dim if last == rounds else in_dim, eps) for last in range(1, rounds + 1)
        )

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

    def to_dict(self) -> dict[str, int | float]:
        """Give the constructor's arguments in values that JSON takes."""
        return {"in_dim": self.in_dim, "out_dim": self.out_dim, "rounds": self.rounds, "eps": self.eps}

    def output_lengths(self, grids: Sequence[tuple[int, int]]) -> list[int]:
        """Count the tokens of every view: one a block.

        Raises:
            ValueError: a side of a grid is not a multiple of 2 ** rounds.
        """
        advice = "plan slices whose patch sides are, times what the vision encoder joins itself (slicing.merge)"
        return [h * w for h, w in shrink_grids(grids, 2**self.rounds, advice)]

    def forward(self, features: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Merge packed features: (N, in_dim) -> (N / 4 ** rounds, out_dim), views in the same order.

        Raises:
            ValueError, TypeError: see `output_lengths`, `uhd.grids.check_grids` and `protocol.check_features`.
        """
        grids = check_grids(grids)
        check_features(features, grids, self.mlp[0].linear_1.weight, self.in_dim)
        self.output_lengths(grids)
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
