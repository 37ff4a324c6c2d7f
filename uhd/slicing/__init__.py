"""Plans in integers: where an image is cut, at which sizes, and how many tokens it costs. Loads numpy at most."""

from uhd.slicing.adaptive import PRESETS, SlicingConfig, WorstCase, worst_case
from uhd.slicing.config import OwnRule, SeparatorCount, Slicing
from uhd.slicing.coordinates import (
    PatchHit,
    canvas_to_image,
    canvas_to_view,
    image_to_canvas,
    image_to_view,
    locate,
    patch_at,
    patch_box,
    patch_index,
    token_range,
    view_box,
    view_of_token,
    view_to_canvas,
    view_to_image,
)
from uhd.slicing.from_grid import plan_from_grid
from uhd.slicing.grids import Candidate, grid_score
from uhd.slicing.many import plan_many
from uhd.slicing.plan import Box, Canvas, Packing, SlicePlan, View
from uhd.slicing.rules import SlicingLike, candidates, find, plan, register_strategy, strategies, strategy
from uhd.slicing.sample import VideoPlan, plan_images, plan_video

__all__ = [
    "PRESETS",
    "Box",
    "Candidate",
    "Canvas",
    "OwnRule",
    "Packing",
    "PatchHit",
    "SeparatorCount",
    "SlicePlan",
    "Slicing",
    "SlicingConfig",
    "SlicingLike",
    "VideoPlan",
    "View",
    "WorstCase",
    "candidates",
    "canvas_to_image",
    "canvas_to_view",
    "find",
    "grid_score",
    "image_to_canvas",
    "image_to_view",
    "locate",
    "patch_at",
    "patch_box",
    "patch_index",
    "plan",
    "plan_from_grid",
    "plan_images",
    "plan_many",
    "plan_video",
    "register_strategy",
    "strategies",
    "strategy",
    "token_range",
    "view_box",
    "view_of_token",
    "view_to_canvas",
    "view_to_image",
    "worst_case",
]
