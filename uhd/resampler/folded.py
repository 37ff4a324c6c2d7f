"""Inference of the perceiver resampler with its latents taken as constants: the same tokens from smaller products.

For head h of H, latent i of Q and patch n of a view, with x_n the ViT's features (width D_v) and everything else at
the language model's width D, the layer is

    q_i = W_q (LN_q(query)_i + P_i) + b_q      y_n = A x_n      u_n = g * (y_n - mean(y_n)) / s_n + b
    logit_hin = scale * q_hi . (W_kh (u_n + pos_n) + b_kh)      o_hi = sum_n softmax_n(logit)_hin (W_vh u_n + b_vh)

where A is kv_proj, g and b are LN_kv's, and s_n = sqrt(var(y_n) + eps). W_k and W_v act on every patch, which is
nearly all of the work at a wide D. Without training q is a constant, and there are three ways:

*plain*: the formulas above, as in training.

*absorbed*: with m_hi = scale * W_kh' q_hi (D numbers for each of the H Q pairs), logit_hin = m_hi . (u_n + pos_n),
up to q . b_k, which is equal for all patches of a view and so cancels in the softmax. And since weights sum to 1,
o_hi = W_vh (sum_n w_hin u_n) + b_vh: W_v acts on the H Q sums of a view.

*narrow*: LN_kv and A go the same way. With C = A - (mean of its rows), y_n - mean(y_n) = C x_n, and s_n^2 =
|C x_n|^2 / D + eps = |R x_n|^2 + eps for the triangular R of C / sqrt(D) = (orthonormal) R. So let z_n = x_n / s_n:

    logit_hin = ((m_hi * g) C) . z_n + m_hi . pos_n         (m . b cancels like b_k)
    o_hi = (W_vh diag(g) C) (sum_n w_hin z_n) + W_vh b + b_vh

No patch is ever D wide. Where the widths are equal there is no A: z_n is x_n normalised, and C is left out.

m . pos over a grid is cheap. Interpolation is linear: m . pos_embed is folded once, over the latents' own grid, and
these few logits are interpolated. A sincos table of the view's own grid is a part that depends on the column and a
part that depends on the row: two small products and a sum.

`flops` counts each way from host integers, and the least for `usual_views` is taken; softmax, norms and positions are
not counted, the check below is. Where a half type is multiplied slower than float32 (`uhd.machine`), "absorbed" and
"narrow" run in float32. "absorbed" is there for D_v = D, where W_v still acts in the weights' own dtype, and for LoRA
or a hook on kv_proj or LN_kv.

What is kept is used only while each tensor it was made from has the same storage, shape, dtype, device and version,
and the same contents: a sum over all of its bits, and a sample with an entry of every row and column. For a version
does not tell of a write through ``.data`` (LoRA merging), nor of a fused optimizer's step. That check reads the
weights once in a call. On an accelerator its answer has to be waited for, and what is gained there was never measured:
so "auto" folds on a CPU only, and elsewhere runs ahead of the device by the kernel of "plain".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uhd.grids import Grid, map_by_grid, sent, split_views
from uhd.machine import product_of
from uhd.positions import interpolate_pos_embed, sincos_2d, sines
from uhd.resampler.config import PerceiverConfig
from uhd.settings import check_choice
from uhd.shortcuts import contents_of
from uhd.torch_private import version_of

PATHS = ("plain", "absorbed", "narrow")
CHOICES = ("auto", *PATHS)

CHOSEN_ON = ("cpu",)  # devices on which "auto" folds
CHECK_FLOPS = 40  # what a CPU core multiplies and adds while it reads one number of the weights from memory
CALL_FLOPS = 20_000_000  # and while it does the bookkeeping of a call
LOGITS_AT_ONCE = {"cpu": 1 << 21}  # logits of views computed together: on a CPU they should stay in its cache
LOGITS_ELSEWHERE = 1 << 27
GRIDS = 32  # of fitted latents for which folded weights are kept

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def flops(path: str, config: PerceiverConfig, grids: Sequence[Grid]) -> int:
    """Count the floating-point operations of one call by `path`, 2 for each multiply-add, and what its check costs.

    Up to out_proj, which is the same for all. Folded weights count as made before. ValueError: no such path.
    """
    check_choice("path", path, PATHS)
    narrow, wide, latents = config.vision_width, config.width, config.num_latents
    rows, pairs = sum(h * w for h, w in grids), config.num_heads * latents
    project = 2 * rows * narrow * wide if narrow != wide else 0
    if path == "plain":
        tables = 0 if config.key_position == "none" else sum(h * w for h, w in set(grids))
        return project + 4 * rows * wide**2 + 4 * rows * latents * wide + 2 * (latents + tables) * wide**2
    if path == "absorbed":
        count = project + 4 * rows * pairs * wide + 2 * len(grids) * latents * wide**2
    else:
        norm = 2 * rows * narrow * min(narrow, wide) if narrow != wide else 0
        count = norm + 4 * rows * pairs * narrow + 2 * len(grids) * latents * narrow * wide
    checked = 3 * wide**2 + (wide * narrow if path == "narrow" and narrow != wide else 0)
    return count + CHECK_FLOPS * checked + CALL_FLOPS


def cheapest(config: PerceiverConfig, grids: Sequence[Grid], among: Sequence[str] = PATHS) -> str:
    """Choose the path of `among` with the fewest FLOPs for these views; the first of equals."""
    counts = [flops(path, config, grids) for path in among]
    return among[counts.index(min(counts))]


def usual_views(config: PerceiverConfig) -> list[Grid]:
    """An image's views as a path is chosen for: seven, with four patches a latent.

    Not those of a call: paths round differently, and a view's tokens would depend on what else is in its batch.
    """
    return [(4, config.num_latents)] * 7


class Layer(NamedTuple):
    """A resampler's layer as its modules hold it at one call."""

    config: PerceiverConfig
    weights: dict[str, Tensor | None]  # by their names in the state dict; None for what is no longer there
    query_eps: float  # of LN_q
    key_eps: float | None  # of LN_kv


