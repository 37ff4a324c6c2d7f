"""The only file of uhd that uses names which torch does not publish, with what happens where one has vanished."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class PackedProducts(NamedTuple):
    """oneDNN's operators on weights in its own order."""

    pack: Callable[..., Tensor]
    product: Callable[..., Tensor]


def packed_products() -> PackedProducts | None:
    """What `torch.compile` itself calls for frozen weights, see torch/_inductor/mkldnn_lowerings.py.

    None where torch lacks either operator: then no weights are packed, and compiled layers run instead.
    """
    operators = torch.ops.mkldnn
    if not (hasattr(operators, "_reorder_linear_weight") and hasattr(operators, "_linear_pointwise")):
        return None
    return PackedProducts(operators._reorder_linear_weight, operators._linear_pointwise)


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """a (n, k) int8, b (k, m) int8 -> (n, m) int32, exact.

    Where torch lacks `torch._int_mm` the product is taken in float64: as exact, but slower.
    """
    if hasattr(torch, "_int_mm"):
        return torch._int_mm(a, b)
    return (a.double() @ b.double()).to(torch.int32)


def in_functorch() -> bool:
    """Whether a transform of `torch.func` is going on.

    True where torch lacks `torch._C._functorch.peek_interpreter_stack`: then layers always run as they are written.
    """
    peek = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
    return peek is None or peek() is not None


def has_hooks(module: nn.Module) -> bool:
    """Whether anything beside its forward runs when a module is called.

    True where modules keep their hooks under other names than today: then the module is always called.
    """
    held = vars(module)
    try:
        return bool(
            held["_forward_hooks"]
            or held["_forward_pre_hooks"]
            or held["_backward_hooks"]
            or held["_backward_pre_hooks"]
        )
    except KeyError:
        return True
