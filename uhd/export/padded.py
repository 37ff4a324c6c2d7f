"""An encoder over padded views, (V, L, P) with a mask, as other runtimes want it; and over packed ones, for torch's.

Both compute with the very modules of a :class:`uhd.VisualEncoder`. All that depends on the views' grids is an
input that :mod:`uhd.export.host` makes, so that one graph serves any number of views of any size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uhd.resampler import MergeProjector, MLPProjector, PerceiverResampler, PixelShuffleProjector, SpatialResampler
from uhd.resampler.attention import LatentAttention, varlen_cross_attention
from uhd.vision import CompressedViT, ViT
from uhd.vision.blocks import Attention, Block, activate
from uhd.vision.int8 import LEVELS, Int8Linear
from uhd.vision.merging import WindowCompressor
from uhd.vision.stem import WindowStem

Inputs = Mapping[str, Tensor]
"""The graph's inputs by name, see :meth:`uhd.export.host.Graph.arrays`."""


class PaddedEncoder(nn.Module):
    """The views of one call, padded to the longest: a dictionary of inputs -> tokens (V, Q, D).

    Tokens of a view beyond its own number are 0. Shares its weights with the parts that it is made of.
    """

    def __init__(self, vision: ViT, compressor: nn.Module) -> None:
        super().__init__()
        self.vision, self.compressor = vision, compressor

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        features = see(self.vision, given)
        given = {**given, "mask": given["mask"][:, :: patches_joined(self.vision)]}
        weight = next(self.compressor.parameters(), features)
        return COMPRESSORS[type(self.compressor)](self.compressor, features.to(weight.dtype), given)


class PackedEncoder(nn.Module):
    """The views of one call one after the other, with no padding, for `torch.export`: inputs -> tokens (V, Q, D).

    Inputs are those of the padded form where its mask is True, (N, ...), and ``ends`` (V,) int32 in place of the mask,
    see :func:`uhd.export.host.packed`. The resampler's attention is uhd_kernels' operator; the ViT's, whose
    groups of views of equal length would depend on the input, is masked, in N * N steps.
    """

    def __init__(self, vision: ViT, compressor: PerceiverResampler) -> None:
        super().__init__()
        self.vision, self.compressor = vision, compressor

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        ends = given["ends"]
        x, prefix = embed(self.vision, given), self.vision._prefix()
        views = (torch.arange(x.shape[0], device=x.device)[:, None] >= ends.to(x.device)).sum(1)
        before = 0
        if prefix is not None:
            before = ends.shape[0] * len(prefix)
            x = torch.cat([prefix.expand(ends.shape[0], -1, -1).flatten(0, 1), x])
            own = torch.arange(ends.shape[0], device=x.device)[:, None].expand(-1, len(prefix)).flatten()
            views = torch.cat([own, views])
        features = run_blocks(self.vision, x.unsqueeze(0), (views[:, None] == views).unsqueeze(0))[0, before:]
        return _perceive_packed(self.compressor, self.vision.norm(features).to(self.compressor.query.dtype), given)


def patches_joined(vit: ViT) -> int:
    """How many patches, which follow each other, a ViT with compressors inside joins to one feature; 1 without any."""
    return (vit.stride // vit.patch_size) ** 2


def see(vit: ViT, given: Inputs) -> Tensor:
    """Encode padded patches: (V, L, D_v), or fewer joined ones; what stands in rows without a patch means nothing."""
    x, mask, prefix = embed(vit, given), given["mask"], vit._prefix()
    before = 0 if prefix is None else len(prefix)
    if prefix is not None:
        x = torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)
        mask = torch.cat([mask.new_ones(1, before).expand(mask.shape[0], -1), mask], dim=1)
    x = run_blocks(vit, x, mask[:, None], before)
    return vit.norm(x[:, before:])


def embed(vit: ViT, given: Inputs) -> Tensor:
    """Patches (..., P) with their positions: (..., D_v)."""
    dtype = vit.stem.down.weight.dtype if isinstance(vit.stem, WindowStem) else vit.stem.weight.dtype
    patches = given["patches"].to(dtype)
    x = _windowed(vit.stem, patches, given["neighbours"]) if isinstance(vit.stem, WindowStem) else vit.stem(patches)
    return x if vit.positions is None else x + _positions(vit, given).to(x.dtype)


