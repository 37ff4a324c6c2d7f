"""The shared perceiver resampler: a fixed number of tokens from a view of any grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uhd.grids import GridTables, as_grid, check_grids
from uhd.resampler import folded
from uhd.resampler.attention import LatentAttention
from uhd.resampler.config import PerceiverConfig
from uhd.resampler.protocol import check_features
from uhd.resampler.sincos import resize_table, sincos_2d
from uhd.resampler.weights import load_exactly, shape_of


class FeedForward(nn.Module):
    """x + down(gelu(up(norm(x)))), width unchanged."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.up = nn.Linear(config.width, config.ffn_width)
        self.down = nn.Linear(config.ffn_width, config.width)
        for linear in (self.up, self.down):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class DeeperLayer(nn.Module):
    """A layer after the first: each view's latents look at its features again, with residuals."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.ln_q = nn.LayerNorm(config.width, eps=config.eps)
        self.attn = LatentAttention(config.width, config.num_heads)
        self.ffn = FeedForward(config) if config.ffn_ratio else nn.Identity()

    def forward(self, x: Tensor, kv: Tensor, lengths: Sequence[int], *, query_table: Tensor | None, **keys) -> Tensor:
        """x (V, Q, D), kv (N, D) -> (V, Q, D)."""
        queries = self.ln_q(x) if query_table is None else self.ln_q(x) + query_table
        return self.ffn(x + self.attn(queries, kv, lengths, **keys))


class PerceiverResampler(nn.Module):
    """Q learned latents attend to the patches of one view at a time; the same weights serve every view.

        kv = LN_kv(kv_proj(x))    q = LN_q(query) + P    k = kv + positions(grid)    v = kv
        tokens = LN_post(MHA(q, k, v)) @ proj

    With depth 1 and no FFN that is all: no residual, no FFN. P is the 2D sincos table of the latents' square grid.
    Sources: LLaVA-UHD (arXiv 2403.11703, section 3.2) and the class `Resampler` of its March 2024 release; class
    `Resampler` of MiniCPM-V 2.0, 2.5 and 2.6. Parameter names are theirs: query, pos_embed (where there is one),
    kv_proj.weight (where the widths differ), attn.*, ln_q.*, ln_kv.*, ln_post.*, proj; ours are `ffn.*` and
    `layers.I.*`. The March 2024 release calls its layer with a 24 x 24 grid for every view; here each has its own.

    Attributes:
        config: the `PerceiverConfig` it was made from.
        in_dim, out_dim, tokens_per_view: D_v, D and Q.
        attention_impl: kernel used, see `uhd_kernels.varlen_cross_attention`; "auto" unless set. Another one keeps
            inference to the paths that have a kernel, "plain" and "cached".
        inference: which products are taken where nothing is trained, with equal results; see the property.
    """

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.config = config
        self.in_dim, self.out_dim, self.tokens_per_view = config.vision_width, config.width, config.num_latents
        self.attention_impl = "auto"
        self._inference = "auto"
        self._folded = folded.Folded()
        width, side = config.width, math.isqrt(config.num_latents)
        self.query = nn.Parameter(torch.empty(config.num_latents, width))
        # A buffer, so that unfreezing a whole model does not train a table that is meant to stay fixed.
        self.register_buffer("pos_embed", sincos_2d(width, (side, side)) if config.has_latent_table else None)
        self.kv_proj: nn.Module = nn.Identity()
        if config.vision_width != width:
            self.kv_proj = nn.Linear(config.vision_width, width, bias=False)
        self.attn = LatentAttention(width, config.num_heads)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, eps=config.eps) for _ in range(3))
        self.proj = nn.Parameter(torch.empty(width, width))
        self.ffn = FeedForward(config) if config.ffn_ratio else nn.Identity()
        self.layers = nn.ModuleList(DeeperLayer(config) for _ in range(config.depth - 1))
        self._key_tables = GridTables()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As released: truncated normal 0.02 for latents and linears, N(0, 1) / sqrt(D) for the last projection.

        Positions get their sines anew; norms, attention and FFN reset themselves.
        """
        if self.pos_embed is not None and not self.pos_embed.is_meta:
            side = math.isqrt(self.config.num_latents)
            self.pos_embed.copy_(sincos_2d(self.config.width, (side, side)))
        nn.init.trunc_normal_(self.query, std=0.02)
        nn.init.normal_(self.proj, std=self.config.width**-0.5)
        if isinstance(self.kv_proj, nn.Linear):
            nn.init.trunc_normal_(self.kv_proj.weight, std=0.02)

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], *, variant: str, num_heads: int, eps: float = 1e-6
    ) -> PerceiverResampler:
        """Weights under the reference's names, without a prefix. Every size is read off the tensors.

        Args:
            state: name -> tensor; dtype and device of `query` become the module's. The tensors are copied.
            variant: "paper", "minicpm-v-2.0" or "minicpm-v-2.6" (also 2.5).
            num_heads: not visible in the weights; the releases use width // 128 (MiniCPM-V, ECCV), 8 (March 2024).
            eps: of the LayerNorms.

        Raises:
            ValueError: names are missing or unexpected (listed), shapes disagree, or the heads do not fit the width.
        """
        num_latents, width = shape_of(state, "query", 2)
        up = state.get("ffn.up.bias")
        deeper = {name.split(".")[1] for name in state if name.startswith("layers.")}
        config = PerceiverConfig.preset(
            variant,
            width=width,
            vision_width=state["kv_proj.weight"].shape[-1] if "kv_proj.weight" in state else width,
            num_heads=num_heads,
            num_latents=num_latents,
            depth=1 + len(deeper),
            ffn_ratio=0.0 if up is None else len(up) / width,
            eps=eps,
        )
        return load_exactly(lambda: cls(config), state, f"variant {variant!r}", like="query")

    def output_lengths(self, grids: Sequence[tuple[int, int]]) -> list[int]:
        """Tokens of every view: Q, whatever the grid."""
        return [self.tokens_per_view] * len(grids)

    @property
    def inference(self) -> str:
        """How tokens are computed in eval mode where no gradients are wanted; `uhd.resampler.folded` has the maths.

        "auto" (as made) takes the one with the fewest FLOPs for the views of a call. "plain", "cached", "absorbed" and
        "narrow" ask for one. Training is always plain; so are compilation, autocast, more layers than one, an FFN, and
        weights or layers that are not what they were made as; `inference_path` tells.

        Raises (on setting):
            ValueError: an unknown name, or one that this layer cannot take (depth above 1, an FFN).
        """
        return self._inference

    @inference.setter
    def inference(self, choice: str) -> None:
        if choice not in folded.CHOICES:
            raise ValueError(f"inference={choice!r} is unknown; choose one of {list(folded.CHOICES)}")
        if choice not in ("auto", "plain") and (self.config.depth > 1 or self.config.ffn_ratio):
            raise ValueError(
                f"inference={choice!r} needs depth=1 and no FFN; this one has depth={self.config.depth} and "
                f"ffn_ratio={self.config.ffn_ratio}: take 'auto' or 'plain'"
            )
        self._inference = choice

    def inference_path(self, grids: Sequence[tuple[int, int]], features: Tensor | None = None) -> str:
        """What a call now would take for views of these grids: "plain", "cached", "absorbed" or "narrow"."""
        grids = [as_grid(grid) for grid in grids]
        paths = folded.usable(self, features) if grids else ("plain",)
        if len(paths) == 1:
            return paths[0]
        if self._inference != "auto":
            return self._inference if self._inference in paths else "plain"
        return folded.cheapest(self.config, grids, paths if self.attention_impl == "auto" else paths[:2])

    def train(self, mode: bool = True) -> PerceiverResampler:
        """As of every module; training lets go of what inference keeps."""
        if mode:
            self._folded.clear()
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> PerceiverResampler:
        self._folded.clear()  # on a move their memory is wanted back at once
        return super()._apply(fn, recurse)

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
        path = self.inference_path(grids, features)
        if path == "plain":
            x = self._plain(features, grids)
        else:
            x = self.attn.out_proj(folded.mix(self, path, features, grids))
        return self.ln_post(x) @ self.proj

    def _plain(self, features: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """All layers, with nothing taken as constant: (V, Q, D)."""
        lengths = [h * w for h, w in grids]
        positions, offsets = self._key_positions(grids, features.device)
        keys = {"positions": positions, "position_offsets": offsets, "impl": self.attention_impl}
        kv = self.ln_kv(self.kv_proj(features))  # (N, D)
        query_table = self.pos_embed if self.config.query_position else None
        queries = self.ln_q(self.query) if query_table is None else self.ln_q(self.query) + query_table
        x = self.ffn(self.attn(queries, kv, lengths, **keys))  # (V, Q, D)
        for layer in self.layers:
            x = layer(x, kv, lengths, query_table=query_table, **keys)
        return x

    def _key_positions(
        self, grids: Sequence[tuple[int, int]], device: torch.device
    ) -> tuple[Tensor | None, list[int] | None]:
        """Tables of the distinct grids one after another (L, D), and the first row of each view's."""
        if self.config.key_position == "none" or not grids:
            return None, None
        starts: dict[tuple[int, int], int] = {}
        rows = 0
        for h, w in dict.fromkeys(grids):
            starts[h, w] = rows
            rows += h * w
        return torch.cat([self.key_table(grid, device) for grid in starts]), [starts[grid] for grid in grids]

    def key_table(self, grid_hw: tuple[int, int], device: torch.device | None = None) -> Tensor:
        """(h * w, D) positions that join the keys of a view, in the dtype of the weights; kept after the first call.

        They are computed in float32. ``device``: that of the weights unless told.

        Raises:
            ValueError: this layer has no key positions.
        """
        if self.config.key_position == "none":
            raise ValueError("this resampler has no key positions (key_position='none')")
        dtype, device = self.query.dtype, self.query.device if device is None else device
        source = self.pos_embed if self.config.key_position == "interpolated" else None
        return self._key_tables.get(
            (grid_hw, device, dtype), source, lambda: self._make_key_table(grid_hw).to(device, dtype)
        )

    def _make_key_table(self, grid_hw: tuple[int, int]) -> Tensor:
        if self.config.key_position == "direct":
            return sincos_2d(self.config.width, grid_hw)
        return resize_table(self.pos_embed, grid_hw)
