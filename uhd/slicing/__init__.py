"""Plans in integers: where an image is cut, at which sizes, and how many tokens it costs. Loads numpy at most."""

from uhd.slicing.bounds import WorstCase, worst_case
from uhd.slicing.config import PRESETS, SeparatorCount, SlicingConfig
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
from uhd.slicing.many import plan_many
from uhd.slicing.media import VideoPlan, plan_images, plan_video
from uhd.slicing.plan import Box, Candidate, Canvas, Packing, SlicePlan, View, candidates, grid_score, plan
from uhd.slicing.strategies import strategies, strategy

__all__ = [
    "PRESETS",
    "Box",
    "Candidate",
    "Canvas",
    "Packing",
    "PatchHit",
    "SeparatorCount",
    "SlicePlan",
    "SlicingConfig",
    "VideoPlan",
    "View",
    "WorstCase",
    "candidates",
    "canvas_to_image",
    "canvas_to_view",
    "grid_score",
    "image_to_canvas",
    "image_to_view",
    "locate",
    "patch_at",
    "patch_box",
    "patch_index",
    "plan",
    "plan_images",
    "plan_many",
    "plan_video",
    "strategies",
    "strategy",
    "token_range",
    "view_box",
    "view_of_token",
    "view_to_canvas",
    "view_to_image",
    "worst_case",
]