class Folded:
    """The constant products of one resampler, by path. Copies and pickles are empty; safe in threads."""

    def __init__(self) -> None:
        # stamps and contents of the weights, and what was made of them: of the values, and by the latents' grid
        self._kept: dict[str, tuple[tuple, Tensor, dict[str, Tensor], dict[Grid | None, dict[str, Tensor]]]] = {}

    def __reduce__(self) -> tuple:
        return Folded, ()

    def clear(self) -> None:
        """Forget everything; only to free memory, since nothing stale is ever used."""
        self._kept.clear()

    def get(self, path: str, layer: Layer, latents: Iterable[Grid | None] = (None,)) -> list[dict[str, Tensor]]:
        """Give what `path` needs for each of these grids of latents; fold it anew unless every weight is what it was.

        None is the latents' own grid. Of the others the last `GRIDS` are kept; what they share is there once.
        """
        # before anything is made: a weight that changes meanwhile is then seen next time
        query, largest = layer.weights["query"], layer.weights["attn.in_proj_weight"].numel()
        dtype = product_of(query.dtype, query.device, largest).dtype
        stamps = (dtype, layer.query_eps, layer.key_eps, *map(_stamp, layer.weights.values()))
        contents = contents_of(layer.weights.values())
        kept = self._kept.get(path)
        with torch.inference_mode(False), torch.no_grad():
            if kept is None or kept[0] != stamps or not torch.equal(kept[1], contents):
                kept = (stamps, contents, fold_values(path, layer, dtype), {})
            grids, found = dict(kept[3]), []  # another thread may be at the same
            for grid in latents:
                tensors = grids.pop(grid, None) or fold_latents(path, layer, dtype, grid)
                grids[grid] = tensors  # the last used is the last
                found.append(kept[2] | tensors)
        self._kept[path] = (*kept[:3], dict([*grids.items()][-GRIDS:]))
        return found


def position_grid(config: PerceiverConfig, latents_hw: Grid | None) -> Grid:
    """The grid of the table that the positions of latents and keys are resized from, for latents in this grid."""
    own = latents_hw is None or config.fitted_position == "interpolated"
    return (config.side, config.side) if own else latents_hw


