"""A plan drawn over its image: grid, order, sizes, overview, score and the token string, for a person to look at."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from itertools import count, product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from uhd.pixels import DEFAULT, PixelSettings, load_image, render
from uhd.schema import SpatialSchema, layout
from uhd.slicing import SlicePlan, View, grid_score, view_box
from uhd.slicing.borders import even_borders, moved_borders
from uhd.writing import new_file

Color = tuple[int, int, int]

INK, PAPER, FAINT, _EDGE = (28, 32, 40), (255, 255, 255), (110, 116, 128), (205, 208, 214)
SLICE, OVERVIEW = (214, 64, 40), (24, 104, 196)
_IMAGE_SIDE = 720  # px of the drawn image's longer side
_PANEL_WIDTH = 780  # px for the views beside it
_VIEW_SIDE = 230  # px of the longest side of a view
_MIN_WIDTH = 1080  # px of the page
_MARGIN, _GAP, _CAPTION = 24, 14, 22


def draw_plan(
    image: Any, plan: SlicePlan, *, schema: SpatialSchema | None = None, settings: PixelSettings = DEFAULT
) -> Image.Image:
    """Draw what a plan does to an image, in one picture.

    Left: the image with every slice outlined and named in feeding order; where borders were moved, dashes show where
    they were. Right: the views as the encoder sees them, in their grid. Above: sizes, score and counts. Below: the
    token string. Sizes read width x height.

    >>> from uhd.slicing import plan
    >>> draw_plan(np.zeros((336, 672, 3), np.uint8), plan((336, 672))).width >= 1080
    True

    Args:
        image: Anything :func:`uhd.pixels.load_image` takes.
        plan: The image's plan.
        schema: How tokens are laid out. The default is :func:`uhd.schema.layout`'s where it counts what the plan does;
            else the features of each view are listed.
        settings: Background of transparent images and the resize filter.

    Raises:
        ValueError: The image has another size than the plan's, or its tokens cannot be laid out.
    """
    image = load_image(image, settings=settings)
    names = view_names(plan)
    views = render(image, plan, settings=settings)  # checks that it is the planned image
    left = _image_panel(image, plan, names)
    right = _views_panel(views, plan, names, height=left.height)
    width = max(left.width + right.width + 3 * _MARGIN, _MIN_WIDTH)
    head = paragraphs(_facts(plan), width - 2 * _MARGIN, size=20, color=INK)
    foot = paragraphs(_token_lines(plan, schema, names), width - 2 * _MARGIN, size=17, color=FAINT)
    body = head.height + 2 * _MARGIN
    page = Image.new("RGB", (width, body + max(left.height, right.height) + foot.height + 2 * _MARGIN), PAPER)
    page.paste(head, (_MARGIN, _MARGIN))
    page.paste(left, (_MARGIN, body))
    page.paste(right, (left.width + 2 * _MARGIN, body))
    page.paste(foot, (_MARGIN, page.height - foot.height - _MARGIN))
    return page


def view_names(plan: SlicePlan) -> list[str]:
    """What drawings call the views: s0, s1, ... for slices, and overview."""
    slices = count()
    return [f"s{next(slices)}" if view.kind == "slice" else "overview" for view in plan.views]


def picture_file(path: Path, picture: Image.Image, note: str = "") -> bytes:
    """Return a picture in the format that a file's ending names, with a note where that is PNG.

    Raises:
        ValueError: The ending names no format, or one that Pillow cannot write this picture in.
    """
    info, file = PngInfo(), io.BytesIO()
    if note:
        info.add_text("note", note)
    kind = Image.registered_extensions().get(path.suffix.lower())
    try:
        if kind not in Image.SAVE:
            raise ValueError("its ending names no picture format that is written here, as .png does")
        picture.save(file, kind, pnginfo=info)
    except Exception as problem:  # what a format's writer raises is its own
        raise ValueError(f"cannot write {path}: {problem}") from problem
    return file.getvalue()


def write_picture(path: Path, picture: Image.Image, *, note: str = "") -> None:
    """Write :func:`picture_file` by :func:`uhd.writing.new_file`; errors as of both."""
    content = picture_file(path, picture, note)
    with new_file(path) as new:
        new.write_bytes(content)


def _token_lines(plan: SlicePlan, schema: SpatialSchema | None, names: Sequence[str]) -> list[str]:
    laid = layout(plan, schema) if schema is not None or plan.tokens_by_view else None
    if laid is not None and (schema is not None or laid.num_tokens == plan.num_tokens):
        # a line break that the language model reads is written out, and breaks the line
        tokens = laid.text().replace("\n", "\\n\n").splitlines()
        return [f"{laid.num_tokens} positions, each view as [name:tokens]:", *tokens]
    views = "".join(f"[{name}:{view.num_tokens}]" for name, view in zip(names, plan.views, strict=True))
    lines = [f"{plan.num_tokens} positions from the views' features, each as [name:features]:", views]
    final_hw = plan.packing.final_hw if plan.packing else None
    if final_hw is not None:
        newlines = ", each row followed by a newline" if plan.packing.newline else ""
        lines.append("slices joined to {} x {} (rows x columns) features".format(*final_hw) + newlines)
    return lines


def _facts(plan: SlicePlan) -> list[str]:
    title = f"{plan.strategy}:  {_wide(plan.image_hw)} px (width x height)"
    sizes = []
    if plan.grid and plan.slice_hw:
        title += ",  cut {} x {} (rows x columns)".format(*plan.grid)
        title += f",  score {grid_score(plan.image_hw, plan.grid):.3f} (0 is perfect)"
        sizes.append(f"slices {_wide(plan.slice_hw)} px{' and others' if moved_borders(plan) else ''}")
    else:
        title += ",  not cut"
    if plan.overview_hw:
        sizes.append(f"overview {_wide(plan.overview_hw)} px")
    counts = (
        f"{plan.num_views} view{'s' * (plan.num_views > 1)}, {plan.num_patches} patches, "
        f"{plan.num_visual_tokens} visual tokens + {plan.num_separators} separators = {plan.num_tokens}"
    )
    return [title, f"{', '.join(sizes)};  {counts}"]


def _wide(size_hw: tuple[int, int]) -> str:
    return f"{size_hw[1]} x {size_hw[0]}"


def _image_panel(image: Image.Image, plan: SlicePlan, names: Sequence[str]) -> Image.Image:
    scale = _IMAGE_SIDE / max(image.size)
    size = tuple(max(round(side * scale), 1) for side in image.size)
    panel = image.resize(size, Image.Resampling.BICUBIC if scale < 1 else Image.Resampling.NEAREST)
    # room for labels beside images that are only a few pixels wide
    canvas = Image.new("RGB", (max(size[0], 150), max(size[1], 60)), (236, 238, 242))
    canvas.paste(panel)
    pen = ImageDraw.Draw(canvas)
    _draw_even_borders(pen, plan, scale, size)
    for view, name in zip(plan.views, names, strict=True):
        if view.kind == "overview" and plan.grid is not None:
            continue  # it is the whole image
        top, left, bottom, right = (float(edge) * scale for edge in view_box(plan, view.index))
        color = SLICE if view.kind == "slice" else OVERVIEW
        corner = (max(left, 0), max(top, 0))
        end = (max(min(right, size[0]) - 1, corner[0]), max(min(bottom, size[1]) - 1, corner[1]))
        pen.rectangle((*corner, *end), None, color, 3)
        room = min(max(right - left, 48), max(bottom - top, 30))
        if room < 24:
            continue
        text = name if view.kind == "slice" else "overview only"
        enlarged = scale > 4  # a large label would hide what such an image shows
        size_px, away = int(min(13 if enlarged else 24, room / 3)), 5 if enlarged else 8
        _label(pen, (corner[0] + away, corner[1] + away), text, color, max(size_px, 9))
        if view.kind == "slice" and right - left > 110 and bottom - top > 70 and not enlarged:
            _label(pen, (corner[0] + 8, corner[1] + 42), f"{_wide(view.size_hw)} px", color, 14)
    return canvas


def _draw_even_borders(pen: ImageDraw.ImageDraw, plan: SlicePlan, scale: float, size: tuple[int, ...]) -> None:
    """Dash where borders would be that were moved."""
    if not moved_borders(plan):
        return
    for axis, places in enumerate(even_borders(plan)):
        for place, start in product(places, range(0, size[axis], 12)):
            line = [(start, place * scale), (start + 6, place * scale)]
            pen.line(line if axis == 0 else [end[::-1] for end in line], OVERVIEW, 2)


def _label(pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, color: Color, size: int) -> None:
    font = letters(size)
    left, top, right, bottom = pen.textbbox(place, text, font=font)
    pen.rectangle((left - 5, top - 4, right + 5, bottom + 4), fill=color)
    pen.text(place, text, fill=PAPER, font=font)


def _views_panel(pixels: Sequence[np.ndarray], plan: SlicePlan, names: Sequence[str], *, height: int) -> Image.Image:
    """Draw the slices in their grid, and the overview beside a tall grid or below a wide one."""
    shown = list(zip(plan.views, pixels, names, strict=True))
    slices = [item for item in shown if item[0].kind == "slice"]
    others = [item for item in shown if item[0].kind != "slice"]
    if not slices or not others:
        return _grid_panel(shown, plan, _PANEL_WIDTH, height)
    first = _grid_panel(slices, plan, _PANEL_WIDTH, max(height - _VIEW_SIDE // 2, 240))
    second = _grid_panel(others, plan, _PANEL_WIDTH, _VIEW_SIDE + _CAPTION)
    beside = first.height > first.width and first.width + second.width + _GAP <= _PANEL_WIDTH
    place = (first.width + 2 * _GAP, 0) if beside else (0, first.height + _GAP)
    size = max(first.width, place[0] + second.width), max(first.height, place[1] + second.height)
    panel = Image.new("RGB", size, PAPER)
    panel.paste(first, (0, 0))
    panel.paste(second, place)
    return panel


def _grid_panel(
    items: Sequence[tuple[View, np.ndarray, str]], plan: SlicePlan, width: int, height: int
) -> Image.Image:
    """Draw views in rows and columns at one scale, captioned where there is room."""
    full_grid = plan.grid and len(items) == math.prod(plan.grid)
    cols = plan.grid[1] if full_grid else math.ceil(math.sqrt(len(items)))
    rows = math.ceil(len(items) / cols)
    tallest = max(view.size_hw[0] for view, _, _ in items)
    widest = max(view.size_hw[1] for view, _, _ in items)
    roomy = width / cols >= 72  # px a column
    gap, caption = (_GAP, _CAPTION) if roomy else (3, 0)
    scale = min(
        _VIEW_SIDE / max(tallest, widest),
        (width - (cols - 1) * gap) / cols / widest,
        max(height - rows * (caption + gap), rows * 12) / rows / tallest,
    )
    cell_w, cell_h = max(round(widest * scale), 58 if caption else 2), max(round(tallest * scale), 2)
    panel = Image.new("RGB", (max(cols * (cell_w + gap) - gap, 170), rows * (cell_h + caption + gap)), PAPER)
    pen = ImageDraw.Draw(panel)
    for place, (view, array, name) in enumerate(items):
        row, col = divmod(place, cols)
        x, y = col * (cell_w + gap), row * (cell_h + caption + gap)
        size = (max(round(view.size_hw[1] * scale), 1), max(round(view.size_hw[0] * scale), 1))
        panel.paste(Image.fromarray(array).resize(size, Image.Resampling.BICUBIC), (x, y + caption))
        pen.rectangle((x, y + caption, x + size[0] - 1, y + caption + size[1] - 1), outline=_EDGE)
        if caption:
            pen.text((x, y), name, fill=SLICE if view.kind == "slice" else OVERVIEW, font=letters(15))
            patches = f"{_wide(view.patches_hw)} patches"
            start = x + letters(15).getlength(name) + 8
            if start + letters(12).getlength(patches) <= x + (cell_w if cols > 1 else max(cell_w, 170)):
                pen.text((start, y + 2), patches, fill=FAINT, font=letters(12))
    return panel


def paragraphs(lines: Sequence[str], width: int, *, size: int, color: Color) -> Image.Image:
    """Lines of text in a picture of this width, broken where they are longer."""
    font = letters(size)
    per_line = max(int(width / font.getlength("etaoin shrdlu") * 13), 20)  # the average letter
    wrapped = [part for line in lines for part in textwrap.wrap(line, per_line) or [""]]
    block = Image.new("RGB", (width, len(wrapped) * (size + 8)), PAPER)
    pen = ImageDraw.Draw(block)
    for number, line in enumerate(wrapped):
        pen.text((0, number * (size + 8)), line, fill=color, font=font)
    return block


def letters(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """The font of all drawings."""
    return ImageFont.load_default(size)
