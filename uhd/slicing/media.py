"""Moved to :mod:`uhd.slicing.sample`."""

from uhd.moved import moved

_PUBLIC = dict.fromkeys(("VideoPlan", "plan_images", "plan_video"), "uhd.slicing")
__getattr__ = moved(__name__, {**_PUBLIC, "plan_sample": "uhd.slicing.sample"})
