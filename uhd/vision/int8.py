"""Linear layers with int8 weights and inputs quantised as they come, for inference on a CPU.

    W = s_o * V,  V int8,  s_o = max|W_o| / 127   for each output channel o, once
    x = t_n * u,  u int8,  t_n = max|x_n| / 127   for each token n, on every call
    y = t_n * s_o * (u . V) + b                   with an exact int32 sum

Both scales are symmetric. The weights take a quarter of float32's memory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LEVELS = 127


class Int8Linear(nn.Module):
    """A frozen linear layer; (..., in) -> (..., out) in the dtype of its input.

    Args:
        linear: The layer to take the weights of, which may be in any floating dtype.

    Attributes:
        weight: (out, in) int8.
        scale: (out,) float32.
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

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        """Raises RuntimeError where the input wants a gradient: rounding has none."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("int8 layers give no gradients: call under torch.no_grad(), or train before quantising")
        return int8_linear(x.flatten(0, -2), self.weight, self.scale, self.bias).unflatten(0, x.shape[:-1])


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (tokens, in), weight (out, in) int8, scale (out,) -> (tokens, out) in the dtype of `x`."""
    step = (x.abs().amax(dim=-1, keepdim=True).float() / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    rounded = (x / step).round().to(torch.int8)
    total = torch._int_mm(rounded, weight.t()).float() * step * scale
    return (total if bias is None else total + bias.float()).to(x.dtype)


def quantize_linears(module: nn.Module) -> int:
    """Put an `Int8Linear` in the place of every `nn.Linear` inside `module`, in place; returns how many."""
    count = 0
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            setattr(module, name, Int8Linear(child))
            count += 1
        else:
            count += quantize_linears(child)
    return count
