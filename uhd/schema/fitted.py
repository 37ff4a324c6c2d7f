"""Moved to :mod:`uhd.schema.counted`."""

from typing import Any

from uhd.moved import moved
from uhd.slicing import SlicingLike, find


def slicing_to_dict(slicing: SlicingLike) -> dict[str, Any]:
    """Now ``find(slicing).to_dict()``."""
    return find(slicing).to_dict()


_NAMES = ("PLAIN", "layout_of", "own_function", "slicing_from_dict", "video_layout")
__getattr__ = moved(
    __name__,
    {
        **dict.fromkeys(_NAMES, "uhd.schema.counted"),
        "FittedRule": "uhd.schema.counted:Counted",
        "planner_of": "uhd.slicing:find",
    },
)
