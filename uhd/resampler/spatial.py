"""The spatially constrained resampler: every latent sees its own window of the view, and nothing outside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uhd.grids import Grid, check_grids, map_by_grid, split_views
from uhd.positions import interpolate_pos_embed
from uhd.resampler.attention import LatentAttention
from uhd.resampler.config import ResamplerConfig, check_sizes
from uhd.resampler.protocol import LatentResampler, check_features
from uhd.resampler.weights import load_exactly, shape_of, vision_width_of
from uhd.resampler.windows import attend_windows, pool_windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpatialConfig(ResamplerConfig):
    """Shape and flags of a `SpatialResampler`.

    Raises:
        ValueError: a size does not fit another; the message says which.
    """

    width: int  # of the latents and of the output: the language model's
    vision_width: int  # of the features
    num_heads: int  # divides the width
    num_latents: int = 144  # tokens per view, a square: one for each window
    aligned: bool = True  # sample where the features are; False: as released, see `uhd.resampler.windows.pool_weights`
    eps: float = 1e-6  # of every LayerNorm

    def __post_init__(self) -> None:
        check_sizes(self, ("width", "vision_width", "num_heads", "num_latents"))


class SpatialResampler(LatentResampler):
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

    Attributes:
        config: the `SpatialConfig` it was made from. Its `aligned=False` also keeps the release's flaw on maps with
            fewer than g rows or columns, where part of the keys and values are zero.
        in_dim, out_dim, tokens_per_view: D_v, D and Q.
    """

    def __init__(self, config: SpatialConfig) -> None:
        super().__init__(config)
        width = config.width
        self.query = nn.Parameter(torch.empty(config.num_latents, width))
        self.register_buffer("pos_embed", self._latent_positions())  # fixed, so not a parameter
        self.kv_proj = self._make_kv_proj()
        self.attn = LatentAttention(width, config.num_heads)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, eps=config.eps) for _ in range(3))
        self.proj = nn.Parameter(torch.empty(width, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights as released: truncated normal 0.02 for latents and linears, N(0, 1) / sqrt(D) for `proj`."""
        if not self.pos_embed.is_meta:
            self.pos_embed.copy_(self._latent_positions())
        nn.init.trunc_normal_(self.query, std=0.02)
        nn.init.normal_(self.proj, std=self.config.width**-0.5)
        if isinstance(self.kv_proj, nn.Linear):
            nn.init.trunc_normal_(self.kv_proj.weight, std=0.02)

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], *, num_heads: int, aligned: bool = False, eps: float = 1e-6
    ) -> SpatialResampler:
        """Read weights under the release's names, without a prefix; every size is read off the tensors.

        Args:
            state: name -> tensor; dtype and device of `query` become the module's. The tensors are copied.
            num_heads: not visible in the weights; the release uses width // 128.
            aligned: False samples where the released weights were trained to.
            eps: of the LayerNorms.

        Raises:
            ValueError: names are missing or unexpected (listed), shapes disagree, or the heads do not fit the width.
        """
        num_latents, width = shape_of(state, "query", 2)
        config = SpatialConfig(
            width=width,
            vision_width=vision_width_of(state, width),
            num_heads=num_heads,
            num_latents=num_latents,
            aligned=aligned,
            eps=eps,
        )
        return load_exactly(lambda: cls(config), state, "a SpatialResampler", like="query")

    def forward(self, features: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Compress every view on its own.

        Args:
            features: (N, D_v), all views packed, patches row-major; dtype and device of the weights.
            grids: V pairs (rows, columns) in patches, in the order of the views, on the host.

        Returns:
            (V, Q, D).

        Raises:
            ValueError: a grid has a side below 1, or the features do not fit the grids or D_v.
            TypeError: the dtype is not that of the weights, outside autocast.
        """
        grids = check_grids(grids)
        check_features(features, grids, self.query, self.in_dim)
        w_q, w_k, w_v = self.attn.in_proj_weight.chunk(3)
        b_q, b_k, b_v = self.attn.in_proj_bias.chunk(3)
        x = self.ln_kv(self.kv_proj(features))  # (N, D)
        q = F.linear(self.ln_q(self.query) + self.pos_embed, w_q, b_q).unsqueeze(1)  # (Q, 1, D)
        k, v = F.linear(self._with_positions(x, grids), w_k), F.linear(x, w_v)
        k, v = split_views(k, grids), split_views(v, grids)

        def attend(grid: Grid, views: list[int]) -> Tensor:
            # biases come after pooling: a bin that reaches outside the map holds less than a whole mean of them
            keys, values = self._pooled(k, views, grid) + b_k, self._pooled(v, views, grid) + b_v
            return attend_windows(q, keys, values, self.config.num_heads)[:, 0]

        mixed = map_by_grid(attend, grids)
        if not mixed:
            return x.new_zeros(0, self.tokens_per_view, self.out_dim)
        return self.ln_post(self.attn.out_proj(torch.stack(mixed))) @ self.proj

    def _with_positions(self, x: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Add every view's resized table to its features, (N, D)."""
        side = (self.config.side, self.config.side)
        tables = {grid: interpolate_pos_embed(self.pos_embed, side, grid) for grid in dict.fromkeys(grids)}
        return x + torch.cat([tables[grid] for grid in grids]) if grids else x

    def _pooled(self, maps: Sequence[Tensor], views: Sequence[int], grid_hw: tuple[int, int]) -> Tensor:
        """(views, Q, bins, D)."""
        stacked = torch.stack([maps[view] for view in views]).unflatten(1, grid_hw)
        return pool_windows(stacked, self.config.side, aligned=self.config.aligned)