def run_blocks(vit: ViT, x: Tensor, mask: Tensor, before: int = 0) -> Tensor:
    """(V, T, D) -> (V, T, D); mask (V, 1 or T, T), True where a token may look.

    Compressors join every four tokens behind the first ``before``: then the mask is (V, 1, T).
    """
    compressors = vit.compressors if isinstance(vit, CompressedViT) else {}
    x = vit.pre_norm(x)
    for number, block in enumerate(vit.blocks, start=1):
        x = _block(block, x, mask)
        if str(number) in compressors:
            windows = x[:, before:].unflatten(1, (-1, 4))
            joined = _merged(compressors[str(number)], windows.flatten(0, 1)).unflatten(0, windows.shape[:2])
            x = torch.cat([x[:, :before], joined], dim=1)
            mask = torch.cat([mask[..., :before], mask[..., before::4]], dim=-1)
    return x


def _windowed(stem: WindowStem, patches: Tensor, neighbours: Tensor) -> Tensor:
    """As :class:`uhd.vision.stem.WindowStem`; neighbours (..., 9) are rows of all patches, the last row is 0."""
    p, b = stem.patch_size, stem.border
    flat = patches.flatten(0, -2)
    pixels = torch.cat([flat, flat.new_zeros(1, flat.shape[1])]).unflatten(1, (stem.channels, p, p))
    if stem.grey:
        pixels = pixels.mean(1, keepdim=True)
    sides = (slice(p - b, p), slice(0, p), slice(0, b))
    near, rows = neighbours.flatten(0, -2), []
    for dy, ys in enumerate(sides):
        parts = [pixels[:, :, ys, xs][near[:, 3 * dy + dx]] for dx, xs in enumerate(sides)]
        rows.append(torch.cat(parts, dim=-1))
    x = stem.down(F.gelu(stem.up(torch.cat(rows, dim=-2).flatten(1))))
    return x.unflatten(0, patches.shape[:-1])


def _positions(vit: ViT, given: Inputs) -> Tensor:
    table = vit.positions[vit.config.position_prefix :]
    if "positions" in given:
        return table[given["positions"]]
    return _interpolated(table, given["position_rows"], given["position_columns"])


