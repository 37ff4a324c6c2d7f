"""Compressors: packed patch features of every view in, visual tokens out. Each works without the rest."""

from __future__ import annotations

from uhd.resampler.perceiver import PerceiverConfig, PerceiverResampler
from uhd.resampler.projectors import MLPProjector, PixelShuffleProjector
from uhd.resampler.protocol import Compressor
from uhd.resampler.sincos import sincos_2d

__all__ = [
    "Compressor",
    "MLPProjector",
    "PerceiverConfig",
    "PerceiverResampler",
    "PixelShuffleProjector",
    "sincos_2d",
]
