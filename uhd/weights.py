"""Weights that must fit a module by name and shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

_Module = TypeVar("_Module", bound=nn.Module)

_CHECKED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def draw_linear(linear: nn.Linear) -> None:
    """Draw the weight from a truncated normal of std 0.02; the bias, where there is one, is zero."""
    nn.init.trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def draw_normal(tensor: Tensor, std: float) -> None:
    """Draw from a normal; not under the meta device, where torch would import its compiler, which takes seconds."""
    if not tensor.is_meta:
        nn.init.normal_(tensor, std=std)


def check_numbers(weights: Mapping[str, Tensor]) -> None:
    """Raise a ``ValueError`` where a weight is NaN or infinite; the message names the first.

    Tensors of other classes, which quantized and sharded weights are, are not looked at.
    """
    for name, tensor in weights.items():
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in _CHECKED and not tensor.is_meta
        if plain and tensor.numel() and not all(map(math.isfinite, map(float, tensor.detach().aminmax()))):
            raise ValueError(f"{name} holds NaN or infinity, expected finite numbers: save the weights again")


def shape_of(state: Mapping[str, Tensor], name: str, axes: int) -> tuple[int, ...]:
    """Read the shape of one tensor; ValueError where it is not there, or has another number of axes."""
    if name not in state or state[name].dim() != axes:
        raise ValueError(f"expected {name!r} with {axes} axes among the weights; got the names {sorted(state)}")
    return tuple(state[name].shape)


def sizes_of(state: Mapping[str, Tensor], query: str = "query", *, axes: int = 2) -> dict[str, int]:
    """Read the sizes of a `ResamplerConfig` off weights: `kv_proj` is there only where it changes the width."""
    *_, num_latents, width = shape_of(state, query, axes)
    vision_width = state["kv_proj.weight"].shape[-1] if "kv_proj.weight" in state else width
    return {"width": width, "vision_width": vision_width, "num_latents": num_latents}


def check_weights(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights with names missing or unexpected (listed), or of other shapes; `what` names their kind."""
    missing, unexpected = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing or unexpected:
        raise ValueError(f"weights do not fit {what}: missing {missing}, unexpected {unexpected}")
    shapes = {name: (tuple(state[name].shape), tuple(tensor.shape)) for name, tensor in expected.items()}
    if wrong := {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}:
        raise ValueError(f"weights of other shapes than {what} implies, as name: (got, expected): {wrong}")


def load_exactly(make: Callable[[], _Module], state: Mapping[str, Tensor], what: str, *, like: str) -> _Module:
    """Make a module with these weights, all of them and no others, which are copied.

    `make` is called under the meta device, since at the width of a language model an initialisation that is thrown
    away takes seconds. Dtype and device are those of the tensor named `like`. ValueError as in `check_weights`.
    """
    with torch.device("meta"):
        module = make()
    check_weights(state, module.state_dict(), what)
    module = module.to_empty(device=state[like].device).to(state[like].dtype)
    module.load_state_dict(state)
    return module
