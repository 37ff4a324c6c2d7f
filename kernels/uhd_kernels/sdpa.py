"""The portable path: views that share a length and a stretch of the table share a call of SDPA. No padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Sequence[int],
    *,
    key_positions: Tensor | None,
    offsets: Sequence[int],
    scale: float,
) -> Tensor:
    """Same arguments and result as `reference.cross_attention_reference`, in the dtype of the input."""
    lengths = [end - start for start, end in pairwise(bounds)]
    groups: dict[tuple[int, int], list[int]] = {}
    for view, key in enumerate(zip(lengths, offsets, strict=True)):
        groups.setdefault(key, []).append(view)

    # split, not slicing: its backward is one concatenation instead of a zero-filled (N, H, d) for every view.
    k_views, v_views = k.split(lengths), v.split(lengths)
    outputs = []
    for (length, offset), views in groups.items():
        if len(groups) == 1:
            keys, values = k.unflatten(0, (len(views), length)), v.unflatten(0, (len(views), length))
        else:
            keys, values = torch.stack([k_views[i] for i in views]), torch.stack([v_views[i] for i in views])
        if key_positions is not None:
            keys = keys + key_positions[offset : offset + length]
        outputs.append(_attend(q, keys, values, scale))

    order = [view for views in groups.values() for view in views]
    if order == sorted(order):
        return torch.cat(outputs)
    back = sorted(range(len(order)), key=order.__getitem__)
    index = torch.tensor(back, device="cpu")
    # CUDA has read ordinary memory when the call returns, so that nothing has to wait
    return torch.cat(outputs).index_select(0, index.to(q.device, non_blocking=q.device.type == "cuda"))


def _attend(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """q (Q, H, d), keys and values (G, n, H, d) -> (G, Q, H, d)."""
    latents = q.transpose(0, 1).expand(len(keys), -1, -1, -1)  # (G, H, Q, d)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)  # (G, H, n, d)
    if keys.shape[2] == 0:  # a sum over nothing: exact zeros that still carry (zero) gradients, on every backend
        mixed = latents @ keys.transpose(-2, -1) @ values
    else:
        mixed = F.scaled_dot_product_attention(latents, keys, values, scale=scale)
    return mixed.transpose(1, 2)
