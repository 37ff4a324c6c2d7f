"""A packed ViT's blocks at inference, by the products that are fastest on the machine: see `uhd.machine`.

Between two attentions a block is dense: LayerNorm and the product that gives queries, keys and values; after the
attention a product, LayerNorm and the MLP. Three ways compute that, each the same for any number of tokens:

* *fused*, where oneDNN's products are faster than torch's own: GELU and the residual sum happen inside them. Compiled
  encoders keep the weights packed as oneDNN wants them; what is kept is compared with the weights on every call.
* *cast*, where a half type is slower than float32: weights are cast where they are used, the residual stream is
  float32, nearer to the exact result, and nothing is kept.
* *compiled*, where torch's own products are fastest and compiling was asked for: both halves are functions of tensors
  alone, so `torch.compile` compiles two of them, once; attention runs between them, group by group.

Where none of these is asked for, the modules run as they are written.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import FunctionType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uhd.machine import attend_by_products, attention_of, product_of
from uhd.shortcuts import contents_of, is_plain, transformed, wants_gradients
from uhd.torch_private import packed_products

from .blocks import MLP, Attention, Block, activate
from .int8 import Int8Linear, int8_linear

BlockRunner = Callable[[int, Tensor, Sequence[tuple[int, int]]], Tensor]
"""(number of a block, (tokens, D), (views, tokens per view) of the groups) -> (tokens, D)."""

LAYERS = ("qkv", "proj", "fc1", "fc2")

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Dense(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None = None  # the weight is int8 then, see `uhd.vision.int8`


class Norm(NamedTuple):
    weight: Tensor
    bias: Tensor
    eps: float


class Halves(NamedTuple):
    """The tensors that a block computes with."""

    norm1: Norm
    qkv: Dense
    proj: Dense
    scale1: Tensor | None
    norm2: Norm
    fc1: Dense
    fc2: Dense
    scale2: Tensor | None
    activation: str

    @classmethod
    def of(cls, block: Block) -> Halves:
        """Take the tensors of a block as its modules hold them."""
        norm1, norm2 = (Norm(norm.weight, norm.bias, norm.eps) for norm in (block.norm1, block.norm2))
        layers = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
        qkv, proj, fc1, fc2 = (Dense(each.weight, each.bias, getattr(each, "scale", None)) for each in layers)
        return cls(norm1, qkv, proj, block.scale1, norm2, fc1, fc2, block.scale2, block.mlp.activation)


def before_attention(x: Tensor, block: Halves) -> Tensor:
    """(tokens, D) -> (tokens, 3 D), in the dtype of `x`."""
    return _linear(_normed(x, block.norm1), block.qkv)


def after_attention(x: Tensor, mixed: Tensor, block: Halves) -> Tensor:
    """Residual stream and attended values, both (tokens, D) -> (tokens, D), in the dtype of `x`."""
    x = _add(x, _linear(mixed, block.proj), block.scale1)
    hidden = _activate(_linear(_normed(x, block.norm2), block.fc1), block.activation)
    return _add(x, _linear(hidden, block.fc2), block.scale2)


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "gelu_tanh" and torch.compiler.is_compiling():
        # (1 + tanh u) / 2 = sigmoid(2 u), in a third of the time once it is one loop
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
    return activate(x, activation)


def _linear(x: Tensor, layer: Dense) -> Tensor:
    if layer.scale is not None:
        return int8_linear(x, layer.weight, layer.scale, layer.bias)
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def _normed(x: Tensor, norm: Norm) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def _add(x: Tensor, update: Tensor, scale: Tensor | None) -> Tensor:
    return x + (update if scale is None else update * scale.to(x.dtype))


class FastBlocks:
    """Runs a ViT's blocks where that gives what the modules would give; kept by the ViT, see `ViT.compile_blocks`.

    `backend` is one of `torch.compile` (ValueError if not), or "none": the same functions uncompiled. With `None`
    nothing is compiled or kept, and the modules run unless the machine has a faster product. Where compilation fails
    (no C++ compiler, say) the functions run uncompiled, after one RuntimeWarning. Copies and pickles keep the backend
    only.
    """

    def __init__(self, backend: str | Callable | None = None) -> None:
        known = callable(backend) or backend in (None, "inductor", "none")  # to list them all takes seconds
        if not known and backend not in torch.compiler.list_backends(exclude_tags=()):
            usual = ", ".join(map(repr, ["none", *torch.compiler.list_backends()]))
            raise ValueError(f"backend must be one of {usual}, or another of torch.compile; got {backend!r}")
        self.backend = backend
        self._packed: tuple[Tensor, list[Tensor]] | None = None  # contents of what, and that
        self._compiled: dict[Callable, Callable] = {}

    def __reduce__(self) -> tuple:
        return FastBlocks, (self.backend,)

    def runner(self, blocks: Sequence[Block], x: Tensor) -> BlockRunner | None:
        """Give what runs `blocks` on tokens like `x` (tokens, D), in its own dtype; None where the modules must.

        They must where gradients are wanted, under autocast, compilation, tracing and functorch; with hooks, LoRA or
        other wrappers, layers that are offloaded or quantised otherwise than by `Int8Linear`, tensors of other classes
        or on several devices.
        """
        if not len(blocks) or transformed() or type(x) is not Tensor:
            return None
        compiles, numbers = self.backend is not None, blocks[0].attn.qkv.weight.numel()
        product = product_of(x.dtype, x.device, numbers, keeps=compiles)
        by_products = attention_of(product.dtype, x.device, numbers) == "products"
        if not compiles and not by_products and product == (x.dtype, "native"):
            return None
        if torch.is_autocast_enabled(x.device.type):
            return None
        parameters = [parameter for block in blocks for parameter in block.parameters()]
        if wants_gradients((x, *parameters)) or not all(_known(block) for block in blocks):
            return None
        kept = (Tensor, nn.Parameter)
        if any(type(each) not in kept or each.device != x.device or each.dtype not in _FLOATS for each in parameters):
            return None
        given, dtype = x.dtype, product.dtype
        halves = [Halves.of(block) for block in blocks]
        weights = self._weights(halves, product.way, x)

        def run(number: int, x: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
            if wants_gradients((x,)):  # of what runs between the blocks
                return blocks[number](x.to(given), shapes)
            x = x.to(dtype)
            how = {"attend": attend_by_products} if by_products else {}
            mix = partial(blocks[number].attn.mix, shapes=shapes, **how)
            if weights is not None:
                return fused_block(halves[number], weights[number], x, mix)
            mixed = mix(self._run(before_attention, x, halves[number]))
            return self._run(after_attention, x, mixed, halves[number])

        return run

    def _weights(self, halves: Sequence[Halves], way: str, x: Tensor) -> list[dict[str, Tensor]] | None:
        """Every block's weights for `fused_block`, by layer; None where oneDNN does not multiply them.

        Packed ones are packed anew unless they hold the same numbers. `x` (tokens, D): what they will be used on.
        """
        weights = [{name: getattr(each, name).weight for name in LAYERS} for each in halves]
        flat = [weight for each in weights for weight in each.values()]
        if way == "native" or any(weight.dtype != x.dtype for weight in flat):
            return None
        if way == "onednn":
            return weights
        contents, kept = contents_of(flat), self._packed
        if kept is None or not torch.equal(contents, kept[0]):
            pack = packed_products().pack
            packed = [{name: pack(weight.detach(), len(x)) for name, weight in each.items()} for each in weights]
            kept = self._packed = (contents, packed)
        return kept[1]

    def _run(self, function: Callable, *args: object) -> Tensor:
        if self.backend in (None, "none") or len(args[0]) < 2:  # for 0 and 1 it would compile again, each
            return function(*args)
        try:
            if function not in self._compiled:
                # a copy: torch.compile allows eight compilations per code object in a process
                copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
                self._compiled[function] = torch.compile(copy, backend=self.backend, dynamic=True)
            with torch.no_grad():  # nor for each mode of autograd
                return self._compiled[function](*args)
        except Exception as problem:  # of many kinds, from many compilers
            result = function(*args)  # what is wrong with the input is raised here
            cause = str(problem).strip().splitlines()
            warnings.warn(
                f"torch.compile failed ({type(problem).__name__}: {cause[0] if cause else ''}); the layers run "
                "uncompiled from here on",
                RuntimeWarning,
                stacklevel=2,
            )
            self.backend = "none"
            return result


def _known(block: Block) -> bool:
    if not (is_plain(block, Block) and is_plain(block.attn, Attention) and is_plain(block.mlp, MLP)):
        return False
    layers = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    return all(is_plain(norm, nn.LayerNorm) for norm in (block.norm1, block.norm2)) and all(
        is_plain(layer, nn.Linear) or is_plain(layer, Int8Linear) for layer in layers
    )


def fused_block(halves: Halves, weights: Mapping[str, Tensor], x: Tensor, mix: Callable[[Tensor], Tensor]) -> Tensor:
    """A block by oneDNN's products over weights as they are, packed or not; GELU and residual sums inside them.

    All is computed in the dtype of `x`, to which weights in another one are cast.
    """
    product = packed_products().product

    def dense(x: Tensor, name: str, *fused: object) -> Tensor:
        weight, bias = weights[name].to(x.dtype), getattr(halves, name).bias
        bias = None if bias is None else bias.to(x.dtype)
        if fused and isinstance(fused[0], Tensor):
            return product.binary(x, *fused, weight, bias, "add")
        return product(x, weight, bias, *(fused or ("none", [], "")))

    def residual(x: Tensor, update: Tensor, name: str, scale: Tensor | None) -> Tensor:
        return dense(update, name, x) if scale is None else _add(x, dense(update, name), scale)

    x = residual(x, mix(dense(_normed(x, halves.norm1), "qkv")), "proj", halves.scale1)
    fused = {"gelu": ("gelu", [], "none"), "gelu_tanh": ("gelu", [], "tanh")}.get(halves.activation)
    hidden = dense(_normed(x, halves.norm2), "fc1", *(fused or ()))
    return residual(x, hidden if fused else activate(hidden, halves.activation), "fc2", halves.scale2)
