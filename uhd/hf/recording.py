"""What a vision encoder computes on its way to its features, recorded by hooks for those who ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from uhd.grids import check_grids
from uhd.ranks import unwrapped
from uhd.vision import ViT
from uhd.vision.groups import ViewGroups


@dataclass
class Recording:
    """A vision encoder's calls, one after another: all views of a batch, in one step or in several.

    Attributes:
        features: Of every call, (N, D_v).
        states: Of every call, its hidden states: (N, D_v) after the embedding and after every block of a ViT.
        attentions: Of every call, by block: one (heads, T_v, T_v) for each view.
        order: Of the last call, the views as the ViT stores them.
    """

    features: list[Tensor] = field(default_factory=list)
    states: list[tuple[Tensor, ...]] = field(default_factory=list)
    attentions: list[list[tuple[Tensor, ...]]] = field(default_factory=list)
    order: list[int] = field(default_factory=list)

    def output(self) -> dict[str, Any]:
        """The fields of transformers' output of a vision encoder; ``None`` where nothing was recorded."""
        return {
            "last_hidden_state": torch.cat(self.features) if self.features else None,
            "hidden_states": tuple(map(torch.cat, zip(*self.states, strict=True))) or None,
            "attentions": tuple(sum(calls, ()) for calls in zip(*self.attentions, strict=True)) or None,
        }


@contextmanager
def recorded(vision: nn.Module, *, hidden_states: bool = False, attentions: bool = False) -> Iterator[Recording]:
    """While open, record the features of ``vision``, and of a :class:`uhd.vision.ViT` what else is asked for.

    Attentions are computed a second time, in float32 and without gradients, so they cost as much as all blocks do.
    """
    found = Recording()
    vision = unwrapped(vision)
    with ExitStack() as hooks:
        if isinstance(vision, ViT) and (hidden_states or attentions):
            handles = [vision.register_forward_pre_hook(_ask_for_states, with_kwargs=True)]
            if attentions:
                handles.append(vision.register_forward_pre_hook(_next_call(found)))
                handles += [block.attn.register_forward_pre_hook(_watch(found)) for block in vision.blocks]
            for handle in handles:
                hooks.callback(handle.remove)

        def keep(module: nn.Module, args: tuple, output: Any) -> Tensor:
            features, states = output if isinstance(output, tuple) else (output, None)
            found.features.append(features)
            if hidden_states and states is not None:
                found.states.append(states)
            return features

        # before the hooks of others, which know nothing of states
        hooks.callback(vision.register_forward_hook(keep, prepend=True).remove)
        yield found


def _ask_for_states(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, {**kwargs, "hidden_states": True}  # also makes a compiled ViT run its own modules


def _next_call(found: Recording) -> Any:
    def begin(vision: ViT, args: tuple) -> None:
        groups = ViewGroups.of(check_grids(args[1]), vision.config.num_prefix_tokens)
        found.attentions.append([])
        found.order = [view for views in groups.members for view in views]

    return begin


def _watch(found: Recording) -> Any:
    @torch.no_grad()  # nothing that a checkpointed block would have to compute again in its backward pass
    def watch(attention: nn.Module, args: tuple) -> None:
        x, shapes = args
        maps: list[Tensor] = []
        for part, (views, _) in zip(attention.qkv(x).split([b * n for b, n in shapes]), shapes, strict=True):
            q, k, _ = rearrange(part, "(b n) (three h d) -> three b h n d", b=views, three=3, h=attention.heads)
            scores = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
            maps += scores.softmax(-1).to(x.dtype)
        by_view = dict(zip(found.order, maps, strict=True))
        found.attentions[-1].append(tuple(by_view[view] for view in range(len(maps))))

    return watch
