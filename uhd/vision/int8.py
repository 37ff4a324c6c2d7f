"""Linear layers with int8 weights and inputs quantised as they come, for inference on a CPU.

    W = s_o * V,  V int8,  s_o = max|W_o| / 127   for each output channel o, once
    x = t_n * u,  u int8,  t_n = max|x_n| / 127   for each token n, on every call
    y = t_n * s_o * (u . V) + b                   with an exact int32 sum

Both scales are symmetric. The weights take a quarter of float32's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from uhd.shortcuts import is_plain
from uhd.torch_private import int8_is_exact, int8_product

from .blocks import MLP, Attention

LEVELS = 127


class Int8Linear(nn.Module):
    """A frozen linear layer; (..., in) -> (..., out) in the dtype of its input.

    Attributes:
        weight: (out, in) int8.
        scale: (out,) float32, also after a cast.
        bias: as it was, or None.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / LEVELS
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self.train(linear.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable, recurse: bool = True) -> Int8Linear:
        kept = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != kept.dtype:  # a half type would round all of a row once more, for good
            self.scale = kept.to(self.scale.device)
        return self

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        weight = state.get(f"{prefix}weight")
        if weight is not None and weight.dtype != torch.int8:
            args[-1].append(f"{prefix}weight is {weight.dtype}, this layer is int8: load before quantising")
            return
        super()._load_from_state_dict(state, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (..., in) -> (..., out); RuntimeError where the input wants a gradient, which rounding has not."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("int8 layers give no gradients: call under torch.no_grad(), or train before quantising")
        y = int8_linear(x.reshape(-1, self.in_features), self.weight, self.scale, self.bias)
        return y.reshape(*x.shape[:-1], self.out_features)


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply x (tokens, in) by int8 weights (out, in) with scales (out,): (tokens, out) in the dtype of `x`."""
    step = (x.abs().amax(dim=-1, keepdim=True).float() / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    rounded = (x / step).round().to(torch.int8)
    total = int8_product(rounded, weight.t()).float() * step * scale
    return (total if bias is None else total + bias.float()).to(x.dtype)


def quantize_linears(blocks: nn.Module) -> int:
    """Replace the linear layers of all attentions and MLPs by `Int8Linear`, in place; return how many.

    Layers that are wrapped, offloaded or have hooks stay as they are, LoRA's own among them.
    """
    count = 0
    for module in blocks.modules():
        if not isinstance(module, (Attention, MLP)):
            continue
        for name, child in list(module.named_children()):
            if is_plain(child, nn.Linear) and not child.weight.is_meta:
                int8_is_exact(child.weight.device.type)  # tried here, since compiled code could not
                setattr(module, name, Int8Linear(child))
                count += 1
    return count


def refuse_int8(module: nn.Module) -> None:
    """Refuse to save a module that holds int8 layers: no loader reads them back."""
    if any(isinstance(each, Int8Linear) for each in module.modules()):
        raise ValueError("a quantised encoder cannot be saved: save it before encoder.quantize()")
