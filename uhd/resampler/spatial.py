"""The spatially constrained resampler: every latent sees its own window of the view, and nothing outside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from uhd.grids import Grid, map_by_grid, split_views
from uhd.resampler.config import ResamplerConfig
from uhd.resampler.latents import ReleasedResampler
from uhd.resampler.windows import attend_windows, pool_windows, unpool_windows, window_weights
from uhd.weights import load_exactly, sizes_of


@dataclass(frozen=True, kw_only=True)
class SpatialConfig(ResamplerConfig):
    """Shape and flags of a `SpatialResampler`."""

    num_latents: int = 144  # tokens per view, a square: one for each window
    aligned: bool = True  # sample where the features are; False: as released, see `uhd.resampler.windows.pool_weights`


class SpatialResampler(ReleasedResampler):
    """Q = g*g learned latents look at the g x g windows of a view, whatever its shape; 6 to 12 pooled keys a window.

        x = LN_kv(kv_proj(features))    k = windows(x + positions(grid))    v = windows(x)
        tokens = LN_post(MHA(LN_q(query) + P, k, v)) @ proj

    P is the 2D sincos table of the latents' g x g grid, `positions` that table resized to the view's grid; `windows`
    pools each of the g x g equal parts of the map to 2-4 x 2-4 keys (RoI alignment). Keys and values are projected
    before they are pooled, which gives the same numbers with fewer products.

    Source: class `AdaptSpatialResampler` of the LLaVA-UHD release that goes with the ECCV paper (branch
    LLaVA-UHD-v1); the arXiv paper does not describe it. Parameter names are the release's: query, pos_embed,
    kv_proj.weight (where the widths differ), attn.*, ln_q.*, ln_kv.*, ln_post.*, proj. The release pools in float32;
    here pooling has the dtype of the features.

    With `aligned=False` it also keeps the release's flaw on maps with fewer than g rows or columns, where part of the
    keys and values are zero. Attributes are those of `LatentResampler`.
    """

    def __init__(self, config: SpatialConfig) -> None:
        super().__init__(config)
        self.reset_parameters()

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], *, num_heads: int, aligned: bool = False, eps: float = 1e-6
    ) -> SpatialResampler:
        """Read weights under the release's names, without a prefix; as `PerceiverResampler.from_state_dict`.

        `aligned=False` samples where the released weights were trained to.
        """
        config = SpatialConfig(**sizes_of(state), num_heads=num_heads, aligned=aligned, eps=eps)
        return load_exactly(lambda: cls(config), state, "a SpatialResampler", like="query")

    def compress(self, features: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        x, q, k = self._looking(features, grids)
        v = split_views(F.linear(x, self.attn.in_proj_weight.chunk(3)[2]), grids)
        _, b_k, b_v = self.attn.in_proj_bias.chunk(3)

        def attend(grid: Grid, views: list[int]) -> Tensor:
            # biases come after pooling: a bin that reaches outside the map holds less than a whole mean of them
            keys, values = self._pooled(k, views, grid) + b_k, self._pooled(v, views, grid) + b_v
            return attend_windows(q, keys, values, self.config.num_heads)[:, 0]

        mixed = map_by_grid(attend, grids)
        if not mixed:
            return x.new_zeros(0, self.tokens_per_view, self.out_dim)
        return self.ln_post(self.attn.out_proj(torch.stack(mixed))) @ self.proj

    def attention_weights(self, features: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """What each token took of each feature: see `uhd.resampler.protocol.Compressor`."""
        _, q, k = self._looking(features, grids)
        b_k, side = self.attn.in_proj_bias.chunk(3)[1], self.config.side

        def weigh(grid: Grid, views: list[int]) -> Tensor:
            weights = window_weights(q, self._pooled(k, views, grid) + b_k, self.config.num_heads)[:, 0]
            return unpool_windows(weights, grid, side, aligned=self.config.aligned).flatten(-2)

        return map_by_grid(weigh, grids)

    def _looking(self, features: Tensor, grids: Sequence[Grid]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Features (N, D), queries (Q, 1, D), and each view's keys before they are pooled, without their bias."""
        w_q, w_k, _ = self.attn.in_proj_weight.chunk(3)
        x = self.ln_kv(self.kv_proj(features))  # (N, D)
        latents = self._positions_over((self.config.side, self.config.side), self.query)
        q = F.linear(self.ln_q(self.query) + latents, w_q, self.attn.in_proj_bias.chunk(3)[0]).unsqueeze(1)
        return x, q, split_views(F.linear(self._with_positions(x, grids), w_k), grids)

    def _with_positions(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Add every view's resized table to its features, (N, D)."""
        tables = {grid: self._positions_over(grid, self.query) for grid in dict.fromkeys(grids)}
        return x + torch.cat([tables[grid] for grid in grids]) if grids else x

    def _pooled(self, maps: Sequence[Tensor], views: Sequence[int], grid_hw: Grid) -> Tensor:
        """(views, Q, bins, D)."""
        stacked = torch.stack([maps[view] for view in views]).unflatten(1, grid_hw)
        return pool_windows(stacked, self.config.side, aligned=self.config.aligned)
