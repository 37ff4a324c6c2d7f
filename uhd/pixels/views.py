"""From an image and its plan to uint8 views, by the backend that the settings name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .load import load_image
from .pillow import check_plan, cut_canvas
from .settings import DEFAULT, PixelSettings

if TYPE_CHECKING:
    from uhd.slicing.plan import SlicePlan

    from .fast import Picture


def render(image: Any, plan: SlicePlan, *, settings: PixelSettings = DEFAULT) -> list[np.ndarray]:
    """Render the views of a plan, in the order of ``plan.views``.

    Every canvas is resized from the original image as a whole and then cut, so neighbouring slices share their
    filter's support across the cut. A canvas is resized once, or twice where it has a ``first_hw``; a tile whose size
    is not ``view_hw`` is resized once more.

    >>> from uhd.slicing import plan
    >>> [view.shape for view in render(np.zeros((672, 1008, 3), np.uint8), plan((672, 1008), "llava-1.5"))]
    [(336, 336, 3)]

    Args:
        image: Anything :func:`load_image` takes; its size must be ``plan.image_hw``.
        plan: From :func:`uhd.slicing.plan` or any strategy.
        settings: Name the filter; where they name none, it is the plan's. The plan says whether it antialiases.

    Returns:
        One (h, w, 3) uint8 array a view, (h, w) = ``view.size_hw``; each owns its memory.

    Raises:
        ValueError: The image has another size than the plan, there is no such filter, or a canvas is not whole: its
            source or a tile lies outside, or a part is neither content nor filled.

    Source: one resize and an exact cut as in thunlp/LLaVA-UHD, llava/slice_process.py ``slice_image_minicpm``.
    """
    return [view.copy() for view in cut(image, plan, settings=settings)]


def cut(image: Any, plan: SlicePlan, *, settings: PixelSettings = DEFAULT) -> list[np.ndarray]:
    """Render views that are only read: as :func:`render`, but they may share memory with each other or the image.

    >>> from uhd.slicing import plan
    >>> [view.shape for view in cut(np.zeros((672, 1008, 3), np.uint8), plan((672, 1008), "llava-1.5"))]
    [(336, 336, 3)]
    """
    if settings.backend == "fast":
        from .fast import cut_fast  # it imports torch

        return cut_fast(image, plan, settings)
    image = load_image(image, settings=settings)
    check_plan(plan, (image.height, image.width))
    return [view for canvas in plan.canvases for view in cut_canvas(image, canvas, plan, settings)]


def move_borders(image: Any, plan: SlicePlan, slicing: Any, *, settings: PixelSettings = DEFAULT) -> SlicePlan:
    """The plan with its borders moved to where they cut least of the image, by :mod:`uhd.slicing.borders`.

    Wherever images are planned and cut, this comes between; a plan of your own is cut as it is.

    >>> from uhd.slicing import SlicingConfig, plan
    >>> config = SlicingConfig.preset("llava-uhd-safe", border_moves=2)
    >>> page = np.full((400, 800, 3), 255, np.uint8)
    >>> page[::2, 390:405] = 0
    >>> [canvas.source for canvas in move_borders(page, plan((400, 800), config), config).canvases[:2]]
    [Box(top=0, left=0, bottom=400, right=406), Box(top=0, left=406, bottom=400, right=800)]

    Args:
        image: As :func:`cut` takes it.
        plan: What ``slicing`` plans for an image of its size.
        slicing: Any; without ``border_moves`` the plan comes back as it is, and the image is not looked at.
        settings: How the image is read.

    Raises:
        ValueError: The image has another size than the plan.
    """
    if not slicing.border_moves or plan.grid is None:
        return plan
    from uhd.slicing import borders

    picture = load_picture(image, settings=settings)
    check_plan(plan, (picture.height, picture.width))
    if isinstance(picture, Image.Image):
        return borders.move_borders(
            plan, slicing, lambda box: np.asarray(picture.crop((box.left, box.top, box.right, box.bottom)))
        )
    from .fast import decode_whole

    pixels = decode_whole(picture, settings)
    return borders.move_borders(plan, slicing, lambda box: pixels[box.top : box.bottom, box.left : box.right])


def load_picture(source: Any, *, settings: PixelSettings = DEFAULT) -> Image.Image | Picture:
    """Load an image in the form that :func:`cut` takes quickest; it has a height and a width.

    Args and errors as of :func:`load_image`; with ``settings.draft``, damage to a JPEG's pixels shows when it is cut.
    """
    if settings.backend == "fast":
        from .fast import read_picture

        return read_picture(source, settings)
    return load_image(source, settings=settings)
