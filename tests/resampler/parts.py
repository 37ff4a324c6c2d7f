"""Small compressors of every kind, with no parameter at a special value, and features for them."""

from __future__ import annotations

import functools
import json
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tests.tiny import stirred
from uhd.resampler import (
    MergeProjector,
    MLPProjector,
    PerceiverConfig,
    PerceiverResampler,
    PixelShuffleProjector,
    PoolProjector,
    PyramidConfig,
    PyramidResampler,
    RewriteConfig,
    RewriteResampler,
    SpatialConfig,
    SpatialResampler,
    sincos_2d,
)

GOLDEN = Path(__file__).parent.parent / "golden"
TAGS = {"march2024_perceiver_g8": "paper", "minicpmv20_g8": "minicpm-v-2.0", "minicpmv26_q16": "minicpm-v-2.6"}
"""Recorded perceivers, and their variants."""

RELEASED = {
    **{tag: partial(PerceiverResampler.from_state_dict, variant=variant) for tag, variant in TAGS.items()},
    **dict.fromkeys(("v1_spatial_g4", "v1_spatial_g12", "v1_spatial_g8_nokvproj"), SpatialResampler.from_state_dict),
    "better_q16": RewriteResampler.from_state_dict,
    "v2_hiwin_g4": PyramidResampler.from_state_dict,
}
"""How recorded weights become a module."""

GRIDS = [(3, 5), (4, 2), (1, 7), (3, 5), (6, 6)]
SIZES = {"width": 24, "vision_width": 10, "num_heads": 3, "num_latents": 9}
MODULES = {
    PerceiverConfig: PerceiverResampler,
    SpatialConfig: SpatialResampler,
    RewriteConfig: RewriteResampler,
    PyramidConfig: PyramidResampler,
}
PERCEIVERS = {
    "paper": PerceiverConfig(width=24, vision_width=10, num_heads=3),
    "paper, 9 latents": PerceiverConfig(**SIZES),
    "paper, 1 latent, equal widths": PerceiverConfig(width=16, vision_width=16, num_heads=2, num_latents=1),
    "2.0": PerceiverConfig.preset("minicpm-v-2.0", width=24, vision_width=10, num_heads=6, num_latents=16),
    "2.5": PerceiverConfig.preset("minicpm-v-2.6", width=24, vision_width=10, num_heads=2, num_latents=96),
    "depth 3 with FFN": PerceiverConfig(**SIZES, depth=3, ffn_ratio=1.5),
    "no positions": PerceiverConfig(
        width=18, vision_width=10, num_heads=3, num_latents=5, query_position=False, key_position="none"
    ),
}
LATENTS = {
    **PERCEIVERS,
    "spatial": SpatialConfig(**SIZES),
    "spatial, as released": SpatialConfig(**SIZES, aligned=False),
    "spatial, equal widths": SpatialConfig(width=16, vision_width=16, num_heads=2, num_latents=4),
    "rewrite": RewriteConfig(**SIZES, table_side=4),
    "pyramid": PyramidConfig(**SIZES, upsample=True),
    "pyramid, as released": PyramidConfig(**SIZES, levels=(1, 4), upsample=True, aligned=False),
}
PROJECTORS = {
    "merger": lambda: MergeProjector(10, 24),
    "merger, twice": lambda: MergeProjector(10, 24, rounds=2),
    "MLP": lambda: MLPProjector(10, 24, hidden_dim=7),
    "pixel shuffle": lambda: PixelShuffleProjector(10, 24, factor=3),
    "pooled": lambda: PoolProjector(10, 24),
    "pooled, bilinear": lambda: PoolProjector(10, 24, mode="bilinear"),
}
DIVISORS = {"merger": 2, "merger, twice": 4, "pixel shuffle": 3}
"""What both sides of a grid must be multiples of."""

ALL = [*LATENTS, *PROJECTORS]


