"""Hierarchical window attention: latents of a window see that window on every level of a feature pyramid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from uhd.grids import Grid, check_grids, map_by_grid, sent, split_views
from uhd.positions import interpolate_pos_embed, resize_weights
from uhd.resampler.attention import LatentAttention
from uhd.resampler.config import ResamplerConfig
from uhd.resampler.latents import LatentResampler
from uhd.resampler.protocol import check_features
from uhd.resampler.windows import attend_windows, pool_windows, unpool_windows, window_weights
from uhd.weights import draw_linear, draw_normal, load_exactly, shape_of, sizes_of

NUM_SETS = 4
"""Sets of latents, as released; their results are joined into one token a window."""

SCALES = (1, 2, 4, 8)
"""Levels that the release has names for: how many times finer than the view's own map."""


@dataclass(frozen=True, kw_only=True)
class PyramidConfig(ResamplerConfig):
    """Shape and flags of a `PyramidResampler`."""

    num_latents: int = 144  # tokens per view, a square: one for each window
    levels: tuple[int, ...] = (1, 2, 4)  # how many times finer than the view's own map, each of 1, 2, 4, 8
    upsample: bool = False  # make finer levels from the first by bilinear resizing, where they are not given
    aligned: bool = True  # sample where the features are; False: as released, see `uhd.resampler.windows.pool_weights`

    def __post_init__(self) -> None:
        super().__post_init__()
        known = tuple(scale for scale in SCALES if scale in self.levels)
        if self.levels != known or not known or (self.upsample and known[0] != 1):
            raise ValueError(
                f"levels={self.levels}: take some of {SCALES}, ascending, with 1 among them where upsample is set"
            )


