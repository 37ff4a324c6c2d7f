"""Small pictures, parts and encoders that many test files share."""

import pytest
import torch

import uhd
from tests.files import encoded, exif, noise, picture, png_chunk  # noqa: F401, for those who take all from here
from uhd.pixels import PixelSettings
from uhd.resampler import PerceiverConfig, PerceiverResampler
from uhd.vision import ViT, ViTConfig

PIXELS = PixelSettings(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
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
