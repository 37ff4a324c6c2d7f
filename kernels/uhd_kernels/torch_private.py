"""The one name of this package that torch does not publish."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def mapped(tensors: Iterable[Tensor]) -> bool:
    """Whether `torch.vmap` maps over any of them.

    False for all where torch lacks `torch._C._functorch.is_batchedtensor`: the operator still refuses vmap, and the
    portable implementations run under it as PyTorch can.
    """
    is_batched = getattr(getattr(torch._C, "_functorch", None), "is_batchedtensor", None)
    return is_batched is not None and any(is_batched(tensor) for tensor in tensors)
