"""A packed ViT's blocks at inference by compiled layers, in the dtype that the machine multiplies fastest.

Between two attentions a block is dense: LayerNorm and the product that gives queries, keys and values; after the
attention a product, LayerNorm and the MLP. Both halves are functions of tensors alone, the same for every block and
any number of tokens, so `torch.compile` compiles two of them, once; attention runs between them, group by group.

* Weights in bfloat16 or float16 on a CPU that has no matrix unit for them are cast to float32 where they are used, and
  the residual stream is float32: faster, nearer to the exact result, and nothing is kept that could be stale.
* In bfloat16 on a CPU with such a unit (AMX) the weights are kept packed as oneDNN wants them, and GELU and the
  residual sum happen inside its products. What is kept is compared with the weights on every call.
* Anywhere else the halves are compiled in the dtype of the weights.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uhd.shortcuts import contents_of, fastest_dtype, is_plain, transformed, wants_gradients
from uhd.torch_private import packed_products

from .blocks import MLP, Attention, Block, activate
from .int8 import Int8Linear, int8_linear

BlockRunner = Callable[[int, Tensor, Sequence[tuple[int, int]]], Tensor]
"""(number of a block, (tokens, D), (views, tokens per view) of the groups) -> (tokens, D)."""

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


class CompiledBlocks:
    """Runs a ViT's blocks where that gives what the modules would give; kept by the ViT, see `ViT.compile_blocks`.

    `backend` is one of `torch.compile` (ValueError if not), or "none": the same functions uncompiled, in the fastest
    dtype still. Where compilation fails (no C++ compiler, say) the functions run uncompiled, after one RuntimeWarning.
    Copies and pickles keep the backend only.
    """

    def __init__(self, backend: str | Callable = "inductor") -> None:
        known = callable(backend) or backend in ("inductor", "none")  # to list them all takes seconds
        if not known and backend not in torch.compiler.list_backends(exclude_tags=()):
            usual = ", ".join(map(repr, ["none", *torch.compiler.list_backends()]))
            raise ValueError(f"backend must be one of {usual}, or another of torch.compile; got {backend!r}")
        self.backend = backend
        self._packed: tuple[Tensor, list[dict[str, Tensor]]] | None = None  # contents of what, and that
        self._compiled: dict[Callable, Callable] = {}

    def __reduce__(self) -> tuple:
        return CompiledBlocks, (self.backend,)

    def runner(self, blocks: Sequence[Block], x: Tensor) -> BlockRunner | None:
        """Give what runs `blocks` on tokens like `x` (tokens, D), in its own dtype; None where the modules must.

        They must where gradients are wanted, under autocast, compilation, tracing and functorch; with hooks, LoRA or
        other wrappers, layers that are offloaded or quantised otherwise than by `Int8Linear`, tensors of other classes
        or on several devices.
        """
        if not len(blocks) or transformed() or torch.is_autocast_enabled(x.device.type) or type(x) is not Tensor:
            return None
        parameters = [parameter for block in blocks for parameter in block.parameters()]
        if wants_gradients((x, *parameters)) or not all(_known(block) for block in blocks):
            return None
        kept = (Tensor, nn.Parameter)
        if any(type(each) not in kept or each.device != x.device or each.dtype not in _FLOATS for each in parameters):
            return None
        given, dtype = x.dtype, fastest_dtype(x.dtype, x.device)
        halves = [Halves.of(block) for block in blocks]
        packed = self._pack(halves, x) if dtype == torch.bfloat16 else None

        def run(number: int, x: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
            if wants_gradients((x,)):  # of what runs between the blocks
                return blocks[number](x.to(given), shapes)
            mix, tensors = blocks[number].attn.mix, halves[number]
            if packed is not None:
                return packed_block(tensors, packed[number], x, lambda qkv: mix(qkv, shapes))
            x = x.to(dtype)
            qkv = self._run(before_attention, x, tensors)
            return self._run(after_attention, x, mix(qkv, shapes), tensors)

        return run

    def _pack(self, halves: Sequence[Halves], x: Tensor) -> list[dict[str, Tensor]] | None:
        """Every block's weights in oneDNN's own order, by layer; packed anew unless they hold the same numbers.

        None where they cannot be packed. `x` (tokens, D): what they will be used on.
        """
        weights = [{name: getattr(each, name).weight for name in ("qkv", "proj", "fc1", "fc2")} for each in halves]
        flat = [weight for each in weights for weight in each.values()]
        operators = packed_products()
        if x.device.type != "cpu" or any(weight.dtype != torch.bfloat16 for weight in flat) or operators is None:
            return None
        contents, kept = contents_of(flat), self._packed
        if kept is None or not torch.equal(contents, kept[0]):
            pack = operators.pack
            packed = [{name: pack(weight.detach(), len(x)) for name, weight in each.items()} for each in weights]
            kept = self._packed = (contents, packed)
        return kept[1]

    def _run(self, function: Callable, *args: object) -> Tensor:
        if self.backend == "none" or len(args[0]) < 2:  # for 0 and 1 it would compile again, each
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


def packed_block(halves: Halves, packed: dict[str, Tensor], x: Tensor, mix: Callable[[Tensor], Tensor]) -> Tensor:
    """A block by oneDNN's products over packed weights, GELU and residual sums inside them where they can be."""
    product = packed_products().product

    def residual(x: Tensor, update: Tensor, name: str, scale: Tensor | None) -> Tensor:
        weight, bias = packed[name], getattr(halves, name).bias
        if scale is None:
            return product.binary(update, x, weight, bias, "add")
        return x + product(update, weight, bias, "none", [], "") * scale

    qkv = product(_normed(x, halves.norm1), packed["qkv"], halves.qkv.bias, "none", [], "")
    x = residual(x, mix(qkv), "proj", halves.scale1)
    fused = {"gelu": ("gelu", [], "none"), "gelu_tanh": ("gelu", [], "tanh")}.get(halves.activation)
    hidden = product(_normed(x, halves.norm2), packed["fc1"], halves.fc1.bias, *(fused or ("none", [], "")))
    return residual(x, hidden if fused else activate(hidden, halves.activation), "fc2", halves.scale2)