def position_table(config: PerceiverConfig, own: Tensor, latents_hw: Grid | None) -> Tensor:
    """That table; ``own`` is that of the latents' own square."""
    grid_hw = position_grid(config, latents_hw)
    if grid_hw == (config.side, config.side):
        return own
    return sincos_2d(config.width, grid_hw, device=own.device, dtype=own.dtype)


def fold_latents(path: str, layer: Layer, dtype: torch.dtype, latents_hw: Grid | None = None) -> dict[str, Tensor]:
    """Multiply what is constant of the latents, in ``dtype``: the formulas above tell the parts of the two paths.

    ``latents_hw``: the grid of the latents; ``None``: their own.
    """
    config, native = layer.config, (layer.config.side, layer.config.side)
    weights = _exact(layer)
    w_q, w_k, _ = weights["attn.in_proj_weight"].chunk(3)
    b_q = weights["attn.in_proj_bias"].chunk(3)[0]
    latents = weights["query"]
    table = position_table(config, weights["pos_embed"], latents_hw) if config.has_latent_table else None
    if latents_hw is not None:
        latents = interpolate_pos_embed(latents, native, latents_hw, mode="bilinear")
    q = F.layer_norm(latents, latents.shape[-1:], weights["ln_q.weight"], weights["ln_q.bias"], layer.query_eps)
    if config.query_position:
        q = q + interpolate_pos_embed(table, position_grid(config, latents_hw), latents_hw or native)
    q = F.linear(q, w_q, b_q).unflatten(-1, (config.num_heads, -1)) * (config.width // config.num_heads) ** -0.5
    pairs = torch.einsum("qhd,hdk->hqk", q, w_k.unflatten(0, (config.num_heads, -1))).flatten(0, 1)  # m, (H Q, D)
    folded = {"logits": pairs}
    if config.key_position != "none":
        interpolated = config.key_position == "interpolated"
        folded["positions"] = table @ pairs.T if interpolated else pairs
    if path == "narrow":
        folded["logits"] = pairs * weights["ln_kv.weight"]
        if "kv_proj.weight" in weights:
            folded["logits"] = folded["logits"] @ _centred(weights)
    return {name: tensor.to(dtype) for name, tensor in folded.items()}


def fold_values(path: str, layer: Layer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same of the values, in ``dtype``, and their bias in the weights' own: nothing that the latents are part of.

    Of "absorbed" both are W_v's as they are.
    """
    if path == "absorbed":
        live = {"values": "attn.in_proj_weight", "bias": "attn.in_proj_bias"}
        return {ours: layer.weights[name].detach().chunk(3)[2] for ours, name in live.items()}
    weights = _exact(layer)
    w_v, b_v = (weights[f"attn.in_proj_{kind}"].chunk(3)[2] for kind in ("weight", "bias"))
    bias = (b_v + w_v @ weights["ln_kv.bias"]).to(layer.weights["query"].dtype)
    folded = {"values": w_v * weights["ln_kv.weight"]}
    if "kv_proj.weight" in weights:
        centred = _centred(weights)
        folded["values"] = folded["values"] @ centred
        # of C, not of C'C, whose condition would be squared
        folded["root"] = torch.linalg.qr(centred * layer.config.width**-0.5, mode="r").R.T.contiguous()
    return {name: tensor.to(dtype) for name, tensor in folded.items()} | {"bias": bias}


def _exact(layer: Layer) -> dict[str, Tensor]:
    exact = torch.promote_types(layer.weights["query"].dtype, torch.float32)
    return {name: weight.detach().to(exact) for name, weight in layer.weights.items()}


def _centred(weights: Mapping[str, Tensor]) -> Tensor:
    """C, (D, D_v)."""
    return weights["kv_proj.weight"] - weights["kv_proj.weight"].mean(0)


def are_plain(weights: Mapping[str, Tensor | None], like: Tensor) -> bool:
    """Whether all weights are ordinary tensors of one device and dtype, and so can be folded and watched."""
    return (
        like.device.type != "meta"
        and like.dtype in _FLOATS
        and all(
            type(x) in (Tensor, nn.Parameter)
            and (x.device, x.dtype) == (like.device, like.dtype)
            and not x.is_inference()
            for x in weights.values()
        )
    )


def attend_folded(
    layer: Layer,
    tensors: Mapping[str, Tensor],
    keys: Tensor,
    grids: Sequence[Grid],
    latents_hw: Grid | None = None,
) -> Tensor:
    """Compute what the attention gives before out_proj, (V, Q, D), with what `Folded.get` gave for path and latents.

    `keys` are packed (N, K): u for "absorbed", `normalised` features for "narrow".
    """
    logits = tensors["logits"]
    per_view = split_views(keys.to(logits.dtype), grids)
    at_once = LOGITS_AT_ONCE.get(keys.device.type, LOGITS_ELSEWHERE)

    def attend(grid: Grid, views: list[int]) -> Iterable[Tensor]:
        step = max(1, at_once // (math.prod(grid) * len(logits)))
        table = position_logits(layer.config, tensors.get("positions"), grid, latents_hw)
        for first in range(0, len(views), step):
            some = torch.stack([per_view[view] for view in views[first : first + step]])
            yield from _values(layer.config.num_heads, tensors, _sums(logits, some, table))

    return torch.stack(map_by_grid(attend, grids))


def normalised(layer: Layer, tensors: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """Divide features by the deviation that LN_kv would see: z, (N, D_v)."""
    features, root = features.to(tensors["logits"].dtype), tensors.get("root")
    if root is None:
        return F.layer_norm(features, features.shape[-1:], eps=layer.key_eps)
    exact = torch.promote_types(features.dtype, torch.float32)
    variance = (features @ root).to(exact).square().sum(-1, keepdim=True)
    return features * (variance + layer.key_eps).rsqrt().to(features.dtype)


def position_logits(
    config: PerceiverConfig, positions: Tensor | None, grid_hw: Grid, latents_hw: Grid | None = None
) -> Tensor | None:
    """Compute m . pos over a grid, (H Q, h * w), from what `fold_latents` made of the positions; None without any."""
    if positions is None:
        return None
    if config.key_position == "interpolated":
        table = interpolate_pos_embed(positions, position_grid(config, latents_hw), grid_hw)
        return table.T.contiguous()  # the sums below are slower over a transposed one
    half = config.width // 2
    by_column, by_row = positions.split(half, dim=1)
    rows, columns = (sent(sines(half, length), positions.device, positions.dtype) for length in grid_hw)
    return ((by_row @ rows.T)[:, :, None] + (by_column @ columns.T)[:, None]).flatten(1)


def _sums(logits: Tensor, keys: Tensor, table: Tensor | None) -> Tensor:
    """Weigh keys (B, n, K) by the softmax of logits (H Q, K) over them plus table (H Q, n): (B, H Q, K)."""
    if len(keys) == 1:  # a matrix product of its own is faster than a batch of one
        scores = logits @ keys[0].T if table is None else torch.addmm(table, logits, keys[0].T)
        return (scores.softmax(-1) @ keys[0])[None]
    expanded = logits.expand(len(keys), -1, -1)
    scores = torch.bmm(expanded, keys.mT) if table is None else torch.baddbmm(table, expanded, keys.mT)
    return torch.bmm(scores.softmax(-1), keys)


def _values(heads: int, tensors: Mapping[str, Tensor], sums: Tensor) -> Tensor:
    """Apply W_v, or what it became, to each head's sums: (B, H Q, K) -> (B, Q, D)."""
    values, bias = tensors["values"], tensors["bias"]
    per_head = sums.to(values.dtype).unflatten(1, (heads, -1))
    mixed = torch.einsum("bhqk,hdk->bqhd", per_head, values.unflatten(0, (heads, -1)))
    return mixed.flatten(-2).to(bias.dtype) + bias


def _stamp(source: Tensor) -> tuple:
    return source.data_ptr(), version_of(source), source.device, source.dtype, source.shape, source.stride()
