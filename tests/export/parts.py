"""Small encoders of every family and compressor that a graph is made of, by name."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

import uhd
from tests.tiny import PIXELS, perceiver, picture, stirred, vit
from tests.vision.test_weights import MODELS, randomised
from uhd.resampler import MergeProjector, MLPProjector, PixelShuffleProjector, SpatialConfig, SpatialResampler
from uhd.vision import compress_vit, vit_from

SHAPES = [(20, 20), (41, 27), (7, 64), (90, 13), (55, 83), (100, 33), (3, 2), (61, 60)]


def source(name):
    return lambda: vit_from(randomised(MODELS[name]), select_layer=-1)


def spatial(**changes):
    fields = {"width": 24, "vision_width": 16, "num_heads": 2, "num_latents": 9}
    return stirred(SpatialResampler(SpatialConfig(**{**fields, **changes})))


def resampler(**changes):
    return stirred(perceiver(vision_width=16, **changes))


def projector(kind, **changes):
    return lambda: stirred(kind(16, 24, **changes))


def minicpm():
    sizes = {"image_size": 20, "patch_size": 4, "width": 16, "position_grid_hw": (14, 14)}
    return stirred(vit(**sizes, interpolation="nearest", bucket_rule="remote", activation="gelu_tanh"))


def windowed():
    sizes = {"image_size": 20, "patch_size": 4, "width": 16, "position_grid_hw": (5, 5)}
    return stirred(vit(**sizes, stem_border=3, stem_hidden=20, stem_grey=True))


def compressed(kind, **changes):
    """Four blocks, with a compressor behind the second."""
    sizes = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 4, "position_grid_hw": (5, 5)}
    return lambda: stirred(compress_vit(vit(**sizes, **changes), after=2, compressor=kind))


MERGED = uhd.slicing.SlicingConfig(merge=2)
PAIRS = {
    "clip, paper": (source("clip"), resampler, {}),
    "siglip, minicpm-v-2.0": (source("siglip"), partial(resampler, key_position="direct"), {"slicing": "minicpm-v"}),
    "siglip2, six latents": (
        source("siglip2"),
        partial(resampler, num_latents=6, query_position=False, key_position="direct"),
        {},
    ),
    "minicpm-v-2.6": (
        minicpm,
        partial(resampler, query_position=False, key_position="direct"),
        {"slicing": "minicpm-v"},
    ),
    "dinov2, deep": (source("dinov2"), partial(resampler, depth=2, ffn_ratio=1.5), {}),
    "dinov2 giant, no key positions": (source("dinov2 giant"), partial(resampler, key_position="none"), {}),
    "dinov2 registers, spatial": (source("dinov2 registers"), spatial, {}),
    "timm, spatial as released": (source("timm embedded registers"), partial(spatial, aligned=False), {}),
    "timm giant, mlp": (source("timm giant"), projector(MLPProjector), {}),
    "timm clip, pixel shuffle": (
        source("timm clip"),
        projector(PixelShuffleProjector, factor=2),
        {"slicing": "minicpm-v-4.6-4x"},
    ),
    "timm no position, merge twice": (
        source("timm no position"),
        projector(MergeProjector, rounds=2),
        {"slicing": "minicpm-v-4.6"},
    ),
    "window stem, paper": (windowed, resampler, {}),
    "minicpm-v-4.6, merge": (compressed("window"), projector(MergeProjector), {"slicing": "minicpm-v-4.6"}),
    "adaptive inside, paper": (compressed("adaptive", num_registers=2), resampler, {"slicing": MERGED}),
    "average and window stem, spatial": (compressed("average", stem_border=3), spatial, {"slicing": MERGED}),
}


def encoder(name, **changes) -> uhd.VisualEncoder:
    """Views of 20 px, patches of 4."""
    torch.manual_seed(0)
    make_vision, make_compressor, parts = PAIRS[name]
    parts = {"pixels": PIXELS, **parts, **changes}
    if "slicing" in parts:
        side = 16 if "merge" in name or "inside" in name or "average" in name else 20
        parts["slicing"] = uhd.slicing.find(parts["slicing"]).for_vision(image_size=side, patch_size=4)
    return uhd.VisualEncoder(make_vision(), make_compressor(), check_image_size=False, **parts).eval()


def images(shapes=SHAPES):
    return [picture(*hw, seed) for seed, hw in enumerate(shapes)]


def tokens_of(made, pictures) -> np.ndarray:
    """The encoder's tokens of each view before any packing, padded by zeros to the longest: (V, Q, D)."""
    batch = made.prepare(pictures)
    with torch.inference_mode():
        packed, lengths = made.encode_packed(batch.patches, batch.grids)
    views = [view.float() for view in packed.split(lengths)]
    return torch.nn.utils.rnn.pad_sequence(views, batch_first=True).numpy()
