"""Cross-attention from latents to packed views: the only place from which a resampler reaches a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from uhd_kernels import varlen_cross_attention

from uhd.grids import Grid
from uhd.weights import draw_linear


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    *,
    key_positions: Tensor | None = None,
    position_offsets: Sequence[int] | None = None,
    impl: str = "auto",
) -> Tensor:
    """Let the latents attend to the keys of each view, and to nothing else: (V, Q, H, d).

    Args:
        q: (Q, H, d) latents shared by every view, or (V, Q, H, d) where each view has its own (deeper layers).
        k: (N, H, d) keys, packed.
        v: (N, H, d) values, packed.
        lengths: V numbers of rows, on the host, so that no shape has to be read back from the device.
        key_positions: (L, H, d) projected positions of the distinct grids, one grid after another; None for none.
        position_offsets: V first rows in `key_positions`.
        impl: which kernel, see `uhd_kernels.varlen_cross_attention`.
    """
    if q.dim() == 4:  # the kernel is made for shared latents, so views with their own take a call each
        starts = [None] * len(q) if position_offsets is None else [[offset] for offset in position_offsets]
        views = [
            attend(own, keys, values, [len(keys)], key_positions=key_positions, position_offsets=start, impl=impl)
            for own, keys, values, start in zip(q, k.split(list(lengths)), v.split(list(lengths)), starts, strict=True)
        ]
        return torch.cat(views) if views else q
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")
    if position_offsets is not None:
        position_offsets = torch.tensor(position_offsets, dtype=torch.int32, device="cpu")
    tables = {"key_positions": key_positions, "position_offsets": position_offsets}
    return varlen_cross_attention(q, k, v, bounds, max(lengths, default=0), **tables, impl=impl)


def join_tables(grids: Sequence[Grid], make: Callable[[Grid], Tensor]) -> tuple[Tensor | None, list[int] | None]:
    """Join the position tables of the distinct grids: (L, D), and the first row of each view's; None without views.

    >>> join_tables([(1, 2), (1, 1), (1, 2)], lambda grid: torch.ones(grid[0] * grid[1], 4))[1]
    [0, 2, 0]
    """
    tables = {grid: make(grid) for grid in dict.fromkeys(grids)}
    if not tables:
        return None, None
    starts = dict(zip(tables, accumulate(map(len, tables.values()), initial=0), strict=False))
    return torch.cat(list(tables.values())), [starts[grid] for grid in grids]


class LatentAttention(nn.Module):
    """Cross-attention over packed keys with the parameters, names and result of `torch.nn.MultiheadAttention`.

    Positions join the keys before their projection, and the projection is linear: so the table of each distinct grid
    is projected once, and features plus positions are never formed at full width.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights as released: PyTorch's default (Xavier) for the input projection, 0.02 for the output."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        draw_linear(self.out_proj)

    def forward(
        self,
        queries: Tensor,
        kv: Tensor,
        lengths: Sequence[int],
        *,
        positions: Tensor | None,
        position_offsets: Sequence[int] | None,
        impl: str,
    ) -> Tensor:
        """queries (Q, D) or (V, Q, D), kv (N, D), positions (L, D) -> (V, Q, D)."""
        q, k, v, positions = self.projected(queries, kv, positions)
        mixed = attend(q, k, v, lengths, key_positions=positions, position_offsets=position_offsets, impl=impl)
        return self.out_proj(mixed.flatten(-2))

    def weights(
        self,
        queries: Tensor,
        kv: Tensor,
        lengths: Sequence[int],
        *,
        positions: Tensor | None,
        position_offsets: Sequence[int] | None,
        **_: object,
    ) -> list[Tensor]:
        """What each latent takes of its view's keys: V tensors (Q, H, n), at least float32. Arguments as above."""
        q, k, _v, positions = self.projected(queries, kv, positions)
        exact = torch.promote_types(q.dtype, torch.float32)
        found = []
        for view, keys in enumerate(k.split(list(lengths))):
            if positions is not None:
                keys = keys + positions[position_offsets[view] :][: len(keys)]
            own = q[view] if q.dim() == 4 else q
            logits = torch.einsum("qhd,nhd->qhn", own.to(exact), keys.to(exact)) * q.shape[-1] ** -0.5
            found.append(logits.softmax(-1))
        return found

    def projected(
        self, queries: Tensor, kv: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys, values and positions, each (..., H, d)."""
        width = self.out_proj.in_features
        heads = (self.num_heads, width // self.num_heads)
        w_q, w_kv = self.in_proj_weight.split([width, 2 * width])
        b_q, b_kv = self.in_proj_bias.split([width, 2 * width])
        q = F.linear(queries, w_q, b_q).unflatten(-1, heads)
        k, v = F.linear(kv, w_kv, b_kv).unflatten(-1, (2, *heads)).unbind(-3)
        if positions is not None:
            positions = F.linear(positions.to(w_kv.dtype), w_kv[:width]).unflatten(-1, heads)
        return q, k, v, positions
