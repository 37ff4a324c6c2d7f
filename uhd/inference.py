"""What decides whether a call may take a faster way than its layers as they are written, and in which dtype."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_UNITS = {torch.bfloat16: "_is_amx_tile_supported", torch.float16: "_is_amx_fp16_supported"}


def fastest_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """``dtype``, or float32 where it is a half type and ``device`` is a CPU that has no matrix unit (AMX) for it.

    Without one, oneDNN's products in bfloat16 run at half of float32's rate or below.
    """
    if device.type != "cpu" or dtype not in _UNITS:
        return dtype
    return dtype if getattr(torch.cpu, _UNITS[dtype], bool)() else torch.float32


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Exactly of this class, with nothing that runs at its call but its own forward."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return type(module) is kind and "forward" not in vars(module) and not any(hooks)


def transformed() -> bool:
    """Whether compilation, tracing or a functorch transform is going on, rather than plain execution."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def wants_gradients(tensors: Iterable[Tensor]) -> bool:
    """Whether autograd would record an operation on any of them."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
