"""Whether a call may take a faster way than its layers as they are written, and whether weights changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from uhd.machine import product_of
from uhd.torch_private import has_hooks, in_functorch, is_compiled, packed_products, shared_view


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
    """A module for one call on tensors like ``x``: in the dtype, and by the product, that this CPU likes best.

    All but weights of another dtype is shared. Returns the module itself where nothing is faster, where gradients are
    wanted, under autocast and transforms, and where anything has hooks, was compiled, or has tensors of other classes,
    dtypes or devices than the others.
    """
    tensors = [*module.parameters(), *module.buffers()]
    elsewhere = x.device.type != "cpu" or transformed() or torch.is_autocast_enabled("cpu")
    if elsewhere or wants_gradients((x, *tensors)):
        return module
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    own = floats[0].dtype if floats else x.dtype
    product = product_of(own, x.device, max((each.numel() for each in floats), default=0))
    plain = {(type(each) in (Tensor, nn.Parameter), each.device, each.dtype) for each in floats}
    if product == (own, "native") or plain != {(True, x.device, own)}:
        return module
    if not all(is_plain(part, type(part)) and not is_compiled(part) for part in module.modules()):
        return module
    cast = {id(each): each.detach().to(product.dtype) for each in floats if product.dtype != own}
    return _multiplying(module, product.way, cast)


def _multiplying(module: nn.Module, way: str, cast: Mapping[int, Tensor]) -> nn.Module:
    """The module with some of its tensors in another dtype, its layers multiplying so."""
    fast = type(module) is nn.Linear and way != "native"
    view = shared_view(module, _FastLinear if fast else type(module))
    for kind in ("_parameters", "_buffers"):
        setattr(view, kind, {name: cast.get(id(each), each) for name, each in getattr(module, kind).items()})
    parts = module._modules.items()
    view._modules = {name: part if part is None else _multiplying(part, way, cast) for name, part in parts}
    return view


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
