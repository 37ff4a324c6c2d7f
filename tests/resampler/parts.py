"""Small compressors of every kind, with no parameter at a special value, and features for them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch

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
)

GOLDEN = Path(__file__).parent.parent / "golden" / "resampler.npz"
TAGS = {"march2024_perceiver_g8": "paper", "minicpmv20_g8": "minicpm-v-2.0", "minicpmv26_q16": "minicpm-v-2.6"}
"""Recorded perceivers, and their variants."""

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


def golden(tag):
    """The tag's weights, number of heads, and cases: (packed features, grids, output)."""
    with np.load(GOLDEN) as file:
        data = {name: file[name] for name in file.files if name.startswith(tag)}
        heads = json.loads(str(file["info_json"]))[tag]["num_heads"]
    state = {name.split("/w/")[1]: torch.tensor(x) for name, x in data.items() if "/w/" in name}
    cases = []
    for name, x in data.items():
        if match := re.fullmatch(rf"{tag}/x_(\d+)x(\d+)", name):
            cases.append(
                (x.reshape(-1, x.shape[-1]), [(int(match[1]), int(match[2]))] * len(x), f"y_{name.split('_')[-1]}")
            )
    for x, sizes, y in (("x", "tgt_sizes", "y"), ("x_grow", "tgt_grow", "y_grow")):
        if f"{tag}/{x}" in data:
            grids = [(int(h), int(w)) for h, w in data[f"{tag}/{sizes}"]]
            rows = [row[: h * w] for row, (h, w) in zip(data[f"{tag}/{x}"], grids, strict=True)]
            cases.append((np.concatenate(rows), grids, y))
    return state, heads, [(torch.tensor(x), grids, torch.tensor(data[f"{tag}/{y}"])) for x, grids, y in cases]
