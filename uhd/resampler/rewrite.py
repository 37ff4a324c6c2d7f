"""The resampler of the community rewrite of LLaVA-UHD: gated trained positions, and an FFN after the attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uhd.grids import Grid
from uhd.positions import interpolate_pos_embed, sincos_2d
from uhd.resampler.attention import LatentAttention, join_tables
from uhd.resampler.config import ResamplerConfig
from uhd.resampler.latents import LatentResampler
from uhd.weights import load_exactly, shape_of, sizes_of


@dataclass(frozen=True, kw_only=True)
class RewriteConfig(ResamplerConfig):
    """Shape of a `RewriteResampler`. Its latents have no positions, so that there may be any number of them."""

    table_side: int = 24  # patches along each side of the trained position table
    separators: bool = False  # hold the three trained vectors of the "llava-uhd-better" schema

    counts: ClassVar[tuple[str, ...]] = (*ResamplerConfig.counts, "table_side")
    has_latent_table: ClassVar[bool] = False


class RewriteResampler(LatentResampler):
    """Q learned latents attend to the patches of one view; positions of the keys start switched off.

        x = LN_kv(kv_proj(features))
        y = LN_1(MHA(query, x + tanh(alpha) * positions(grid), x))
        tokens = LN_2(y + proj(gelu(updim_proj(y))))

    `positions` is a trained table, 24 x 24 at first a sincos one, resized to the view's grid; alpha starts at 0.

    Source: class `Resampler` of ParadoxZW/LLaVA-UHD-Better, without its attention dropout of 0.1. Parameter names are
    its own: query, pos_embed, alpha, kv_proj.weight (where the widths differ), attn.*, ln_kv.*, ln1.*, ln2.*,
    updim_proj.*, proj.*, and sep_embeddings (3, 1, D) where `config.separators` is set. Those stand between slices of
    a row, between rows and before the overview, as sep0, sep1 and sep2 of the schema "llava-uhd-better"; `forward`
    does not use them.

    Attributes:
        attention_impl: kernel used, see `uhd_kernels.varlen_cross_attention`; "auto" unless set.
    """

    def __init__(self, config: RewriteConfig) -> None:
        super().__init__(config)
        self.attention_impl = "auto"
        width = config.width
        self.query = nn.Parameter(torch.empty(1, config.num_latents, width))
        self.pos_embed = nn.Parameter(torch.empty(config.table_side**2, width))
        self.alpha = nn.Parameter(torch.empty(1))
        self.sep_embeddings = nn.Parameter(torch.empty(3, 1, width)) if config.separators else None
        self.kv_proj = self._make_kv_proj()
        self.attn = LatentAttention(width, config.num_heads)
        self.ln_kv, self.ln1, self.ln2 = self._make_norms(3)
        self.updim_proj, self.proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights as released: normal, cut at two deviations of 1 / sqrt(width); zero biases and gate; sines."""
        linears = [self.updim_proj, self.proj, self.attn.out_proj, self.kv_proj]
        linears = [linear for linear in linears if isinstance(linear, nn.Linear)]
        for tensor in (self.query, self.sep_embeddings, *(linear.weight for linear in linears)):
            if tensor is not None:
                std = tensor.shape[-1] ** -0.5
                nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)
        for linear in linears:
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.alpha)
        if not self.pos_embed.is_meta:
            with torch.no_grad():
                self.pos_embed.copy_(sincos_2d(self.config.width, (self.config.table_side,) * 2))

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], *, num_heads: int = 8, eps: float = 1e-6
    ) -> RewriteResampler:
        """Read weights under the rewrite's names, without a prefix; as `PerceiverResampler.from_state_dict`."""
        sizes = sizes_of(state, axes=3)
        side = math.isqrt(shape_of(state, "pos_embed", 2)[0])
        separators = "sep_embeddings" in state
        config = RewriteConfig(**sizes, num_heads=num_heads, table_side=side, separators=separators, eps=eps)
        return load_exactly(lambda: cls(config), state, "a RewriteResampler", like="query")

    def compress(self, features: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        y = self.ln1(self._looked(self.attn, features, grids, impl=self.attention_impl))
        return self.ln2(y + self.proj(F.gelu(self.updim_proj(y))))

    def attention_weights(self, features: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """What each token took of each feature: see `uhd.resampler.protocol.Compressor`."""
        return self._looked(self.attn.weights, features, grids)

    def _looked(self, attend: Callable[..., Any], features: Tensor, grids: Sequence[Grid], **how: str) -> Any:
        """Call the attention, or its weights, on what the latents see."""
        x = self.ln_kv(self.kv_proj(features))  # (N, D)
        side = (self.config.table_side, self.config.table_side)
        positions, offsets = join_tables(grids, lambda grid: interpolate_pos_embed(self.pos_embed, side, grid))
        positions = None if positions is None else torch.tanh(self.alpha) * positions
        lengths = [h * w for h, w in grids]
        return attend(self.query[0], x, lengths, positions=positions, position_offsets=offsets, **how)
