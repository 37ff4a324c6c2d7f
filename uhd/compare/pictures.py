"""Small drawings of what a plan does to an image: where it is cut, and the views as the encoder gets them."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw

from uhd.slicing import SlicePlan, view_box
from uhd.slicing.plan import Canvas

from .report import Comparison

SIDE = 196  # px of the longer side of a drawn cut; three pictures stand in a row
_THUMB = 640  # px of the longer side of what pictures are made from
_MOST_DRAWN = 400  # views of one plan
_CUT, _TWICE, _UNSEEN = (214, 64, 40), (255, 176, 32, 110), (20, 24, 32, 170)


def thumbnail(comparison: Comparison) -> Image.Image:
    """Make the image small once; where only a size is known, draw rings, which a stretch turns into ovals."""
    height, width = comparison.image_hw
    scale = min(_THUMB / max(height, width), 1)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    if comparison.image is not None:
        return comparison.image.resize(size, Image.Resampling.BICUBIC)
    picture = Image.new("RGB", size, (226, 233, 241))
    pen = ImageDraw.Draw(picture)
    step = max(min(size) / 3, 12)
    for row in range(math.ceil(size[1] / step)):
        for col in range(math.ceil(size[0] / step)):
            color = ((70, 130, 180), (60, 150, 110), (150, 110, 180))[(row + col) % 3]
            x, y = col * step, row * step
            pen.ellipse((x + step * 0.15, y + step * 0.15, x + step * 0.85, y + step * 0.85), None, color, 4)
    return picture


def _fit(size_hw: tuple[float, float], side: int) -> tuple[int, int]:
    """Return (width, height) of the largest picture of this shape in a square, no side below 2 px."""
    scale = side / max(size_hw)
    return max(round(size_hw[1] * scale), 2), max(round(size_hw[0] * scale), 2)


def cut_picture(thumb: Image.Image, plan: SlicePlan, side: int = SIDE) -> Image.Image:
    """Outline the detail views on the image, and tint what several of them share and what none of them has."""
    picture = thumb.resize(_fit(plan.image_hw, side), Image.Resampling.BICUBIC)
    kind = "overview" if plan.slice_hw is None else "slice"
    scale = (picture.height / plan.image_hw[0], picture.width / plan.image_hw[1])
    boxes = []
    for view in plan.views[:_MOST_DRAWN]:
        if view.kind == kind:
            top, left, bottom, right = (float(e) * scale[i % 2] for i, e in enumerate(view_box(plan, view.index)))
            box = (max(left, 0), max(top, 0), min(right, picture.width), min(bottom, picture.height))
            if box[2] > box[0] and box[3] > box[1]:
                boxes.append(tuple(round(edge) for edge in box))
    counts = Image.new("L", picture.size, 0)
    for left, top, right, bottom in boxes:
        part = counts.crop((left, top, right, bottom)).point([min(v + 1, 2) for v in range(256)])
        counts.paste(part, (left, top))
    for level, color in ((2, _TWICE), (0, _UNSEEN)):
        mask = counts.point([color[3] * (value == level) for value in range(256)])
        picture.paste(color[:3], mask=mask)
    pen = ImageDraw.Draw(picture)
    for left, top, right, bottom in boxes:
        pen.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), None, _CUT, 2)
    return picture


def views_picture(thumb: Image.Image, plan: SlicePlan, kind: str, side: int) -> Image.Image:
    """Draw the views of one kind in their grid, as the encoder gets them, padding hatched."""
    views = [view for view in plan.views if view.kind == kind][:_MOST_DRAWN]
    rows, cols = (max(view.row for view in views) + 1, max(view.col for view in views) + 1)
    tallest, widest = max(v.size_hw[0] for v in views), max(v.size_hw[1] for v in views)
    gap = 3 if max(rows, cols) <= 20 else 1
    room = max(side - gap * (max(rows, cols) - 1), 2 * max(rows, cols))
    scale = room / max(rows * tallest, cols * widest)
    cell = (max(round(widest * scale), 2), max(round(tallest * scale), 2))
    sheet = Image.new("RGB", (cols * (cell[0] + gap) - gap, rows * (cell[1] + gap) - gap), (255, 255, 255))
    for view in views:
        size = (max(round(view.size_hw[1] * scale), 2), max(round(view.size_hw[0] * scale), 2))
        shown = _view_picture(thumb, plan, plan.canvases[view.canvas], view.box, size)
        sheet.paste(shown, (view.col * (cell[0] + gap), view.row * (cell[1] + gap)))
    return sheet


def _view_picture(
    thumb: Image.Image, plan: SlicePlan, canvas: Canvas, box: tuple[int, int, int, int], size: tuple[int, int]
) -> Image.Image:
    picture = _hatched(size)
    (top, left), (rows, cols) = canvas.offset, canvas.content_hw
    inside = (max(box[0], top), max(box[1], left), min(box[2], top + rows), min(box[3], left + cols))
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        return picture
    source = canvas.source or (0, 0, *plan.image_hw)
    lengths = (source[2] - source[0], source[3] - source[1])
    shrink = (thumb.height / plan.image_hw[0], thumb.width / plan.image_hw[1])
    # the part of the thumbnail, and where it goes in the view
    y0, x0, y1, x1 = (
        (source[i % 2] + (edge - canvas.offset[i % 2]) * lengths[i % 2] / canvas.content_hw[i % 2]) * shrink[i % 2]
        for i, edge in enumerate(inside)
    )
    scale = (size[1] / (box[2] - box[0]), size[0] / (box[3] - box[1]))
    to = [round((edge - box[i % 2]) * scale[i % 2]) for i, edge in enumerate(inside)]
    wide, tall = to[3] - to[1], to[2] - to[0]
    if wide > 0 and tall > 0:
        start = (min(max(x0, 0), thumb.width), min(max(y0, 0), thumb.height))
        part = (*start, min(x1, thumb.width), min(y1, thumb.height))
        picture.paste(thumb.resize((wide, tall), Image.Resampling.BILINEAR, box=part), (to[1], to[0]))
    return picture


def _hatched(size: tuple[int, int]) -> Image.Image:
    picture = Image.new("RGB", size, (238, 239, 242))
    pen = ImageDraw.Draw(picture)
    for start in range(-size[1], size[0], 7):
        pen.line((start, size[1], start + size[1], 0), (176, 181, 191), 1)
    return picture
