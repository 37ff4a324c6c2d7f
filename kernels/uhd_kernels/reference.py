"""The oracle: one view at a time, one line for each formula. Slow; every faster path is tested against it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def cross_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Sequence[int],
    *,
    key_positions: Tensor | None,
    offsets: Sequence[int],
    scale: float,
) -> Tensor:
    """Attention of the latents to each view alone, in float32 (float64 where the input is), cast back at the end.

    Args:
        q: (Q, H, d) latents, shared by every view.
        k: (N, H, d) keys, packed.
        v: (N, H, d) values, packed.
        bounds: V + 1 row numbers on the host; view i owns the rows `bounds[i]:bounds[i + 1]`, possibly none.
        key_positions: (L, H, d) table, or None.
        offsets: V row numbers; the keys of view i get the rows of the table that start at `offsets[i]`.
        scale: factor of the logits.

    Returns:
        (V, Q, H, d) in the dtype of `q`; zeros for a view without rows. V must be at least 1.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    outputs = []
    for _, _, keys, values in _views(k, v, bounds, key_positions, offsets, exact):
        logits = torch.einsum("qhd,nhd->hqn", q.to(exact), keys) * scale
        outputs.append(torch.einsum("hqn,nhd->qhd", logits.softmax(dim=-1), values))
    return torch.stack(outputs).to(q.dtype)


def cross_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Sequence[int],
    *,
    key_positions: Tensor | None,
    offsets: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of `cross_attention_reference`, written out; same arguments after `grad` (V, Q, H, d).

    Returns:
        Gradients of q (Q, H, d), k and v (N, H, d), and key_positions (L, H, d) or None, each in its input's dtype.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    queries = q.to(exact)
    dq, dk, dv = (torch.zeros_like(x, dtype=exact) for x in (q, k, v))
    d_table = None if key_positions is None else torch.zeros_like(key_positions, dtype=exact)
    views = _views(k, v, bounds, key_positions, offsets, exact)
    for d_out, (own, table, keys, values) in zip(grad.to(exact), views, strict=True):
        weights = (torch.einsum("qhd,nhd->hqn", queries, keys) * scale).softmax(dim=-1)
        d_weights = torch.einsum("qhd,nhd->hqn", d_out, values)
        d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True)) * scale
        dv[own] = torch.einsum("hqn,qhd->nhd", weights, d_out)
        dk[own] = torch.einsum("hqn,qhd->nhd", d_logits, queries)
        dq += torch.einsum("hqn,nhd->qhd", d_logits, keys)
        if d_table is not None:
            d_table[table] += dk[own]
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None if d_table is None else d_table.to(q.dtype)


def _views(k, v, bounds, key_positions, offsets, exact):
    """Of each view its rows, its rows of the table, its keys with positions, and its values."""
    for (start, end), offset in zip(pairwise(bounds), offsets, strict=True):
        own, table = slice(start, end), slice(offset, offset + end - start)
        keys = k[own].to(exact)
        if key_positions is not None:
            keys = keys + key_positions[table].to(exact)
        yield own, table, keys, v[own].to(exact)
