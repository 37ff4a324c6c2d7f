"""Moved to :mod:`uhd.slicing.sample`."""

from uhd.moved import moved

_NAMES = ("Planner", "VideoPlan", "capped", "plan_images", "plan_sample", "plan_video", "single_view")
__getattr__ = moved(__name__, dict.fromkeys(_NAMES, "uhd.slicing.sample"))
