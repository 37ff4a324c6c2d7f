"""``uhd.plan``: the planner's front door, which a picture may come through as well as its size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uhd import slicing

if TYPE_CHECKING:
    from PIL import Image

    from uhd.slicing import SlicePlan, SlicingLike


def plan(
    image: tuple[int, int] | Image.Image, config: SlicingLike | None = None, *, max_tokens: int | None = None
) -> SlicePlan:
    """Plan one image by the adaptive rule or by any other, as :func:`uhd.slicing.plan` does.

    Args:
        image: (height, width) in px, or the Pillow image itself, so that the two cannot be swapped. Its orientation is
            applied, as wherever a picture is read; where ``config`` moves borders, they are moved by its pixels.
        config: Settings of any rule, its name (see :func:`uhd.strategies`), or your own function from (height, width)
            to a :class:`SlicePlan`; ``None`` is ``"llava-uhd-safe"``.
        max_tokens: Bound on ``plan.num_tokens``, met by fewer slices; for the adaptive planner only.

    Returns:
        The plan. Equal arguments give the same (cached) object, unless the rule is your own function.

    Raises:
        ValueError: The size is not two ints in 1..1,000,000, the image cannot be read, the rule refuses the size, no
            strategy has that name, or not even the overview fits ``max_tokens``.
        TypeError: ``config`` is none of these, or your function did not return a plan.

    >>> from PIL import Image
    >>> plan(Image.new("RGB", (672, 1008))).grid, plan((1008, 672)).grid
    ((3, 2), (3, 2))
    """
    if hasattr(image, "getexif"):  # a Pillow image, and only then is Pillow loaded
        from uhd.pixels import image_size_hw, move_borders

        size_hw = image_size_hw(image)
        rule, found = slicing.find(config), slicing.plan(size_hw, config, max_tokens=max_tokens)
        return move_borders(image, found, rule)
    return slicing.plan(image, config, max_tokens=max_tokens)
