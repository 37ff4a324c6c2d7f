"""Vision encoders over packed views: a ViT of our own, its weights from elsewhere, and a wrapper for other backbones.

Every encoder is called as `features = vision(patches, grids)` with packed patches (N, P) and (rows, columns) per view,
returns packed features (N', D), and tells the grids of those by `vision.output_grids(grids)`.
"""

from __future__ import annotations

from uhd.positions import bucket_position_ids, interpolate_pos_embed

from .config import ViTConfig
from .merging import CompressedViT, CompressedViTConfig, compress_vit
from .patches import patchify, unpatchify
from .sources import config_from_hf, config_from_timm
from .tower import VisionTower
from .vit import ViT
from .weights import load_vit, to_source_state_dict, vit_from

__all__ = [
    "CompressedViT",
    "CompressedViTConfig",
    "ViT",
    "ViTConfig",
    "VisionTower",
    "bucket_position_ids",
    "compress_vit",
    "config_from_hf",
    "config_from_timm",
    "interpolate_pos_embed",
    "load_vit",
    "patchify",
    "to_source_state_dict",
    "unpatchify",
    "vit_from",
]
