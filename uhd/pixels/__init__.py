"""Pixels: from a picture in any shape to the uint8 views of its plan, and from a view to patches.

The plan decides every size; here the image is made upright RGB, each canvas is resized once as a whole and then cut,
and a view is folded into patches. Everything stays uint8: mean and std are applied on the device, by
:mod:`uhd.pixels.normalize`, to the patches or inside the patch embedding. NumPy and Pillow only, unless the fast
backend or that module is asked for; a torch tensor is understood without importing torch.
"""

from typing import TYPE_CHECKING

from uhd.lazily import lazily

if TYPE_CHECKING:
    from .load import image_size_hw as image_size_hw
    from .load import load_image as load_image
    from .patches import INNER as INNER
    from .patches import fold_into as fold_into
    from .patches import inner_axes as inner_axes
    from .patches import patchify as patchify
    from .patches import reorder as reorder
    from .patches import unpatchify as unpatchify
    from .settings import DEFAULT as DEFAULT
    from .settings import MAX_PIXELS as MAX_PIXELS
    from .settings import RESAMPLE as RESAMPLE
    from .settings import PixelSettings as PixelSettings
    from .views import cut as cut
    from .views import move_borders as move_borders
    from .views import render as render

_NAMES = {
    "uhd.pixels.load": "image_size_hw load_image",
    "uhd.pixels.patches": "INNER fold_into inner_axes patchify reorder unpatchify",
    "uhd.pixels.views": "cut move_borders render",
    "uhd.pixels.settings": "DEFAULT MAX_PIXELS RESAMPLE PixelSettings",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [*_HOMES]

__getattr__ = lazily(__name__, _HOMES)
