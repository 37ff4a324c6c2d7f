"""The operator that `torch.compile` and autograd see: opaque, with its shapes, its gradient and its counter.

Triton always runs in here. The other implementations do only under `torch.compile`, which could not trace the grouping
of views by their lengths; outside it they are plain PyTorch.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import torch
from torch import Tensor

from uhd_kernels.checks import host_views
from uhd_kernels.reference import cross_attention_backward, cross_attention_reference
from uhd_kernels.sdpa import cross_attention_sdpa

PORTABLE = {"sdpa": cross_attention_sdpa, "reference": cross_attention_reference}

calls: Counter[str] = Counter()  # how often each of "triton", "triton backward", "sdpa", "reference" has run


@torch.library.custom_op("uhd_kernels::varlen_cross_attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    key_positions: Tensor | None,
    position_offsets: Tensor | None,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (V, Q, H, d); logsumexp (V, H, Q) float32, base 2, empty unless Triton ran; the index for the backward.

    The index is `cu_seqlens` and `position_offsets` one after the other, where the backward needs them: on the device
    for Triton, moved there in one transfer, and on the host otherwise.
    """
    table_rows = None if key_positions is None else len(key_positions)
    bounds, offsets = host_views(cu_seqlens, position_offsets, max_seqlen, len(k), table_rows)
    if impl != "triton":
        out = run_portable(impl, q, k, v, bounds, key_positions, offsets, scale)
        out = out.contiguous() if offsets else q.new_empty(0, *q.shape)  # an output must not be a view of an input
        return out, _no_lse(q), torch.tensor([*bounds, *offsets], dtype=torch.int32)
    from uhd_kernels import cross_attention

    calls["triton"] += 1
    index = torch.tensor([*bounds, *offsets], dtype=torch.int32).to(q.device, non_blocking=True)
    cu, starts = index.split([len(bounds), len(offsets)])
    longest = max((end - start for start, end in pairwise(bounds)), default=0)
    return *cross_attention.forward(q, k, v, cu, longest, key_positions, starts, scale), index


def run_portable(impl, q, k, v, bounds, key_positions, offsets, scale) -> Tensor:
    calls[impl] += 1
    if not offsets:
        return q.expand(0, *q.shape)
    return PORTABLE[impl](q, k, v, bounds, key_positions=key_positions, offsets=offsets, scale=scale)


def _no_lse(q: Tensor) -> Tensor:
    return q.new_empty(0, dtype=torch.float32)


@attention_op.register_fake
def _(q, k, v, cu_seqlens, max_seqlen, key_positions, position_offsets, scale, impl):
    views = cu_seqlens.shape[0] - 1
    latents, heads, dim = q.shape
    out = q.new_empty(views, latents, heads, dim)
    if impl != "triton":
        return out, _no_lse(q), torch.empty(2 * views + 1, dtype=torch.int32, device="cpu")
    lse = q.new_empty(views, heads, latents, dtype=torch.float32)
    return out, lse, q.new_empty(2 * views + 1, dtype=torch.int32)


@torch.library.custom_op("uhd_kernels::varlen_cross_attention_backward", mutates_args=())
def attention_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    index: Tensor,
    max_seqlen: int,
    key_positions: Tensor | None,
    scale: float,
    impl: str,
    table_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the table; the last is empty where it was not asked for."""
    views = len(index) // 2
    calls[f"{impl} backward"] += 1
    if impl != "triton":
        bounds, offsets = index[: views + 1].tolist(), index[views + 1 :].tolist()
        dq, dk, dv, d_table = cross_attention_backward(
            grad, q, k, v, bounds, key_positions=key_positions, offsets=offsets, scale=scale
        )
    else:
        from uhd_kernels import cross_attention

        cu, offsets = index.split([views + 1, views])
        dq, dk, dv, d_table = cross_attention.backward(
            grad, q, k, v, out, lse, cu, max_seqlen, key_positions, offsets, scale, table_gradient=table_gradient
        )
    return dq, dk, dv, d_table if table_gradient else q.new_empty(0)


@attention_backward_op.register_fake
def _(grad, q, k, v, out, lse, index, max_seqlen, key_positions, scale, impl, table_gradient):
    d_table = q.new_empty(key_positions.shape if table_gradient else 0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_table


def _save(ctx, inputs, output) -> None:
    q, k, v, _, max_seqlen, table, _, ctx.scale, ctx.impl = inputs
    ctx.max_seqlen = min(max_seqlen, k.shape[0])  # a generous bound must not decide how keys are split
    out, lse, index = output
    ctx.mark_non_differentiable(lse, index)
    ctx.save_for_backward(q, k, v, out, lse, index, table)


def _differentiate(ctx, grad: Tensor, _lse, _index):
    q, k, v, out, lse, index, table = ctx.saved_tensors
    table_gradient = ctx.needs_input_grad[5]
    dq, dk, dv, d_table = attention_backward_op(
        grad, q, k, v, out, lse, index, ctx.max_seqlen, table, ctx.scale, ctx.impl, table_gradient
    )
    return dq, dk, dv, None, None, d_table if table_gradient else None, None, None, None


attention_op.register_autograd(_differentiate, setup_context=_save)


def refuse_vmap(*_):
    raise ValueError(
        "varlen_cross_attention cannot be mapped with vmap: views of unequal length are already its batch; "
        "pack the views of all items into one call"
    )


attention_op.register_vmap(refuse_vmap)
attention_backward_op.register_vmap(refuse_vmap)
