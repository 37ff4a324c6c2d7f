"""The operator by PyTorch's own operators alone, traced for any numbers of views and rows: for exporters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def decompositions() -> dict[Callable, Callable]:
    """The operator's decomposition, for `torch.export.ExportedProgram.run_decompositions`.

    It needs V * N logits a latent and head where a kernel needs N, and checks nothing.

    >>> [str(operator) for operator in decompositions()]
    ['uhd_kernels.varlen_cross_attention.default']
    """
    return {torch.ops.uhd_kernels.varlen_cross_attention.default: decomposed}


def decomposed(
    q, k, v, cu_seqlens, max_seqlen, key_positions, position_offsets, scale, impl
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as `uhd_kernels.op.attention_op`, without what its backward needs: inference only."""
    exact = torch.promote_types(q.dtype, torch.float32)
    bounds = cu_seqlens.to(k.device)
    rows = torch.arange(k.shape[0], device=k.device)
    view = (rows[:, None] >= bounds[1:]).sum(1)  # (N,), the one that a row belongs to
    keys = k.to(exact)
    if key_positions is not None:
        starts = position_offsets.to(k.device) - bounds[:-1]
        keys = keys + key_positions[rows + starts[view]].to(exact)
    own = view == torch.arange(bounds.shape[0] - 1, device=k.device)[:, None]  # (V, N)
    logits = torch.einsum("qhd,nhd->hqn", q.to(exact), keys) * scale
    logits = torch.where(own[:, None, None], logits, torch.finfo(exact).min)  # (V, H, Q, N)
    weights = torch.where(own[:, None, None], logits.softmax(-1), 0)  # a view without rows: zeros
    out = torch.einsum("vhqn,nhd->vqhd", weights, v.to(exact)).to(q.dtype)
    return out, q.new_empty(0, dtype=torch.float32), cu_seqlens.new_empty(0)
