"""A plan drawn over its image: grid, order, sizes, overview, score and the token string, for a person to look at."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from uhd.pixels import PixelSettings, load_image, render
from uhd.schema import SpatialSchema, layout
from uhd.slicing import SlicePlan, grid_score, view_box

if TYPE_CHECKING:
    from collections.abc import Sequence

_INK, _PAPER, _FAINT, _EDGE = (28, 32, 40), (255, 255, 255), (110, 116, 128), (205, 208, 214)
_SLICE, _OVERVIEW = (214, 64, 40), (24, 104, 196)
_LARGEST = 720  # px of the drawn image's longer side
_MARGIN = 24


def draw_plan(
    image: Any,
    plan: SlicePlan,
    *,
    schema: SpatialSchema | None = None,
    settings: PixelSettings | None = None,
) -> Image.Image:
    """One picture of what a plan does to an image.

    Left: the image with every slice outlined, named and numbered in feeding order. Right: the views as the encoder
    sees them, at one common scale. Above: sizes, score and counts. Below: the token string.

    Args:
        image: Anything :func:`uhd.pixels.load_image` takes.
        plan: The image's plan.
        schema: How tokens are laid out; the default is :func:`uhd.schema.layout`'s.
        settings: Background of transparent images and the resize filter.

    Returns:
        An RGB picture, at most about 1600 px wide.
    """
    settings = settings or PixelSettings()
    image = load_image(image, settings=settings)
    laid = layout(plan, schema)
    views = render(image, plan, settings=settings)  # checks that it is the planned image
    left = _image_panel(image, plan)
    right = _views_panel(views, plan, height=left.height)
    width = max(left.width + right.width + 3 * _MARGIN, 1080)
    head = _paragraphs(_facts(plan), width - 2 * _MARGIN, size=20, color=_INK)
    # a line break that the language model reads is written out, and breaks the line
    tokens = laid.text().replace("\n", "\\n\n").splitlines()
    foot = _paragraphs([f"{laid.num_tokens} positions:", *tokens], width - 2 * _MARGIN, size=17, color=_FAINT)
    body_top = head.height + 2 * _MARGIN
    page = Image.new("RGB", (width, body_top + max(left.height, right.height) + foot.height + 2 * _MARGIN), _PAPER)
    page.paste(head, (_MARGIN, _MARGIN))
    page.paste(left, (_MARGIN, body_top))
    page.paste(right, (left.width + 2 * _MARGIN, body_top))
    page.paste(foot, (_MARGIN, page.height - foot.height - _MARGIN))
    return page


def _facts(plan: SlicePlan) -> list[str]:
    height, width = plan.image_hw
    lines = [f"{plan.strategy}:  {width} x {height} px (width x height)"]
    if plan.grid:
        rows, cols = plan.grid
        slice_h, slice_w = plan.slice_hw
        score = grid_score(plan.image_hw, plan.grid)
        lines[0] += f",  cut {rows} x {cols} (rows x columns, score {score:.3f}; 0 is perfect)"
        lines.append(f"slices {slice_w} x {slice_h} px")
    else:
        lines[0] += ",  not cut"
        lines.append("")
    if plan.overview_hw:
        lines[-1] += f"{', ' if plan.grid else ''}overview {plan.overview_hw[1]} x {plan.overview_hw[0]} px"
    lines[-1] += (
        f";  {plan.num_views} views, {plan.num_patches} patches, {plan.num_visual_tokens} visual tokens"
        f" + {plan.num_separators} separators = {plan.num_tokens}"
    )
    return lines


def _image_panel(image: Image.Image, plan: SlicePlan) -> Image.Image:
    scale = _LARGEST / max(image.size)
    size = tuple(max(round(side * scale), 1) for side in image.size)
    panel = image.resize(size, Image.Resampling.BICUBIC if scale < 1 else Image.Resampling.NEAREST)
    # room for labels beside images that are only a few pixels wide
    panel_size = (max(size[0], 150), max(size[1], 60))
    canvas = Image.new("RGB", panel_size, (236, 238, 242))
    canvas.paste(panel)
    pen = ImageDraw.Draw(canvas)
    for view in plan.views:
        top, left, bottom, right = (float(edge) * scale for edge in view_box(plan, view.index))
        box = (left, top, min(right, size[0]) - 1, min(bottom, size[1]) - 1)
        if view.kind == "slice":
            pen.rectangle([max(edge, 0) for edge in box], outline=_SLICE, width=3)
            cell = f"{view.size_hw[1]}x{view.size_hw[0]}"
            _label(pen, (left + 8, top + 8), f"s{_slice_number(plan, view.index)}", _SLICE, 24)
            if right - left > 110 and bottom - top > 70:
                _label(pen, (left + 8, top + 40), f"{cell} px", _SLICE, 14)
        elif plan.grid is None:
            pen.rectangle([max(edge, 0) for edge in box], outline=_OVERVIEW, width=3)
            _label(pen, (left + 8, top + 8), "overview only", _OVERVIEW, 18)
    return canvas


def _slice_number(plan: SlicePlan, index: int) -> int:
    return sum(view.kind == "slice" for view in plan.views[:index])


def _views_panel(views: Sequence[Any], plan: SlicePlan, *, height: int) -> Image.Image:
    """All views at one scale, wrapped into rows, each with its name and size."""
    gap, text = 14, 22
    side = max(max(view.size_hw) for view in plan.views)
    for shown in (230, 180, 140, 110, 84, 64):
        panel = _flow(views, plan, shown / side, gap, text)
        if panel.height <= max(height, 260):
            break
    return panel


def _flow(views: Sequence[Any], plan: SlicePlan, scale: float, gap: int, text: int) -> Image.Image:
    width, x, y, row = 780, 0, 0, 0
    placed = []
    for view, pixels in zip(plan.views, views, strict=True):
        size = (max(round(view.size_hw[1] * scale), 2), max(round(view.size_hw[0] * scale), 2))
        cell_w = max(size[0], 168)
        if x and (view.col == 0 or x + cell_w > width):
            x, y, row = 0, y + row + text + gap, 0
        placed.append((view, Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC), x, y))
        x, row = x + cell_w + gap, max(row, size[1])
    right = max(left + max(picture.width, 168) for _, picture, left, _ in placed)
    panel = Image.new("RGB", (right, y + row + text), _PAPER)
    pen = ImageDraw.Draw(panel)
    for view, picture, x, y in placed:
        panel.paste(picture, (x, y + text))
        pen.rectangle((x, y + text, x + picture.width - 1, y + text + picture.height - 1), outline=_EDGE)
        name = f"s{_slice_number(plan, view.index)}" if view.kind == "slice" else "overview"
        color = _SLICE if view.kind == "slice" else _OVERVIEW
        pen.text((x, y), name, fill=color, font=_font(15))
        patches = f"{view.patches_hw[0]}x{view.patches_hw[1]} patches"
        pen.text((x + _font(15).getlength(name) + 8, y + 2), patches, fill=_FAINT, font=_font(12))
    return panel


def _label(pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, color: tuple, size: int) -> None:
    """White on colour, readable over any photo."""
    font = _font(size)
    left, top, right, bottom = pen.textbbox(place, text, font=font)
    pen.rectangle((left - 5, top - 4, right + 5, bottom + 4), fill=color)
    pen.text(place, text, fill=_PAPER, font=font)


def _paragraphs(lines: Sequence[str], width: int, *, size: int, color: tuple) -> Image.Image:
    font = _font(size)
    per_line = max(int(width / font.getlength("etaoin shrdlu") * 13), 20)
    wrapped = [part for line in lines for part in textwrap.wrap(line, per_line) or [""]]
    block = Image.new("RGB", (width, max(len(wrapped), 1) * (size + 8)), _PAPER)
    pen = ImageDraw.Draw(block)
    for number, line in enumerate(wrapped):
        pen.text((0, number * (size + 8)), line, fill=color, font=font)
    return block


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
