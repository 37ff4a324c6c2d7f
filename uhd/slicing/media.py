"""Moved to :mod:`uhd.slicing.sample`."""

from uhd.moved import moved

_NAMES = ("VideoPlan", "plan_images", "plan_sample", "plan_video")
__getattr__ = moved(__name__, dict.fromkeys(_NAMES, "uhd.slicing.sample"))
