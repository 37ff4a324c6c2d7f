"""Small pictures, parts and encoders that many test files share."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import uhd
from uhd.pixels import PixelSettings
from uhd.resampler import PerceiverConfig, PerceiverResampler
from uhd.vision import ViT, ViTConfig

PIXELS = PixelSettings(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def noise(height, width, seed=0):
    """(h, w, 3) uint8: every px of misplacement, and every other filter, gives other views of it."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def picture(height, width, seed=0):
    """The same as a Pillow image, which no size makes ambiguous."""
    return Image.fromarray(noise(height, width, seed))


def encoded(image, kind="PNG", **options):
    """A Pillow image or an array as the bytes of a file."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def png_chunk(kind, data, checksum=None):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum or zlib.crc32(kind + data))


def exif(orientation):
    found = Image.Exif()
    found[0x0112] = orientation
    return found


IMAGES = [noise(100, 60), noise(30, 200, 1), noise(20, 11, 2), noise(168, 112, 3)]


def vit(**changes):
    """Views of 56 px, patches of 14."""
    fields = {"image_size": 56, "patch_size": 14, "width": 32, "depth": 2, "heads": 2, "mlp_width": 64}
    return ViT(ViTConfig(**{**fields, "position_grid_hw": (4, 4), **changes}))


def perceiver(**changes):
    """Four latents of width 24 over :func:`vit`."""
    fields = {"width": 24, "vision_width": 32, "num_heads": 2, "num_latents": 4}
    return PerceiverResampler(PerceiverConfig(**{**fields, **changes}))


def tiny_encoder(compressor=None, *, vision=None, pixels=PIXELS, **parts):
    """The same at every call, but for the parts that are given."""
    torch.manual_seed(0)
    vision = vision or vit()
    return uhd.VisualEncoder(vision, compressor or perceiver(), pixels=pixels, **parts).eval()


def silent(module):
    """Parameters without a gradient, but biases: softmax removes that of the keys, which shifts all logits alike."""
    return [
        name for name, p in module.named_parameters() if "bias" not in name and (p.grad is None or not p.grad.any())
    ]


def stirred(module, amount=0.2):
    """The module with noise in every parameter, so that none is at the value it starts with."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(amount * torch.randn_like(parameter))
    return module.eval()


def refuses(words, call, *args, error=ValueError, **kwargs):
    """The call raises this error, and its message has these words, a regular expression."""
    with pytest.raises(error, match=words):
        call(*args, **kwargs)


def assert_same_images(ours, theirs):
    """Encoded images or videos with the same tokens to the bit, plans and layouts."""
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert (a.plan, a.layout) == (b.plan, b.layout)
