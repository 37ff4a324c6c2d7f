"""The file that knows which unpublished names of torch uhd uses, with what happens where one has vanished.

Methods that torch calls and uhd overrides stand in :data:`OVERRIDDEN`; all else is used here only.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # as torch's notes have it

_INT8_IS_EXACT: dict[str, bool] = {}
_NEW_VERSIONS = itertools.count(-1, -1)


OVERRIDDEN = {
    "_apply": "what folded weights and int8 weights are dropped or kept by when a module moves; under another name "
    "they are compared at the next call, or int8 weights are cast with the module",
    "_load_from_state_dict": "int8 layers refuse plain weights here; under another name loading them raises on shapes",
}
"""Methods of ``nn.Module`` that uhd overrides, and what follows where torch no longer calls them."""

MODULE_STATE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training")
"""Where a module keeps what it is made of."""


def shared_view(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Make a module of class ``kind`` with the very parts and attributes of ``module``, but without its hooks.

    Raises:
        RuntimeError: torch keeps a module's parts under other names than today.
    """
    view = object.__new__(kind)
    nn.Module.__init__(view)
    missing = [name for name in MODULE_STATE if name not in vars(view)]
    if missing:
        raise RuntimeError(f"this torch keeps no {missing[0]} in a module: `uhd doctor` says what is supported")
    own = {"forward", *vars(view)} - set(MODULE_STATE)
    vars(view).update({name: value for name, value in vars(module).items() if name not in own})
    return view


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; a new number each time where torch does not count, or for inference."""
    try:
        return tensor._version
    except (AttributeError, RuntimeError):
        return next(_NEW_VERSIONS)


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

    Where torch lacks `torch._int_mm`, or it saturates, the product is taken in float64: as exact, but slower.
    """
    if int8_is_exact(a.device.type):
        return torch._int_mm(a, b)
    return (a.double() @ b.double()).to(torch.int32)


def int8_is_exact(device_type: str) -> bool:
    """Whether `torch._int_mm` is there and right, tried once a kind of device with the largest numbers.

    On a CPU without VNNI oneDNN adds pairs of products in 16 bits, which saturate.
    """
    if not hasattr(torch, "_int_mm"):
        return False
    if device_type not in _INT8_IS_EXACT:
        largest = torch.full((32, 64), 127, dtype=torch.int8, device=device_type)
        total = torch._int_mm(largest, largest.t())
        _INT8_IS_EXACT[device_type] = bool((total == 64 * 127**2).all())
    return _INT8_IS_EXACT[device_type]


def in_functorch() -> bool:
    """Whether a transform of `torch.func` is going on.

    True where torch lacks `torch._C._functorch.peek_interpreter_stack`: then layers always run as they are written.
    """
    peek = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
    return peek is None or peek() is not None


def in_dispatch_mode() -> bool:
    """Whether something looks at every operation, such as a count of FLOPs, which knows torch's own products only.

    True where torch lacks `torch.utils._python_dispatch.is_in_torch_dispatch_mode`: as above.
    """
    ask = getattr(torch.utils._python_dispatch, "is_in_torch_dispatch_mode", None)
    return ask is None or ask()


def has_hooks(module: nn.Module) -> bool:
    """Whether anything beside its forward runs when a module is called.

    True where modules keep their hooks under other names than today: then the module is always called.
    """
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(vars(module).get(kind, True) for kind in kinds)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called; False where torch keeps that under another name than today."""
    return getattr(module, "_compiled_call_impl", None) is not None
