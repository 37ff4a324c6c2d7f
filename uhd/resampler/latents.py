"""What the resamplers with learned latents share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from uhd.grids import Grid
from uhd.positions import interpolate_pos_embed, sincos_2d
from uhd.resampler.attention import LatentAttention
from uhd.resampler.config import ResamplerConfig
from uhd.resampler.protocol import CompressorModule
from uhd.weights import draw_linear, draw_normal


class LatentResampler(CompressorModule):
    """Base of the resamplers that have Q learned latents, and so give Q tokens for every view.

    Attributes:
        config: what it was made from.
        in_dim, out_dim, tokens_per_view: D_v, D and Q.
    """

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.in_dim, self.out_dim, self.tokens_per_view = config.vision_width, config.width, config.num_latents

    def output_lengths(self, grids: Sequence[Grid]) -> list[int]:
        """Count the tokens of every view: Q, whatever the grid."""
        return [self.tokens_per_view] * len(grids)

    def _make_kv_proj(self) -> nn.Module:
        """The features' projection to the latents' width, where these differ."""
        return nn.Identity() if self.in_dim == self.out_dim else nn.Linear(self.in_dim, self.out_dim, bias=False)

    def _make_norms(self, number: int) -> list[nn.LayerNorm]:
        return [nn.LayerNorm(self.out_dim, eps=self.config.eps) for _ in range(number)]

    def _latent_positions(self) -> Tensor:
        """Sines and cosines over the latents' own square grid, (Q, D)."""
        return sincos_2d(self.out_dim, (self.config.side, self.config.side))

    def _positions_over(self, grid_hw: Grid, like: Tensor) -> Tensor:
        """`pos_embed` resized to a grid, in the dtype of a parameter: FSDP and ZeRO cast those, and no buffers."""
        return interpolate_pos_embed(self.pos_embed, (self.config.side, self.config.side), grid_hw).to(like)

    def _reset_latent_positions(self) -> None:
        if self.pos_embed is not None and not self.pos_embed.is_meta:
            self.pos_embed.copy_(self._latent_positions())


class ReleasedResampler(LatentResampler):
    """The parameters of the layers that LLaVA-UHD and MiniCPM-V released, under their names."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__(config)
        width = config.width
        self.query = nn.Parameter(torch.empty(config.num_latents, width))
        # A buffer, so that unfreezing a whole model does not train a table that is meant to stay fixed.
        self.register_buffer("pos_embed", self._latent_positions() if config.has_latent_table else None)
        self.kv_proj = self._make_kv_proj()
        self.attn = LatentAttention(width, config.num_heads)
        self.ln_q, self.ln_kv, self.ln_post = self._make_norms(3)
        self.proj = nn.Parameter(torch.empty(width, width))

    def reset_parameters(self) -> None:
        """Draw weights as released: truncated normal 0.02 for latents and linears, N(0, 1) / sqrt(D) for `proj`.

        Positions get their sines anew; norms, attention and FFN reset themselves.
        """
        self._reset_latent_positions()
        nn.init.trunc_normal_(self.query, std=0.02)
        draw_normal(self.proj, std=self.config.width**-0.5)
        if isinstance(self.kv_proj, nn.Linear):
            draw_linear(self.kv_proj)
