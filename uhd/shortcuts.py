"""Whether a call may take a faster way than its layers as they are written, and whether weights changed."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from uhd.machine import product_of
from uhd.torch_private import has_hooks, in_functorch, packed_products


def float_parameter(module: nn.Module, default: Tensor) -> Tensor:
    """First floating-point parameter, else `default`: inputs are cast to its dtype and device."""
    return next((parameter for parameter in module.parameters() if parameter.is_floating_point()), default)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is exactly of this class, and runs nothing at its call but its own forward."""
    return type(module) is kind and "forward" not in vars(module) and not has_hooks(module)


def transformed() -> bool:
    """Whether compilation, tracing or a functorch transform is going on, rather than plain execution."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or in_functorch()


def wants_gradients(tensors: Iterable[Tensor]) -> bool:
    """Whether autograd would record an operation on any of them."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class _FastLinear(nn.Linear):
    """The same weights, multiplied by oneDNN."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.numel():
            return super().forward(x)
        return packed_products().product(x, self.weight, self.bias, "none", [], "")


def at_its_fastest(module: nn.Module, x: Tensor) -> nn.Module:
    """Copy a module for one call on tensors like ``x``: in the dtype, and by the product, that this CPU likes best.

    Weights that keep their dtype are shared. Returns the module itself where nothing is faster, where gradients are
    wanted, under autocast and transforms, and where anything has hooks, wrappers, or tensors of other classes, dtypes
    or devices than the others.
    """
    if transformed():
        return module
    tensors = [*module.parameters(), *module.buffers()]
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    own = floats[0].dtype if floats else x.dtype
    product = product_of(own, x.device, max((each.numel() for each in floats), default=0))
    if product == (own, "native") or torch.is_autocast_enabled(x.device.type) or wants_gradients((x, *tensors)):
        return module
    plain = {(type(each) in (Tensor, nn.Parameter), each.device, each.dtype) for each in floats}
    alike = plain == {(True, x.device, own)}
    if not alike or not all(is_plain(part, type(part)) for part in module.modules()):
        return module
    cast = {id(each): each.detach().to(product.dtype) for each in floats if product.dtype != own}
    for each in module.parameters():
        if id(each) in cast:
            cast[id(each)] = nn.Parameter(cast[id(each)], requires_grad=False)
    made = copy.deepcopy(module, {**{id(each): each for each in tensors}, **cast})
    for part in made.modules():
        if type(part) is nn.Linear and product.way != "native":
            part.__class__ = _FastLinear
    return made


def contents_of(sources: Iterable[Tensor]) -> Tensor:
    """Sum all bits of each tensor, and sample an entry of every row and column: equal for equal contents.

    Fused optimizers and writes through ``tensor.data`` leave no trace in a tensor's version; this sees them.
    """
    parts: list[Tensor] = []
    for source in sources:
        bits = _bits(source.detach())
        parts.append(bits.sum(dtype=torch.int64)[None])
        if source.dim() == 2:
            along = torch.arange(max(source.shape), device=source.device)
            picked = source.detach()[along % source.shape[0], along % source.shape[1]]
            parts.append(_bits(picked).to(torch.int64))
    return torch.cat(parts)


def _bits(tensor: Tensor) -> Tensor:
    """View the numbers as integers, in words as long as they fill: long words are summed faster."""
    flat = tensor.contiguous().flatten()
    size, start, own = flat.nbytes, flat.storage_offset() * flat.itemsize, flat.itemsize
    words = (torch.int64, torch.int32, torch.int16)
    return flat.view(next(w for w in words if own <= w.itemsize and not (size % w.itemsize or start % w.itemsize)))