class PyramidResampler(LatentResampler):
    """Four sets of Q = g*g latents attend to the pooled keys of their window on all levels; one token a window.

        x_l = LN_kv(features_lx_projector(level l))
        k = windows of (x_l + positions(grid of l) + feature_lx_embedding), all levels    v = windows of x_l
        y_i = LN_proj(MHA(LN_q(query_i) + P, k, v)), i = 1..4
        tokens = LN_post(cat_proj(y_1 .. y_4)) @ proj

    Windows, P and positions are those of `SpatialResampler`. The levels come from outside: the release makes them with
    an upsampler that is guided by the image (FeatUp), which is not part of this module.

    Source: class `AdaptSpatialResampler` of LLaVA-UHD v2 (Hiwin transformer), its method that takes several
    resolutions. Parameter names are the release's. Its `query`, `kv_proj` and the parts of unused levels take part in
    nothing there, and are not held here.
    """

    def __init__(self, config: PyramidConfig) -> None:
        super().__init__(config)
        width = config.width
        for scale in config.levels:
            self.register_module(f"features_{scale}x_projector", nn.Linear(config.vision_width, width))
            self.register_parameter(f"feature_{scale}x_embedding", nn.Parameter(torch.empty(1, 1, width)))
        for number in range(1, NUM_SETS + 1):
            self.register_parameter(f"query_{number}", nn.Parameter(torch.empty(config.num_latents, width)))
        self.register_buffer("pos_embed", self._latent_positions())  # fixed, so not a parameter
        self.attn = LatentAttention(width, config.num_heads)
        self.ln_q, self.ln_kv, self.ln_proj, self.ln_post = self._make_norms(4)
        self.cat_proj = nn.Linear(NUM_SETS * width, width)
        self.proj = nn.Parameter(torch.empty(width, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights as released: normal 0.02, zero biases and level embeddings, N(0, 1) / sqrt(D) for `proj`."""
        self._reset_latent_positions()
        for linear in (self.cat_proj, *map(self._projector, self.config.levels)):
            draw_linear(linear)
        for query in self._queries():
            nn.init.trunc_normal_(query, std=0.02)
        for scale in self.config.levels:
            nn.init.zeros_(getattr(self, f"feature_{scale}x_embedding"))
        draw_normal(self.proj, std=self.config.width**-0.5)

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Tensor],
        *,
        num_heads: int,
        levels: Sequence[int] = (1, 2, 4),
        upsample: bool = False,
        aligned: bool = False,
        eps: float = 1e-6,
    ) -> PyramidResampler:
        """Read weights under the release's names, without a prefix; as `PerceiverResampler.from_state_dict`.

        Args:
            state: what the release never uses (`query`, `kv_proj.weight`, other levels') is left out; `upsampler.*`
                must not be in it.
            levels: those that its `feature_scale_mask` selects: bits 1, 2, 4, 8; 7, the default, is (1, 2, 4).
            upsample: as in `PyramidConfig`.
            aligned: False samples where the released weights were trained to.
        """
        projector = f"features_{min(levels, default=1)}x_projector.weight"
        sizes = {**sizes_of(state, "query_1"), "vision_width": shape_of(state, projector, 2)[1]}
        flags = {"levels": tuple(levels), "upsample": upsample, "aligned": aligned}
        config = PyramidConfig(**sizes, **flags, num_heads=num_heads, eps=eps)
        unused = {"query", "kv_proj.weight"}
        for scale in set(SCALES) - set(levels):
            unused |= {f"feature_{scale}x_embedding"}
            unused |= {f"features_{scale}x_projector.{part}" for part in ("weight", "bias")}
        used = {name: tensor for name, tensor in state.items() if name not in unused}
        return load_exactly(lambda: cls(config), used, "a PyramidResampler", like="query_1")

    def forward(self, features: Tensor | Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> Tensor:
        """Compress every view on its own.

        Args:
            features: for every level s of `config.levels` its (N*s*s, D_v), all views packed in the same order, every
                view row-major over (rows*s, columns*s). With `config.upsample` also (N, D_v) alone, the level 1.
            grids: V pairs (rows, columns) of the views' own maps, on the host.

        Returns:
            (V, Q, D).

        Raises:
            ValueError, TypeError: another number of levels, or as in `PerceiverResampler.forward`.
        """
        grids = check_grids(grids)
        pyramid, q = self._pyramid(features, grids), self._projected_queries()
        mixed = map_by_grid(lambda grid, views: self._attend(q, pyramid, views, grid), grids)
        if not mixed:
            return q.new_zeros(0, self.tokens_per_view, self.out_dim)
        heads = self.ln_proj(self.attn.out_proj(torch.stack(mixed)))
        return self.ln_post(self.cat_proj(rearrange(heads, "v s q d -> v q (s d)"))) @ self.proj

    def attention_weights(self, features: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """What each token took of each feature (N, D_v), the mean of its latents: as `Compressor` says.

        A finer level that is made by resizing is taken back to the features that it was made of.
        """
        pyramid, q, side = self._pyramid(features, grids), self._projected_queries(), self.config.side
        w_k, b_k = (x.chunk(3)[1] for x in (self.attn.in_proj_weight, self.attn.in_proj_bias))

        def weigh(grid: Grid, views: list[int]) -> Tensor:
            keys, _ = self._pooled(pyramid, views, grid)
            weights = window_weights(q, F.linear(keys, w_k, b_k), self.config.num_heads).mean(1)
            parts = weights.chunk(len(self.config.levels), -1)
            found = 0
            for scale, part in zip(self.config.levels, parts, strict=True):
                finer = (grid[0] * scale, grid[1] * scale)
                rows, columns = (
                    sent(resize_weights(n, n * scale, "bilinear", False, np.float32), part.device, part.dtype)
                    for n in grid
                )
                part = unpool_windows(part, finer, side, aligned=self.config.aligned)
                found = found + torch.einsum("...YX,Yy,Xx->...yx", part, rows, columns)
            return found.flatten(-2)

        return map_by_grid(weigh, grids)

    def _projected_queries(self) -> Tensor:
        """(Q, 4, D)."""
        latents = self._positions_over((self.config.side, self.config.side), self.query_1)
        queries = torch.stack([self.ln_q(query) + latents for query in self._queries()], dim=1)
        return F.linear(queries, *(x.chunk(3)[0] for x in (self.attn.in_proj_weight, self.attn.in_proj_bias)))

    def _queries(self) -> list[Tensor]:
        return [getattr(self, f"query_{number}") for number in range(1, NUM_SETS + 1)]

    def _projector(self, scale: int) -> nn.Linear:
        return self.get_submodule(f"features_{scale}x_projector")

    def _pyramid(self, features: Tensor | Sequence[Tensor], grids: tuple[Grid, ...]) -> list[list[Tensor]]:
        """Split every level into the V maps (h*s, w*s, D_v)."""
        levels = self.config.levels
        if isinstance(features, Tensor):
            if not self.config.upsample and levels != (1,):
                raise ValueError(
                    f"expected features of the {len(levels)} levels {levels}, got one tensor: give a list, or set "
                    "upsample=True in PyramidConfig to have finer levels made by bilinear resizing"
                )
            check_features(features, grids, self.query_1, self.in_dim)
            features = upsampled(features, grids, levels)
        if len(features) != len(levels):
            raise ValueError(f"expected features of the {len(levels)} levels {levels}, got {len(features)}")
        pyramid = []
        for scale, level in zip(levels, features, strict=True):
            sizes = [(h * scale, w * scale) for h, w in grids]
            check_features(level, sizes, self.query_1, self.in_dim)
            pyramid.append(
                [part.unflatten(0, size) for part, size in zip(split_views(level, sizes), sizes, strict=True)]
            )
        return pyramid

    def _attend(self, q: Tensor, pyramid: Sequence[Sequence[Tensor]], views: Sequence[int], grid_hw: Grid) -> Tensor:
        """Attend on views of one grid: (V, 4, Q, D), before the output projection."""
        keys, values = self._pooled(pyramid, views, grid_hw)
        # projected after pooling: the finest level has far more features than its windows have keys
        _, w_k, w_v = self.attn.in_proj_weight.chunk(3)
        _, b_k, b_v = self.attn.in_proj_bias.chunk(3)
        return attend_windows(q, F.linear(keys, w_k, b_k), F.linear(values, w_v, b_v), self.config.num_heads)

    def _pooled(
        self, pyramid: Sequence[Sequence[Tensor]], views: Sequence[int], grid_hw: Grid
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of views of one grid before they are projected, each (V, Q, bins of all levels, D)."""
        pool = partial(pool_windows, side=self.config.side, aligned=self.config.aligned)
        keys, values = [], []
        for scale, maps in zip(self.config.levels, pyramid, strict=True):
            x = self.ln_kv(self._projector(scale)(torch.stack([maps[view] for view in views])))  # (V, h*s, w*s, D)
            size = (grid_hw[0] * scale, grid_hw[1] * scale)
            table = self._positions_over(size, self.query_1).unflatten(0, size)
            keys.append(pool(x + table + getattr(self, f"feature_{scale}x_embedding")))
            values.append(pool(x))
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)


def upsampled(features: Tensor, grids: Sequence[Grid], levels: Sequence[int]) -> list[Tensor]:
    """Make a pyramid by bilinear resizing (corners not aligned), for want of an upsampler that sees the image.

    Packed (N, D) of V grids -> for every level s, how many times finer it is, (N*s*s, D), views in the same order.
    """
    if not grids:
        return [features for _ in levels]
    views = list(zip(split_views(features, grids), grids, strict=True))

    def finer(scale: int) -> Tensor:
        resized = [
            interpolate_pos_embed(part, (h, w), (h * scale, w * scale), mode="bilinear") for part, (h, w) in views
        ]
        return torch.cat(resized)

    return [finer(scale) for scale in levels]
