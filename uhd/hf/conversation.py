"""How much of a conversation a language model's cache holds already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uhd.hf.injection import starts_with

_SEEN = "seen_by_uhd"
"""Attribute with the ids that a state has seen which cannot tell, as in attention-free models; copies have it, too."""


def cached_length(cache: Any) -> int | None:
    """Positions that a cache holds already; ``None`` where it cannot tell."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):
        return None


def is_filled(state: Any) -> bool:
    """Whether a state, which cannot tell how much it has seen, has seen anything."""
    seen = getattr(state, "has_previous_state", None)
    return bool(seen() if callable(seen) else seen)


def cached_columns(ids: Tensor, attention_mask: Tensor | None, cache: Any) -> int:
    """How many leading columns of (B, T) ids a cache holds; 0 where the ids are only what is new.

    As in transformers, ids are the whole conversation unless the mask is longer than they are.

    Raises:
        ValueError: The cache holds all of the ids, or more.
    """
    length = cached_length(cache)
    if length is None:
        consumed = getattr(_lasting(cache), _SEEN, None)
        return consumed.shape[1] if consumed is not None and starts_with(ids, consumed) else 0
    if not length or (attention_mask is not None and attention_mask.shape[1] == length + ids.shape[1]):
        return 0
    if length >= ids.shape[1]:
        raise ValueError(
            f"the cache holds {length} positions, and there are {ids.shape[1]} ids: give the whole conversation, or "
            f"what is new with an attention_mask of {length + ids.shape[1]} columns"
        )
    return length


def _lasting(state: Any) -> Any:
    """What of a state can be remembered: of a list of tensors, which change in place, the first."""
    return state[0] if isinstance(state, list) else state


def remember(cache: Any, ids: Tensor, sequences: Tensor) -> None:
    """Keep what a state without positions has seen: all of these sequences but their last ids.

    Args:
        cache: That was filled, or ``None``.
        ids: (B, T) that were asked.
        sequences: (B, T + new) that came of them.
    """
    if cached_length(cache) is not None:
        return
    before = getattr(_lasting(cache), _SEEN, None)
    seen = sequences[:, :-1]
    if before is not None and not starts_with(ids, before) and len(before) == len(seen):
        seen = torch.cat([before.to(seen.device), seen], dim=1)
    setattr(_lasting(cache), _SEEN, seen.clone())
