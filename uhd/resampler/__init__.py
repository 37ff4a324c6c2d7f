"""Compressors: packed patch features of every view in, visual tokens out. Each works without the rest."""

from __future__ import annotations

from uhd.positions import sincos_2d
from uhd.resampler.config import PerceiverConfig
from uhd.resampler.perceiver import PerceiverResampler
from uhd.resampler.projectors import MergeProjector, MLPProjector, PixelShuffleProjector, PoolProjector
from uhd.resampler.protocol import Compressor
from uhd.resampler.pyramid import PyramidConfig, PyramidResampler
from uhd.resampler.rewrite import RewriteConfig, RewriteResampler
from uhd.resampler.spatial import SpatialConfig, SpatialResampler
from uhd.resampler.stitch import FeaturePacker, pack_features

__all__ = [
    "Compressor",
    "FeaturePacker",
    "MLPProjector",
    "MergeProjector",
    "PerceiverConfig",
    "PerceiverResampler",
    "PixelShuffleProjector",
    "PoolProjector",
    "PyramidConfig",
    "PyramidResampler",
    "RewriteConfig",
    "RewriteResampler",
    "SpatialConfig",
    "SpatialResampler",
    "pack_features",
    "sincos_2d",
]
