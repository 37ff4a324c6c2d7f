"""Inference of the perceiver resampler with its latents taken as constants: the same tokens from smaller products.

For head h of H, latent i of Q and patch n of a view, with x_n the ViT's features (width D_v) and everything else at
the language model's width D, the layer is

    q_i = W_q (LN_q(query)_i + P_i) + b_q      y_n = A x_n      u_n = g * (y_n - mean(y_n)) / s_n + b
    logit_hin = scale * q_hi . (W_kh (u_n + pos_n) + b_kh)      o_hi = sum_n softmax_n(logit)_hin (W_vh u_n + b_vh)

where A is kv_proj, g and b are LN_kv's, and s_n = sqrt(var(y_n) + eps). W_k and W_v act on every patch, which is
nearly all of the work at a wide D. Without training q is a constant, and there are four ways:

*plain*: the formulas above, as in training.

*cached*: q, and W_k pos for each grid, are kept.

*absorbed*: with m_hi = scale * W_kh' q_hi (D numbers for each of the H Q pairs), logit_hin = m_hi . (u_n + pos_n),
up to q . b_k, which is equal for all patches of a view and so cancels in the softmax. And since weights sum to 1,
o_hi = W_vh (sum_n w_hin u_n) + b_vh: W_v acts on the H Q sums of a view. m . pos_n is kept for each grid.

*narrow*: LN_kv and A go the same way. With C = A - (mean of its rows), y_n - mean(y_n) = C x_n, and s_n^2 =
|C x_n|^2 / D + eps = |R x_n|^2 + eps for the triangular R of C / sqrt(D) = (orthonormal) R. So let z_n = x_n / s_n:

    logit_hin = ((m_hi * g) C) . z_n + m_hi . pos_n         (m . b cancels like b_k)
    o_hi = (W_vh diag(g) C) (sum_n w_hin z_n) + W_vh b + b_vh

No patch is ever D wide. Where the widths are equal there is no A: z_n is x_n normalised, and C is left out.

Sincos positions are a part that depends on the column and a part that depends on the row, so m . pos over a grid is
two small products and a sum; a table that is not of this form is taken as it is.

Which one: `flops` counts each from host integers, `cheapest` takes the least. Softmax and norms are not counted, and
tables of grids count as kept; the check below counts. In half precision on a CPU without matrix units for it,
"absorbed" and "narrow" run in float32, which is faster there; the live W_v, out_proj and proj multiply in half.

What is kept follows the parameters. It is used only while each tensor it was made from has the same storage, shape,
dtype, device and version, and the same contents: a sum over all of its bits, and a sample with an entry of every row
and column. For a version does not tell of a write through ``.data`` (LoRA merging), nor of a fused optimizer's step.
That check reads the weights once in a call, a few per cent of it; on an accelerator it waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uhd.grids import GridTables, contents_of
from uhd.resampler.attention import LatentAttention, attend
from uhd.shortcuts import fastest_dtype, is_plain, transformed, wants_gradients

if TYPE_CHECKING:
    from uhd.resampler.config import PerceiverConfig
    from uhd.resampler.perceiver import PerceiverResampler

Grids = Sequence[tuple[int, int]]

PATHS = ("plain", "cached", "absorbed", "narrow")
CHOICES = ("auto", *PATHS)

CHECK_FLOPS = 40  # what a CPU core multiplies and adds while it reads one number of the weights from memory
CALL_FLOPS = 20_000_000  # and while it does the bookkeeping of a call
LOGITS_AT_ONCE = {"cpu": 1 << 21}  # logits of views computed together: on a CPU they should stay in its cache
LOGITS_ELSEWHERE = 1 << 27


def flops(path: str, config: PerceiverConfig, grids: Grids) -> int:
    """Floating-point operations of one call by ``path``, 2 for each multiply-add, and what its check costs.

    Up to out_proj, which is the same for all. Tables and folded weights count as made before.

    Raises:
        ValueError: no such path.
    """
    if path not in PATHS:
        raise ValueError(f"path={path!r} is unknown; choose one of {list(PATHS)}")
    narrow, wide, latents = config.vision_width, config.width, config.num_latents
    rows, pairs = sum(h * w for h, w in grids), config.num_heads * latents
    project = 2 * rows * narrow * wide if narrow != wide else 0
    if path in ("plain", "cached"):
        count = project + 4 * rows * wide**2 + 4 * rows * latents * wide
    elif path == "absorbed":
        count = project + 4 * rows * pairs * wide + 2 * len(grids) * latents * wide**2
    else:
        norm = 2 * rows * narrow * min(narrow, wide) if narrow != wide else 0
        count = norm + 4 * rows * pairs * narrow + 2 * len(grids) * latents * narrow * wide
    if path == "plain":
        tables = 0 if config.key_position == "none" else sum(h * w for h, w in set(grids))
        return count + 2 * (latents + tables) * wide**2
    checked = 3 * wide**2 + (wide * narrow if path == "narrow" and narrow != wide else 0)
    return count + CHECK_FLOPS * checked + CALL_FLOPS


def cheapest(config: PerceiverConfig, grids: Grids, among: Sequence[str] = PATHS) -> str:
    """The path of ``among`` with the fewest FLOPs for these views; the first of equals."""
    return min(among, key=lambda path: flops(path, config, grids))


class Kept(NamedTuple):
    """What one path keeps: what it was made from and for, and the tensors."""

    stamps: tuple
    contents: Tensor
    tensors: dict[str, Tensor]
    tables: GridTables  # of the grids


class Folded:
    """The constant products of one resampler, by path. Copies and pickles are empty; safe in threads."""

    def __init__(self) -> None:
        self._kept: dict[str, Kept] = {}

    def __reduce__(self) -> tuple:
        return Folded, ()

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget everything; only to free memory, since nothing stale is ever used."""
        self._kept.clear()

    def get(self, path: str, module: PerceiverResampler) -> Kept:
        """What ``path`` needs, made anew unless every parameter is what it was."""
        sources = _sources(module, path)
        # before anything is made: a parameter that changes meanwhile is then seen next time
        stamps = (module.ln_q.eps, getattr(module.ln_kv, "eps", None), *map(_stamp, sources.values()))
        contents = contents_of(sources.values())
        kept = self._kept.get(path)
        if kept is None or kept.stamps != stamps or not torch.equal(kept.contents, contents):
            with torch.inference_mode(False), torch.no_grad():
                kept = self._kept[path] = Kept(stamps, contents, _FOLD[path](module), GridTables())
        return kept


