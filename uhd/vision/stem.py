"""A patch embedding that looks beyond its patch, for small ViTs that are trained from nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from uhd import tables
from uhd.grids import Grid, made_once, sent
from uhd.pixels import inner_axes

neighbours = made_once(tables.neighbours)


class WindowStem(nn.Module):
    """Embeds each patch together with a border of its neighbours' pixels; beyond the view the border is 0.

        (p + 2b) x (p + 2b) px of every patch -> Linear -> GELU -> Linear

    So a stroke on a patch border is seen whole, as in the overlapping patch embeddings of PVT v2 and the early
    convolutions of Xiao et al. (arXiv 2106.14881), without a convolution over padded views. `needs_grids` tells the
    ViT to pass the grids.

    Args:
        patch_size, border: p and b, px; ValueError unless 1 <= b <= p.
        hidden, width: after the first layer, and D of the features.
        channels: C of the patches.
        grey: See the mean of the channels only.
    """

    needs_grids = True

    def __init__(
        self, patch_size: int, border: int, hidden: int, width: int, *, channels: int = 3, grey: bool = False
    ) -> None:
        super().__init__()
        if not 1 <= border <= patch_size:
            raise ValueError(f"border must be 1 to patch_size={patch_size} px; got {border}")
        self.patch_size, self.border, self.channels, self.grey = patch_size, border, channels, grey
        self.up = nn.Linear((1 if grey else channels) * (patch_size + 2 * border) ** 2, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Embed packed patches (N, C*p*p), inner order (c, py, px), of V grids -> (N, D)."""
        return self.down(F.gelu(self.up(self.windows(patches, grids))))

    def windows(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Cut the window around every patch: (N, C*p*p) -> (N, C*(p+2b)*(p+2b)), one channel where `grey`."""
        p, b = self.patch_size, self.border
        tables = [neighbours(*grid) for grid in grids]
        if not tables:
            return patches.new_zeros(0, self.up.in_features)
        starts = accumulate(map(len, tables), initial=0)
        near = [
            torch.where(table < 0, len(patches), table + start) for table, start in zip(tables, starts, strict=False)
        ]
        near = sent(torch.cat(near), patches.device)  # outside: the row of zeros
        pixels = torch.cat([patches, patches.new_zeros(1, patches.shape[1])])
        pixels = rearrange(pixels, f"n ({inner_axes('chw')}) -> n c py px", c=self.channels, py=p)
        if self.grey:
            pixels = pixels.mean(1, keepdim=True)
        sides = (slice(p - b, p), slice(0, p), slice(0, b))  # of the patch before, the patch, the patch after
        rows = []
        for dy, ys in enumerate(sides):
            parts = [pixels[near[:, 3 * dy + dx], :, ys, xs] for dx, xs in enumerate(sides)]
            rows.append(torch.cat(parts, dim=-1))
        return torch.cat(rows, dim=-2).flatten(1)
