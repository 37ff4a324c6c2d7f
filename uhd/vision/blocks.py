"""What a ViT is stacked of: attention inside every view, an MLP, and the block around both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import ViTConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(views, heads, tokens, D / heads) queries, keys, values -> the same shape."""


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply an activation by name to (tokens, hidden); "swiglu" halves the width: its first half gates the second."""
    if activation == "swiglu":
        gate, x = x.chunk(2, dim=-1)
        return F.silu(gate) * x
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


class Block(nn.Module):
    """One transformer block: attention, then an MLP, each behind a LayerNorm and added to its input.

    With layer scale, what is added is first scaled channel by channel.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width, scale = config.width, config.layer_scale
        self.norm1 = nn.LayerNorm(width, eps=config.eps)
        self.attn = Attention(width, config.heads, bias=config.qkv_bias)
        self.scale1 = None if scale is None else nn.Parameter(torch.full((width,), float(scale)))
        self.norm2 = nn.LayerNorm(width, eps=config.eps)
        self.mlp = MLP(width, config.mlp_width, activation=config.activation)
        self.scale2 = None if scale is None else nn.Parameter(torch.full((width,), float(scale)))

    def forward(self, x: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """(tokens, D) -> (tokens, D); `shapes` as in `Attention`."""
        update = self.attn(self.norm1(x), shapes)
        x = x + (update if self.scale1 is None else update * self.scale1)
        update = self.mlp(self.norm2(x))
        return x + (update if self.scale2 is None else update * self.scale2)


class Attention(nn.Module):
    """Multi-head self-attention inside every view, one `scaled_dot_product_attention` per group of equal lengths."""

    def __init__(self, width: int, heads: int, *, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """(tokens, D) -> (tokens, D); `shapes` lists (views, tokens per view) of the groups, in the order of `x`."""
        return self.proj(self.mix(self.qkv(x), shapes))

    def mix(
        self, qkv: Tensor, shapes: Sequence[tuple[int, int]], attend: Attend = F.scaled_dot_product_attention
    ) -> Tensor:
        """Attend with projected queries, keys and values: (tokens, 3 D) -> (tokens, D)."""
        mixed = []
        for part, (views, _) in zip(qkv.split([b * n for b, n in shapes]), shapes, strict=True):
            q, k, v = rearrange(part, "(b n) (three h d) -> three b h n d", b=views, three=3, h=self.heads)
            mixed.append(rearrange(attend(q, k, v), "b h n d -> (b n) (h d)"))
        if len(mixed) == 1:
            return mixed[0]
        return torch.cat(mixed) if mixed else qkv[:, : qkv.shape[1] // 3]


class MLP(nn.Module):
    """Linear, activation, Linear; "swiglu" doubles the first layer and gates its second half by silu of its first."""

    def __init__(self, width: int, hidden: int, *, activation: str, out: int | None = None) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(width, 2 * hidden if activation == "swiglu" else hidden)
        self.fc2 = nn.Linear(hidden, width if out is None else out)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, width) -> (tokens, out)."""
        return self.fc2(activate(self.fc1(x), self.activation))