def randomised(what, *, dtype=torch.float64, seed=0):
    """A compressor by name or config, gates, biases and LayerNorms moved off their special values too."""
    torch.manual_seed(seed)
    config = LATENTS.get(what) if isinstance(what, str) else what
    module = PROJECTORS[what]() if config is None else MODULES[type(config)](config)
    return stirred(module.to(dtype), 0.3).train()


def grids_for(name, grids=GRIDS):
    """Grids that the compressor can take."""
    divisor = DIVISORS.get(name, 1)
    return [(h * divisor, w * divisor) for h, w in grids]


def features_for(module, grids=GRIDS, *, seed=1):
    """Packed features in the dtype of the weights."""
    rows = sum(h * w for h, w in grids)
    drawn = torch.randn(rows, module.in_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return drawn.to(next(module.parameters()).dtype)


def per_view(features, grids):
    return zip(features.split([h * w for h, w in grids]), grids, strict=True)


def composed(module, features, grids):
    """A perceiver's layers around nn.MultiheadAttention, one view at a time, with positions at full width."""
    config, dtype = module.config, features.dtype
    side = math.isqrt(config.num_latents)

    def attend(layer, queries, keys, values):
        attention = nn.MultiheadAttention(config.width, config.num_heads, dtype=dtype)
        attention.load_state_dict(layer.state_dict())
        return attention(queries, keys, values)[0]

    def feed_forward(ffn, x):
        return x + ffn.down(F.gelu(ffn.up(ffn.norm(x)))) if config.ffn_ratio else x

    latent_table = module.pos_embed if config.query_position else 0
    outputs = []
    for x, (h, w) in per_view(features, grids):
        kv = keys = module.ln_kv(module.kv_proj(x))
        if config.key_position == "direct":
            keys = kv + sincos_2d(config.width, (h, w)).to(dtype)
        if config.key_position == "interpolated":
            table = module.pos_embed.to(torch.promote_types(dtype, torch.float32))
            table = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
            table = F.interpolate(table, (h, w), mode="bicubic").permute(0, 2, 3, 1).reshape(h * w, -1)
            keys = kv + table.to(dtype)
        y = feed_forward(module.ffn, attend(module.attn, module.ln_q(module.query) + latent_table, keys, kv))
        for layer in module.layers:
            y = feed_forward(layer.ffn, y + attend(layer.attn, layer.ln_q(y) + latent_table, keys, kv))
        outputs.append(module.ln_post(y) @ module.proj)
    return torch.stack(outputs)


@functools.cache
def recorded(tag):
    """What a release's code gave: its weights, its settings, and the arrays of the tag by name."""
    for name in ("resampler.npz", "resampler_family.npz"):
        with np.load(GOLDEN / name) as file:
            if tag in (info := json.loads(str(file["info_json"]))):
                data = {key.split("/", 1)[1]: file[key] for key in file.files if key.startswith(f"{tag}/")}
                return {key[2:]: torch.tensor(x) for key, x in data.items() if key.startswith("w/")}, info[tag], data
    raise ValueError(f"nothing is recorded of {tag}")


def cases(tag):
    """What was recorded, as (packed features, grids, output)."""
    data, found = recorded(tag)[2], []
    for name, x in data.items():
        if match := re.fullmatch(r"x_(\d+)x(\d+)", name):
            grids = [(int(match[1]), int(match[2]))] * len(x)
            found.append((x.reshape(-1, x.shape[-1]), grids, data[name.replace("x_", "y_", 1)]))
    for x, sizes, y in (("x", "tgt_sizes", "y"), ("x_grow", "tgt_grow", "y_grow")):
        if x in data:
            grids = [(int(h), int(w)) for h, w in data[sizes]]
            rows = [row[: h * w] for row, (h, w) in zip(data[x], grids, strict=True)]
            found.append((np.concatenate(rows), grids, data[y]))
    return [(torch.tensor(x), grids, torch.tensor(y)) for x, grids, y in found]


def released(tag):
    """The module of recorded weights."""
    state, info, _ = recorded(tag)
    return RELEASED[tag](state, num_heads=info["num_heads"])
