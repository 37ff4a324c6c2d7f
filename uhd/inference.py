"""What decides whether a call may take a faster way than its layers as they are written, and in which dtype."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from uhd.torch_private import has_hooks, in_functorch

_UNITS = {torch.bfloat16: "amx_tile", torch.float16: "amx_fp16"}


def fastest_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """``dtype``, or float32 where it is a half type and ``device`` is a CPU that has no matrix unit (AMX) for it.

    Without one, oneDNN's products in bfloat16 run at half of float32's rate or below.
    """
    if device.type != "cpu" or dtype not in _UNITS:
        return dtype
    return dtype if torch.cpu.get_capabilities().get(_UNITS[dtype], False) else torch.float32


def float_parameter(module: nn.Module, default: Tensor) -> Tensor:
    """The parameter whose dtype and device inputs get; quantised ones, which are integers, do not count."""
    return next((parameter for parameter in module.parameters() if parameter.is_floating_point()), default)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Exactly of this class, with nothing that runs at its call but its own forward."""
    return type(module) is kind and "forward" not in vars(module) and not has_hooks(module)


def transformed() -> bool:
    """Whether compilation, tracing or a functorch transform is going on, rather than plain execution."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or in_functorch()


def wants_gradients(tensors: Iterable[Tensor]) -> bool:
    """Whether autograd would record an operation on any of them."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def in_fastest_dtype(module: nn.Module, x: Tensor) -> nn.Module:
    """``module``, or for one call on tensors like ``x`` a copy with weights in the dtype that is multiplied fastest.

    The module itself where that is its own dtype, where gradients are wanted, under autocast and transforms, and where
    anything has hooks, wrappers, or tensors of other classes, dtypes or devices than the others.
    """
    tensors = [*module.parameters(), *module.buffers()]
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    if not floats or transformed() or torch.is_autocast_enabled(x.device.type) or wants_gradients((x, *tensors)):
        return module
    own = floats[0].dtype
    dtype = fastest_dtype(own, x.device)
    alike = all(
        type(each) in (Tensor, nn.Parameter) and (each.device, each.dtype) == (x.device, own) for each in floats
    )
    if dtype == own or not alike or not all(is_plain(part, type(part)) for part in module.modules()):
        return module
    cast = {id(each): each.detach().to(dtype) for each in floats}
    for each in module.parameters():
        if id(each) in cast:
            cast[id(each)] = nn.Parameter(cast[id(each)], requires_grad=False)
    return copy.deepcopy(module, {**{id(each): each for each in tensors}, **cast})
