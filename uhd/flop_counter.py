"""FLOPs of a forward pass, counted from the shapes that its matrix products meet.

Formulas of FLOPs are held against this count, here and in the tests. ``torch.utils.flop_counter`` has the same
convention, but which attention it counts depends on the release: before torch 2.15 it leaves out that of a CPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from traceback import walk_stack
from typing import Any

import torch

from uhd.positions import interpolate_pos_embed
from uhd.torch_private import TorchDispatchMode

LEFT = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""Products of matrices: the place of the left one among the arguments. Linear layers and ``einsum`` become these."""

ATTENTION = re.compile(r"_scaled_dot_product_\w*attention(_for_[a-z]+)?")
"""Whatever kernel a release and a device take, its first arguments are queries, keys and values."""

SUSPECT = re.compile(r"mm|matmul|mv|dot|conv|linear|attention|transformer|rnn|lstm|gru|cdist|einsum")
"""Words in the names of operators that multiply; those of ``upsample_linear1d`` and its like are no products."""

HARMLESS = ("aten", "prim", "image", "torchvision")
"""Namespaces whose operators multiply no matrices unless their names say so; of others nothing is known."""


def count_flops(forward: Callable[[], object]) -> int:
    """Run ``forward`` without gradients and count its matrix products, 2 for each multiply-add.

    Attention is counted over all pairs, whatever its mask. Tensors on ``torch.device("meta")`` are counted as others.
    The small products that resize position tables are left out: they are no part of any formula.

    Raises:
        NotImplementedError: An operator that this counter does not know may have multiplied matrices.
    """
    counter = _Counter()
    with torch.no_grad(), counter:
        forward()
    return counter.total


class _Counter(TorchDispatchMode):
    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        count = _flops(str(func), args, out)
        if count and not any(frame.f_code is interpolate_pos_embed.__code__ for frame, _ in walk_stack(None)):
            self.total += count
        return out


def _flops(operator: str, args: Sequence[Any], out: Any) -> int:
    """Of one call of ``namespace.name.overload``."""
    namespace, name, _ = operator.split(".")
    if namespace == "aten" and name in LEFT:
        return 2 * out.numel() * args[LEFT[name]].shape[-1]
    if namespace == "aten" and ATTENTION.fullmatch(name):
        q, k, v = args[:3]
        return 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
    if (namespace, name) == ("uhd_kernels", "varlen_cross_attention"):
        q, k = args[:2]  # (Q, H, d) and (N, H, d): every key belongs to one view and meets all latents
        return 4 * q.numel() * len(k)
    if namespace not in HARMLESS or (SUSPECT.search(name) and "upsample" not in name):
        raise NotImplementedError(
            f"{operator} may multiply matrices, and this counter does not know their shapes: teach it to "
            "uhd/flop_counter.py; forward must not turn on torch.inference_mode, where layers arrive whole"
        )
    return 0