def usable(module: PerceiverResampler, features: Tensor | None = None) -> tuple[str, ...]:
    """The paths that give what "plain" gives in the present state; ("plain",) wherever that cannot be told.

    "plain" alone: training mode; gradients are wanted of the features or of any parameter; compilation, tracing, a
    functorch transform, autocast, a CUDA graph being captured; more than one layer, or an FFN; weights that are no
    plain parameters (parametrised, quantised, distributed, on the meta device, made in inference mode), or hooks and
    wrappers on a layer that would not be called. "narrow" goes where kv_proj or ln_kv is not as it was made.
    """
    if module.training or transformed() or module.config.depth > 1 or module.config.ffn_ratio:
        return PATHS[:1]
    tracked = [] if features is None else [features]
    if wants_gradients((*tracked, *module.parameters())):
        return PATHS[:1]
    device = module.query.device
    if any(type(x) is not Tensor or x.device != device for x in tracked) or torch.is_autocast_enabled(device.type):
        return PATHS[:1]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return PATHS[:1]
    if not (is_plain(module.attn, LatentAttention) and is_plain(module.ln_q, nn.LayerNorm)):
        return PATHS[:1]
    if not _plain_tensors(_sources(module, "absorbed"), module.query):
        return PATHS[:1]
    whole = is_plain(module.ln_kv, nn.LayerNorm) and (
        is_plain(module.kv_proj, nn.Identity) or (is_plain(module.kv_proj, nn.Linear) and module.kv_proj.bias is None)
    )
    return PATHS if whole and _plain_tensors(_sources(module, "narrow"), module.query) else PATHS[:3]