def _interpolated(table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A (h*w, D) table where rows (..., h) and columns (..., w) say: (..., D), summed in float32."""
    shares = (rows.unsqueeze(-1) * columns.unsqueeze(-2)).flatten(-2)  # (..., h*w)
    return (shares @ table.float()).to(table.dtype)


def _block(block: Block, x: Tensor, mask: Tensor) -> Tensor:
    mixed = _attention(block.attn, block.norm1(x), mask)
    x = x + (mixed if block.scale1 is None else mixed * block.scale1)
    hidden = dense(block.mlp.fc1, block.norm2(x))
    update = dense(block.mlp.fc2, activate(hidden, block.mlp.activation))
    return x + (update if block.scale2 is None else update * block.scale2)


def _attention(attention: Attention, x: Tensor, mask: Tensor) -> Tensor:
    qkv = dense(attention.qkv, x)  # (V, T, 3 D)
    q, k, v = qkv.unflatten(-1, (3, attention.heads, -1)).unbind(2)
    return dense(attention.proj, attend(q, k, v, mask))


def _merged(compressor: nn.Module, windows: Tensor) -> Tensor:
    """(n, 4, D) -> (n, D)."""
    if not isinstance(compressor, WindowCompressor):
        return compressor.merge(windows)
    every = torch.ones(1, 1, 4, dtype=torch.bool, device=windows.device)
    return compressor.join(windows + _attention(compressor.attn, compressor.norm1(windows), every))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q (V, Q, H, d), keys and values (V, n, H, d), mask (V, 1 or Q, n), True for a key to see -> (V, Q, H * d)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1))
    return mixed.transpose(1, 2).flatten(2)


def dense(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer; of int8 weights with the product that ONNX has for them."""
    if not isinstance(layer, Int8Linear):
        return layer(x)
    step = (x.abs().amax(dim=-1, keepdim=True).float() / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    rounded = (x / step).round().to(torch.int8)
    total = torch.onnx.ops.symbolic(
        "MatMulInteger",
        (rounded, layer.weight.t()),
        dtype=torch.int32,
        shape=(*x.shape[:-1], layer.out_features),
        version=10,
    )
    total = total.float() * step * layer.scale
    return (total if layer.bias is None else total + layer.bias.float()).to(x.dtype)


def _perceive(resampler: PerceiverResampler, features: Tensor, given: Inputs) -> Tensor:
    kv, mask = resampler.ln_kv(resampler.kv_proj(features)), given["mask"].unsqueeze(1)
    keys = _key_positions(resampler, given)
    table = resampler.query_table()
    queries = resampler.queries(table).expand(kv.shape[0], -1, -1)
    x = resampler.ffn(_look(resampler.attn, queries, kv, keys, mask))
    for layer in resampler.layers:
        x = layer.ffn(x + _look(layer.attn, layer.queries(x, table), kv, keys, mask))
    return resampler.ln_post(x) @ resampler.proj


def _key_positions(resampler: nn.Module, given: Inputs) -> Tensor | None:
    """What joins the keys, (..., D); None for nothing."""
    if "key_sines" in given:
        table = given["key_sines"].to(resampler.query.dtype)
        return torch.cat([table[given["key_column_numbers"]], table[given["key_row_numbers"]]], dim=-1)
    if "key_rows" not in given:
        return None
    return _interpolated(resampler.pos_embed, given["key_rows"], given["key_columns"]).to(resampler.query.dtype)


def _look(attention: LatentAttention, queries: Tensor, kv: Tensor, keys: Tensor | None, mask: Tensor) -> Tensor:
    return attention.out_proj(attend(*_projected(attention, queries, kv, keys), mask))


def _projected(attention: LatentAttention, queries: Tensor, kv: Tensor, keys: Tensor | None) -> tuple[Tensor, ...]:
    """Queries, keys and values, (..., H, d) each."""
    q, k, v, positions = attention.projected(queries, kv, keys)
    return q, k if positions is None else k + positions, v


def _perceive_packed(resampler: PerceiverResampler, features: Tensor, given: Inputs) -> Tensor:
    """One layer, its attention by the operator of uhd_kernels."""
    kv = resampler.ln_kv(resampler.kv_proj(features))
    queries = resampler.queries(resampler.query_table())
    q, k, v = _projected(resampler.attn, queries, kv, _key_positions(resampler, given))
    bounds = torch.cat([given["ends"].new_zeros(1), given["ends"]])
    mixed = varlen_cross_attention(q, k, v, bounds, k.shape[0])
    x = resampler.ffn(resampler.attn.out_proj(mixed.flatten(-2)))
    return resampler.ln_post(x) @ resampler.proj


def _look_through_windows(resampler: SpatialResampler, features: Tensor, given: Inputs) -> Tensor:
    w_q, w_k, w_v = resampler.attn.in_proj_weight.chunk(3)
    b_q, b_k, b_v = resampler.attn.in_proj_bias.chunk(3)
    heads = resampler.config.num_heads
    x = resampler.ln_kv(resampler.kv_proj(features))
    q = F.linear(resampler.ln_q(resampler.query) + resampler.pos_embed.to(x.dtype), w_q, b_q)
    k, v = F.linear(x + _key_positions(resampler, given), w_k), F.linear(x, w_v)
    windows = given["windows"].to(x.dtype)  # (V, Q * bins, L)
    bins = windows.shape[1] // q.shape[0]
    k, v = (
        (windows @ part + bias).unflatten(1, (-1, bins)).unflatten(-1, (heads, -1))  # (V, Q, bins, H, d)
        for part, bias in ((k, b_k), (v, b_v))
    )
    q = q.unflatten(-1, (heads, -1)).unsqueeze(1).expand(k.shape[0], -1, -1, -1, -1)
    mask = given["window_mask"][:, None, None].expand(-1, k.shape[1], -1, -1)
    mixed = attend(*(x.flatten(0, 1) for x in (q, k, v, mask))).unflatten(0, (k.shape[0], -1)).flatten(2)
    return resampler.ln_post(resampler.attn.out_proj(mixed)) @ resampler.proj


def _every_patch(projector: MLPProjector, features: Tensor, given: Inputs) -> Tensor:
    return projector.mlp(features) * given["mask"].unsqueeze(-1).to(features.dtype)


def _blocks(features: Tensor, given: Inputs) -> tuple[Tensor, Tensor]:
    """The patches of every block, (V, Q, n, D), and 1 where there is a block, else 0, (V, Q, 1)."""
    blocks = given["blocks"]
    return features.flatten(0, 1)[blocks.clamp_min(0)], (blocks[..., :1] >= 0).to(features.dtype)


def _shuffle(projector: PixelShuffleProjector, features: Tensor, given: Inputs) -> Tensor:
    blocks, there = _blocks(features, given)
    return projector.mlp(blocks.flatten(2)) * there


def _merge(projector: MergeProjector, features: Tensor, given: Inputs) -> Tensor:
    x, there = _blocks(features, given)
    for layer in projector.mlp:
        x = layer(x.unflatten(2, (-1, 4)).flatten(3))
    return x.squeeze(2) * there


COMPRESSORS = {
    PerceiverResampler: _perceive,
    SpatialResampler: _look_through_windows,
    MLPProjector: _every_patch,
    PixelShuffleProjector: _shuffle,
    MergeProjector: _merge,
}
"""The compressors that have a padded form."""
