"""Weights that must fit a resampler by name and shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

_Module = TypeVar("_Module", bound=nn.Module)


def shape_of(state: Mapping[str, Tensor], name: str, axes: int) -> tuple[int, ...]:
    """Read the shape of one tensor among weights.

    Raises:
        ValueError: it is not there, or has another number of axes.
    """
    if name not in state or state[name].dim() != axes:
        raise ValueError(f"expected {name!r} with {axes} axes among the weights; got the names {sorted(state)}")
    return tuple(state[name].shape)


def vision_width_of(state: Mapping[str, Tensor], width: int) -> int:
    """Read the features' width off `kv_proj`, which is there only where it is not the latents' width."""
    return state["kv_proj.weight"].shape[-1] if "kv_proj.weight" in state else width


def load_exactly(make: Callable[[], _Module], state: Mapping[str, Tensor], what: str, *, like: str) -> _Module:
    """Make a module with these weights, all of them and no others.

    Args:
        make: builds the module; called under the meta device, since at the width of a language model an
            initialisation that is thrown away takes seconds.
        state: name -> tensor; copied.
        what: names the kind of weights in messages.
        like: name of the tensor whose dtype and device the module gets.

    Raises:
        ValueError: names are missing or unexpected (listed), or shapes disagree.
    """
    with torch.device("meta"):
        module = make()
    expected = module.state_dict()
    missing, unexpected = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing or unexpected:
        raise ValueError(f"weights do not fit {what}: missing {missing}, unexpected {unexpected}")
    wrong = {name: (tuple(state[name].shape), tuple(t.shape)) for name, t in expected.items()}
    wrong = {name: shapes for name, shapes in wrong.items() if shapes[0] != shapes[1]}
    if wrong:
        raise ValueError(f"weights of other shapes than {what} implies, as name: (got, expected): {wrong}")
    module = module.to_empty(device=state[like].device).to(state[like].dtype)
    module.load_state_dict(state)
    return module
