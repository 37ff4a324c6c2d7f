"""Small ViTs, plain and merging inside, with no parameter at a special value, and patches for them."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.tiny import stirred
from uhd.vision import CompressedViT, ViT, ViTConfig, compress_vit

CONFIG = ViTConfig(
    patch_size=2,
    width=16,
    depth=4,
    heads=2,
    mlp_width=24,
    image_size=16,
    class_token=True,
    num_registers=2,
    layer_scale=0.5,
    position_grid_hw=(8, 8),
    position_prefix=1,
)
NO_PREFIX = replace(CONFIG, class_token=False, num_registers=0, position_prefix=0)
GRIDS = [(2, 4), (4, 2), (4, 4), (1, 8), (2, 4), (5, 1)]
MODELS = {
    "plain": lambda: make(),
    "plain, normed before": lambda: make(replace(CONFIG, pre_norm=True, activation="swiglu")),
    "plain, no prefix": lambda: make(replace(NO_PREFIX, activation="quick_gelu")),
    "plain, window stem": lambda: make(replace(NO_PREFIX, stem_border=2, stem_hidden=20, stem_grey=True)),
    "window": lambda: compressed(),
    "window, twice, no prefix": lambda: compressed((1, 3), config=replace(NO_PREFIX, activation="gelu_tanh")),
    "average": lambda: compressed(compressor="average"),
    "adaptive, twice": lambda: compressed((1, 4), "adaptive"),
}
DIVISORS = {"window": 2, "average": 2, "window, twice, no prefix": 4, "adaptive, twice": 4}
"""What both sides of a grid must be multiples of."""


def make(config: ViTConfig = CONFIG, **kwargs) -> ViT:
    torch.manual_seed(0)
    return stirred(ViT(config, **kwargs), 0.3)


def compressed(after=2, compressor="window", config: ViTConfig = CONFIG) -> CompressedViT:
    """Its compressors are moved off their special values too."""
    vit = compress_vit(make(config), after, compressor=compressor)
    stirred(vit.compressors, 0.3)
    return vit


def grids_for(name: str, grids=GRIDS) -> list[tuple[int, int]]:
    """Grids that the model can take."""
    divisor = DIVISORS.get(name, 1)
    return [(h * divisor, w * divisor) for h, w in grids]


def random_patches(grids, config: ViTConfig = CONFIG) -> torch.Tensor:
    return torch.randn(sum(h * w for h, w in grids), config.patch_dim, generator=torch.Generator().manual_seed(1))


def lengths(grids) -> list[int]:
    return [h * w for h, w in grids]


def assert_near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
