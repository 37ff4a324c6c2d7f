"""Samples side by side in rows, so that no position is spent on padding: the model's half, which keeps them apart.

A packed row is told by ``position_ids`` that start again at 0 with every sample. Attention then stays inside each
sample, whatever the implementation: transformers makes masks, or the lengths that flash attention takes, of such
positions where there is neither a mask nor a cache. :func:`refuse_mixing` tries once whether a language model does.
"""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from uhd.hf.injection import constants_shaken, evaluating, probe_ids
from uhd.ranks import unwrapped

_TRIED: WeakKeyDictionary[nn.Module, dict[str, float]] = WeakKeyDictionary()
"""By language model and attention: how far logits of a packed row are from those of its samples alone."""

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}


def samples_in_rows(position_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
    """The number of its sample, counted through the batch, at each position of packed rows.

    Args:
        position_ids: (B, T), or what a language model takes instead, which is not packed.
        attention_mask: (B, T) with 0 for padding, which starts no sample; a mask of more dimensions is the caller's
            own way of keeping samples apart.

    Returns:
        (B, T) int64 on the CPU, or ``None`` where every row is one sample.

    >>> samples_in_rows(torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]), None).tolist()
    [[0, 0, 0, 1, 1], [2, 2, 3, 3, 3]]
    >>> samples_in_rows(torch.tensor([[0, 0, 0, 1, 2]]), torch.tensor([[0, 0, 1, 1, 1]])) is None
    True
    """
    own_mask = attention_mask is not None and attention_mask.dim() != 2
    if position_ids is None or position_ids.dim() != 2 or own_mask:
        return None
    starts = position_ids.cpu() == 0
    starts[:, 0] = False
    if attention_mask is not None and attention_mask.shape == position_ids.shape:
        attended = attention_mask.cpu().bool()
        starts[:, 1:] &= attended[:, 1:] & attended[:, :-1]
    if not starts.any():
        return None
    starts[:, 0] = True
    return (starts.flatten().cumsum(0) - 1).view(position_ids.shape)


def check_packed(lm: nn.Module, attention_mask: Tensor | None, position_ids: Tensor, cache: Any) -> None:
    """Raise a ``ValueError`` where samples of packed rows would see each other, or their padding."""
    if cache is not None:
        raise ValueError("packed rows (position_ids start again at 0) are for training: leave the cache out")
    if attention_mask is not None and (attention_mask.diff(dim=-1) > 0).any():
        raise ValueError(
            "packed rows (position_ids start again at 0) have padding before a sample: padding stands at their ends, "
            "and no attention_mask is needed"
        )
    if len(position_ids) > 1 and "flash" in str(lm.config._attn_implementation):
        raise ValueError(
            f"flash attention keeps samples apart in one row, got {len(position_ids)} rows: "
            "PackingCollator(..., one_row=True)"
        )
    refuse_mixing(lm)


def mixing(lm: nn.Module) -> float:
    """How far the logits of a packed row are from those of its samples alone, over the largest.

    The language model runs on a few ids the first time for each way of attention; the answer is kept. Where parameters
    are spread over ranks, all of these must ask together.
    """
    attention = str(lm.config._attn_implementation)
    known = _TRIED.setdefault(lm, {})
    if attention not in known:
        known[attention] = _difference(lm)
    return known[attention]


def refuse_mixing(lm: nn.Module) -> None:
    """Raise a ``ValueError`` where a language model does not keep the samples of a packed row apart."""
    found = mixing(lm)
    dtype = next((parameter.dtype for parameter in lm.parameters()), torch.float32)
    if not found <= _TOLERANCE.get(dtype, 2e-2):
        raise ValueError(
            f"{type(unwrapped(lm)).__name__} with {lm.config._attn_implementation} attention does not keep packed "
            f"samples apart (logits differ by {found:.1%} of the largest): give it one sample a row"
        )


def _difference(lm: nn.Module) -> float:
    """How far a packed row's logits are from those of its two samples alone, over the largest."""
    ids = probe_ids(lm, lm.get_input_embeddings())
    half = ids.shape[1] // 2
    positions = torch.cat([torch.arange(half), torch.arange(ids.shape[1] - half)])[None].to(ids.device)
    if "position_ids" not in inspect.signature(unwrapped(lm).forward).parameters:
        return float("inf")
    with torch.no_grad(), evaluating(lm), constants_shaken(lm):
        packed, *parts = (
            lm(input_ids=ids[:, part], position_ids=positions[:, part], use_cache=False, return_dict=True).logits
            for part in (slice(None), slice(half), slice(half, None))
        )
    alone = torch.cat(parts, dim=1).float()
    return ((packed.float() - alone).abs().max() / alone.abs().max()).item()
