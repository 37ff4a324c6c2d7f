"""Pixels: from a picture in any shape to the uint8 views of its plan, and from a view to patches.

The plan decides every size; here the image is made upright RGB, each canvas is resized once as a whole and then cut,
and a view is folded into patches. Everything stays uint8: mean and std are applied on the device, by
:mod:`uhd.pixels.normalize`, to the patches or inside the patch embedding. NumPy and Pillow only, unless the fast
backend or that module is asked for; a torch tensor is understood without importing torch.
"""

from .load import image_size_hw, load_image
from .patches import INNER, fold_into, inner_axes, patchify, reorder, unpatchify
from .render import cut, render
from .settings import DEFAULT, MAX_PIXELS, RESAMPLE, PixelSettings

__all__ = [
    "DEFAULT",
    "INNER",
    "MAX_PIXELS",
    "RESAMPLE",
    "PixelSettings",
    "cut",
    "fold_into",
    "image_size_hw",
    "inner_axes",
    "load_image",
    "patchify",
    "render",
    "reorder",
    "unpatchify",
]
