"""Compressors: packed patch features of every view in, visual tokens out. Each works without the rest."""

from __future__ import annotations

from uhd.resampler.packing import FeaturePacker, pack_features
from uhd.resampler.perceiver import PerceiverConfig, PerceiverResampler
from uhd.resampler.projectors import MLPProjector, PixelShuffleProjector, PoolProjector
from uhd.resampler.protocol import Compressor
from uhd.resampler.sincos import sincos_2d

__all__ = [
    "Compressor",
    "FeaturePacker",
    "MLPProjector",
    "PerceiverConfig",
    "PerceiverResampler",
    "PixelShuffleProjector",
    "PoolProjector",
    "pack_features",
    "sincos_2d",
]