def mix(module: PerceiverResampler, path: str, features: Tensor, grids: Grids) -> Tensor:
    """What the attention of ``module`` gives before out_proj, by any path but "plain": (N, D_v) -> (V, Q, D)."""
    with torch.no_grad():
        kept = module._folded.get(path, module)
        if path == "cached":
            return _cached(module, kept, features, grids)
        logits = kept.tensors["logits"]
        if path == "absorbed":
            keys = module.ln_kv(module.kv_proj(features)).to(logits.dtype)
        else:
            keys = _normalised(module, kept, features.to(logits.dtype))
        by_view = list(zip(grids, keys.split([h * w for h, w in grids]), strict=True))
        most = LOGITS_AT_ONCE.get(keys.device.type, LOGITS_ELSEWHERE)
        out: dict[int, Tensor] = {}
        for grid in dict.fromkeys(grids):
            views = [view for view, other in enumerate(grids) if other == grid]
            step = max(1, most // (math.prod(grid) * len(logits)))
            table = _position_logits(module, kept, grid)
            for first in range(0, len(views), step):
                some = views[first : first + step]
                sums = _sums(logits, torch.stack([by_view[view][1] for view in some]), table)
                out.update(zip(some, _values(module, kept, sums), strict=True))
        return torch.stack([out[view] for view in range(len(grids))])


def _starts(grids: Grids) -> list[int]:
    starts = [0]
    for h, w in grids:
        starts.append(starts[-1] + h * w)
    return starts


def _sums(logits: Tensor, keys: Tensor, table: Tensor | None) -> Tensor:
    """logits (H Q, K), keys (B, n, K), table (H Q, n) -> the keys' weighted sums (B, H Q, K)."""
    if len(keys) == 1:  # a matrix product of its own is faster than a batch of one
        scores = logits @ keys[0].T if table is None else torch.addmm(table, logits, keys[0].T)
        return (scores.softmax(-1) @ keys[0])[None]
    expanded = logits.expand(len(keys), -1, -1)
    scores = torch.bmm(expanded, keys.mT) if table is None else torch.baddbmm(table, expanded, keys.mT)
    return torch.bmm(scores.softmax(-1), keys)


def _values(module: PerceiverResampler, kept: Kept, sums: Tensor) -> Tensor:
    """(B, H Q, K) -> (B, Q, D): W_v, or what it became, on each head's sums."""
    heads = module.attn.num_heads
    values, bias = kept.tensors.get("values"), kept.tensors.get("bias")
    if values is None:
        width = module.out_dim
        values, bias = module.attn.in_proj_weight[2 * width :], module.attn.in_proj_bias[2 * width :]
    per_head = sums.to(values.dtype).unflatten(1, (heads, -1))
    mixed = torch.einsum("bhqk,hdk->bqhd", per_head, values.unflatten(0, (heads, -1)))
    return mixed.flatten(-2).to(bias.dtype) + bias


def _normalised(module: PerceiverResampler, kept: Kept, features: Tensor) -> Tensor:
    """z: features over the deviation that LN_kv would see."""
    root, eps = kept.tensors.get("root"), module.ln_kv.eps
    if root is None:
        return F.layer_norm(features, features.shape[-1:], eps=eps)
    exact = torch.promote_types(features.dtype, torch.float32)
    variance = (features @ root).to(exact).square().sum(-1, keepdim=True)
    return features * (variance + eps).rsqrt().to(features.dtype)


def _position_logits(module: PerceiverResampler, kept: Kept, grid_hw: tuple[int, int]) -> Tensor | None:
    """m . pos over a grid, (H Q, h * w)."""
    if module.config.key_position == "none":
        return None
    return kept.tables.get((grid_hw,), None, lambda: _make_position_logits(module, kept.tensors, grid_hw))


def _make_position_logits(
    module: PerceiverResampler, tensors: Mapping[str, Tensor], grid_hw: tuple[int, int]
) -> Tensor:
    pairs = tensors["positions"]
    half = pairs.shape[1] // 2
    table = _table(module, grid_hw, pairs).unflatten(0, grid_hw)
    by_column, by_row = table[:1, :, :half], table[:, :1, half:]
    parts = torch.cat([by_column.expand(grid_hw[0], -1, -1), by_row.expand(-1, grid_hw[1], -1)], -1)
    if not torch.allclose(table, parts, rtol=0, atol=1e-6):
        return pairs @ table.flatten(0, 1).T
    columns, rows = pairs[:, :half] @ by_column[0].T, pairs[:, half:] @ by_row[:, 0].T
    return (rows[:, :, None] + columns[:, None]).flatten(1)


def _table(module: PerceiverResampler, grid_hw: tuple[int, int], like: Tensor) -> Tensor:
    """(h * w, D), made here: `key_table` keeps its own, by version alone."""
    return module._make_key_table(grid_hw).to(like.device, like.dtype)


def _cached(module: PerceiverResampler, kept: Kept, features: Tensor, grids: Grids) -> Tensor:
    attn, width = module.attn, module.out_dim
    heads = (attn.num_heads, width // attn.num_heads)
    w_kv, b_kv = attn.in_proj_weight[width:], attn.in_proj_bias[width:]
    kv = module.ln_kv(module.kv_proj(features))
    k, v = F.linear(kv, w_kv, b_kv).unflatten(-1, (2, *heads)).unbind(1)
    table = offsets = None
    if module.config.key_position != "none":
        distinct = list(dict.fromkeys(grids))
        first_rows = dict(zip(distinct, _starts(distinct), strict=False))
        offsets = [first_rows[grid] for grid in grids]
        table = torch.cat(
            [
                kept.tables.get((grid,), None, lambda grid=grid: F.linear(_table(module, grid, kv), w_kv[:width]))
                for grid in distinct
            ]
        ).unflatten(-1, heads)
    lengths = [h * w for h, w in grids]
    q = kept.tensors["queries"]
    out = attend(q, k, v, lengths, key_positions=table, position_offsets=offsets, impl=module.attention_impl)
    return out.flatten(-2)


def _queries(module: PerceiverResampler, dtype: torch.dtype) -> Tensor:
    """q (Q, D), projected, in ``dtype``."""
    width = module.out_dim
    norm = module.ln_q
    latents = F.layer_norm(module.query.to(dtype), (width,), norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)
    if module.config.query_position:
        latents = latents + module.pos_embed.to(dtype)
    return F.linear(latents, module.attn.in_proj_weight[:width].to(dtype), module.attn.in_proj_bias[:width].to(dtype))


def _fold_cached(module: PerceiverResampler) -> dict[str, Tensor]:
    heads = module.attn.num_heads
    return {"queries": _queries(module, _exact(module)).to(module.query.dtype).unflatten(-1, (heads, -1))}


def _fold_absorbed(module: PerceiverResampler) -> dict[str, Tensor]:
    pairs = _pairs(module).to(fastest_dtype(module.query.dtype, module.query.device))
    return {"logits": pairs, "positions": pairs}


def _fold_narrow(module: PerceiverResampler) -> dict[str, Tensor]:
    exact, dtype, width = _exact(module), fastest_dtype(module.query.dtype, module.query.device), module.out_dim
    gain, shift = module.ln_kv.weight.to(exact), module.ln_kv.bias.to(exact)
    w_v, b_v = module.attn.in_proj_weight[2 * width :].to(exact), module.attn.in_proj_bias[2 * width :].to(exact)
    pairs = _pairs(module)
    logits, values = pairs * gain, w_v * gain
    folded = {"bias": (b_v + w_v @ shift).to(module.query.dtype)}
    if isinstance(module.kv_proj, nn.Linear):
        weight = module.kv_proj.weight.to(exact)
        centred = weight - weight.mean(0)
        logits, values = logits @ centred, values @ centred
        # of C, not of C'C, whose condition would be squared
        folded["root"] = torch.linalg.qr(centred * width**-0.5, mode="r").R.T.to(dtype).contiguous()
    if module.config.key_position != "none":
        folded["positions"] = pairs.to(dtype)
    return {**folded, "logits": logits.to(dtype), "values": values.to(dtype)}


_FOLD = {"cached": _fold_cached, "absorbed": _fold_absorbed, "narrow": _fold_narrow}


def _pairs(module: PerceiverResampler) -> Tensor:
    """m: a row for every head and latent, (H Q, D)."""
    heads, width, exact = module.attn.num_heads, module.out_dim, _exact(module)
    queries = _queries(module, exact).unflatten(-1, (heads, -1)) * (width // heads) ** -0.5
    w_k = module.attn.in_proj_weight[width : 2 * width].to(exact).unflatten(0, (heads, -1))
    return torch.einsum("qhd,hdk->hqk", queries, w_k).flatten(0, 1)


def _exact(module: PerceiverResampler) -> torch.dtype:
    return torch.promote_types(module.query.dtype, torch.float32)


def _sources(module: PerceiverResampler, path: str) -> dict[str, Tensor | None]:
    """The tensors that ``path`` keeps something of, as the modules hold them; None for what is no longer there."""
    attn, norm = module.attn._parameters, module.ln_q._parameters
    found = {
        "query": module._parameters.get("query"),
        "in_proj_weight": attn.get("in_proj_weight"),
        "in_proj_bias": attn.get("in_proj_bias"),
        "ln_q.weight": norm.get("weight"),
        "ln_q.bias": norm.get("bias"),
    }
    if module.config.has_latent_table:
        found["pos_embed"] = module._buffers.get("pos_embed")
    if path == "narrow":
        found["ln_kv.weight"] = module.ln_kv._parameters.get("weight")
        found["ln_kv.bias"] = module.ln_kv._parameters.get("bias")
        if isinstance(module.kv_proj, nn.Linear):
            found["kv_proj.weight"] = module.kv_proj._parameters.get("weight")
    return found


_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _plain_tensors(tensors: Mapping[str, Tensor | None], like: Tensor) -> bool:
    device, dtype = like.device, like.dtype
    return (
        device.type != "meta"
        and dtype in _FLOATS
        and all(
            type(x) in (Tensor, nn.Parameter) and x.device == device and x.dtype == dtype and not x.is_inference()
            for x in tensors.values()
        )
    )


def _stamp(source: Tensor) -> tuple:
    return source.data_ptr(), source._version, source.device, source.dtype, source.shape, source.stride()
