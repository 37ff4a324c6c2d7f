"""The one public function: checks its input, then picks who computes."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from uhd_kernels.checks import check_packed, check_views, host_views
from uhd_kernels.configs import MAX_HEAD_DIM, MAX_LATENTS
from uhd_kernels.op import attention_op, refuse_vmap, run_portable
from uhd_kernels.torch_private import mapped

IMPLEMENTATIONS = ("auto", "triton", "sdpa", "reference")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HAS_TRITON = find_spec("triton") is not None  # looked for, not imported
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def varlen_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    key_positions: Tensor | None = None,
    position_offsets: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Every view's keys attended by the same latents: `softmax(scale * q (k + positions)^T) v`, view by view.

    Under autocast q, k, v and the table are cast to its dtype first. `uhd_kernels.calls` counts who computed.

    >>> q, k = torch.zeros(1, 1, 16), torch.zeros(3, 1, 16)  # equal logits: every view gives the mean of its values
    >>> v = torch.tensor([1.0, 3.0, 5.0]).view(3, 1, 1).expand(3, 1, 16)
    >>> cu_seqlens = torch.tensor([0, 2, 3], dtype=torch.int32)  # two views, of two keys and of one
    >>> varlen_cross_attention(q, k, v, cu_seqlens, max_seqlen=2)[:, 0, 0, 0].tolist()
    [2.0, 5.0]

    Args:
        q: (Q, H, d) latents, shared by every view.
        k: (N, H, d) keys of all views, packed without padding. Same dtype and device as `q`.
        v: (N, H, d) values, likewise.
        cu_seqlens: (V + 1,) int32, ascending from 0 to N; view i owns the rows `cu_seqlens[i]:cu_seqlens[i + 1]`.
            On the device of `q` (its values are then fetched, which waits for the device once) or on the host.
        max_seqlen: the longest view, or more.
        key_positions: (L, H, d) table of projected positions, dtype and device of `k`. Goes with `position_offsets`.
        position_offsets: (V,) int32, on the device or the host; view i gets the table rows that start there.
        scale: factor of the logits; None means d ** -0.5.
        impl: "triton" (CUDA and ROCm; on the CPU only under TRITON_INTERPRET=1; float32, float16 or bfloat16, d up to
            128, Q up to 256), "sdpa" (PyTorch, any device, dtype and head dim), "reference" (the slow oracle), or
            "auto": Triton on a GPU that can run it on these shapes, else SDPA.

    Returns:
        (V, Q, H, d). A view of length 0 gives zeros, and zero gradients.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a device, a length, an offset or the name of the implementation is wrong, "triton" cannot
            run here (the message says why), or the call is inside `torch.vmap`.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is unknown; choose one of {list(IMPLEMENTATIONS)}")
    given = [x for x in (q, k, v, cu_seqlens, key_positions, position_offsets) if x is not None]
    if not torch.compiler.is_compiling() and mapped(given):
        refuse_vmap()
    kind = q.device.type
    if _has_autocast(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        q, k, v, key_positions = (_autocast(x, dtype) for x in (q, k, v, key_positions))
        keywords = {"key_positions": key_positions, "position_offsets": position_offsets, "scale": scale, "impl": impl}
        with torch.autocast(kind, enabled=False):
            return varlen_cross_attention(q, k, v, cu_seqlens, max_seqlen, **keywords)
    check_packed(q, k, v)
    check_views(q, cu_seqlens, key_positions, position_offsets)
    problem = _triton_problem(q)
    if impl == "triton" and problem:
        raise ValueError(f"impl='triton' cannot run: {problem}; use impl='auto' or 'sdpa'")
    if impl == "auto":
        impl = "triton" if kind == "cuda" and not problem else "sdpa"
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    compiling = torch.compiler.is_compiling()
    if impl == "triton" and not compiling and any(unpack_dual(x).tangent is not None for x in given):
        raise ValueError("impl='triton' has no forward-mode derivative: use impl='reference'")
    if impl == "triton" or compiling:
        return attention_op(q, k, v, cu_seqlens, max_seqlen, key_positions, position_offsets, scale, impl)[0]
    rows = None if key_positions is None else len(key_positions)
    bounds, offsets = host_views(cu_seqlens, position_offsets, max_seqlen, len(k), rows)
    return run_portable(impl, q, k, v, bounds, key_positions, offsets, scale)


def _has_autocast(kind: str) -> bool:
    if torch.compiler.is_compiling():  # torch 2.11 cannot trace the question
        return kind != "meta"
    return torch.amp.is_autocast_available(kind)


def _autocast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x


def _triton_problem(q: Tensor) -> str | None:
    """Why the kernels cannot run on these latents; None if they can."""
    latents, heads, dim = q.shape
    if not HAS_TRITON:
        return "Triton is not installed"
    if q.device.type == "cuda":
        chip = torch.cuda.get_device_properties(q.device)  # which torch.compile takes as a constant
        if not torch.version.hip and chip.major < 8:
            return f"the GPU has compute capability {chip.major}.{chip.minor}, and the kernels need 8.0 or more"
    elif q.device.type != "cpu":
        return f"the tensors are on {q.device}, and the kernels run on CUDA and ROCm"
    elif not INTERPRETED:
        return "the tensors are on the CPU, where only Triton's interpreter runs (TRITON_INTERPRET=1, before import)"
    elif not torch.compiler.is_compiling():  # which cannot trace a launch of Triton's interpreter
        from uhd_kernels import cross_attention

        if reason := cross_attention.interpreter_problem():
            return reason
    if q.dtype not in TRITON_DTYPES:
        return f"the dtype is {q.dtype}, and the kernels take float32, float16 and bfloat16"
    if not 1 <= dim <= MAX_HEAD_DIM or not 1 <= latents <= MAX_LATENTS or not heads:
        return (
            f"q (Q, H, d) is {tuple(q.shape)}, and the kernels take Q from 1 to {MAX_LATENTS}, H from 1 and d from 1 "
            f"to {MAX_HEAD_DIM}"
        )
    return None
