"""What the page shows of every rule; how it looks is in page.html beside this file."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from uhd import charts
from uhd.writing import write_text

from .pictures import SIDE, cut_picture, thumbnail, views_picture
from .report import Comparison, Curve, Entry, curves_over_aspect, curves_over_size, pareto
from .scripted import filled

_SIDES = charts.Axis(
    64, 4096, ((64, "64"), (256, "256"), (1024, "1024"), (4096, "4096")), True, "tokens over the longer side, px"
)
_RATIOS = ((1 / 8, "1:8"), (1 / 2, "1:2"), (1.0, "1:1"), (2.0, "2:1"), (8.0, "8:1"))
_ASPECTS = charts.Axis(1 / 8, 8, _RATIOS, True, "tokens over width : height, same area")


def html_page(comparisons: Sequence[Comparison]) -> str:
    """Draw one self-contained HTML page: per image a chart, a table, and a card for every rule with the drawn cut.

    Pictures are data URIs and inline SVG, there is no script, and the page's own policy forbids any request.

    >>> from uhd.compare import compare
    >>> html_page([compare((672, 1008), ["llava-uhd", "siglip"])]).splitlines()[0]
    '<!doctype html>'

    Raises:
        ValueError: Nothing to show.
    """
    if not comparisons:
        raise ValueError("nothing to compare: give at least one image or size")
    sections = [_section(comparison, number) for number, comparison in enumerate(comparisons)]
    return filled("page.html", sections=sections, jpeg=jpeg)


def write_page(path: str | Path, comparisons: Sequence[Comparison]) -> None:
    """Write :func:`html_page` to a file; errors as there and in :func:`uhd.writing.new_file`."""
    write_text(path, html_page(comparisons))


def _section(comparison: Comparison, number: int) -> dict[str, Any]:
    """What the template shows of one image. Charts are SVG text, pictures are Pillow's."""
    planned = comparison.planned
    section = {
        "name": comparison.name,
        "image_hw": comparison.image_hw,
        "planned": planned,
        "refused": [entry for entry in comparison.entries if entry.plan is None],
        "front": pareto(planned),
        "most_tokens": max((entry.metrics.tokens for entry in planned), default=0) or 1,
    }
    if len(planned) > 1:
        section |= {"scatter": _scatter(planned, section["front"]), "curves": _large_curves(comparison)}
    if planned:
        section |= _small_curves(comparison, number)
        thumb = thumbnail(comparison)
        section["pictures"] = {entry.name: _pictures(entry, thumb) for entry in planned}
    return section


def _scatter(planned: Sequence[Entry], front: set[str]) -> str:
    points = [
        charts.Point(max(e.metrics.tokens, 1), e.metrics.resolution_kept, e.name, e.name in front) for e in planned
    ]
    ends = (min(p.x for p in points) / 1.1, max(p.x for p in points) * 1.1)
    axis = charts.log_axis(ends, "tokens for the language model (log)")
    return charts.scatter(points, axis, charts.percent_axis("resolution kept"), width=1100, height=400)


def _large_curves(comparison: Comparison) -> str:
    if len(comparison.planned) > len(charts.COLORS):  # too many to tell apart
        return ""
    lines = curves_over_size([(e.name, e.rule) for e in comparison.planned], comparison.image_hw, 61)
    return charts.curves(lines, _SIDES, _token_axis(lines.values()), width=1100)


def _small_curves(comparison: Comparison, number: int) -> dict[str, Any]:
    """Every rule's tokens over size and over aspect, and the gray lines behind them, which are drawn once."""
    height, width = comparison.image_hw
    rules = [(e.name, e.rule) for e in comparison.planned]
    kinds = (
        (f"size-{number}", _SIDES, max(height, width), curves_over_size(rules, comparison.image_hw)),
        (f"aspect-{number}", _ASPECTS, width / height, curves_over_aspect(rules, comparison.image_hw)),
    )
    y = _token_axis(line for *_, lines in kinds for line in lines.values())
    drawn: dict[str, list[str]] = {e.name: [] for e in comparison.planned}
    for e in comparison.planned:
        tokens = max(e.plan.num_tokens, 1)
        for name, x, here, lines in kinds:
            drawn[e.name].append(charts.small_curve(lines[e.name], x, y, behind=name, here=(here, tokens)))
    backdrops = [charts.backdrop(lines, x, y, name=name) for name, x, _, lines in kinds]
    return {"backdrops": backdrops, "small_curves": drawn}


def _token_axis(lines: Iterable[Curve]) -> charts.Axis:
    return charts.log_axis([tokens for line in lines for _, tokens in line if not math.isnan(tokens)], "tokens")


def _pictures(entry: Entry, thumb: Image.Image) -> list[tuple[str, Image.Image]]:
    """The drawings of a rule's card, each with its caption."""
    plan = entry.plan
    pictures = [("the image", cut_picture(thumb, plan))]
    slices = [view.size_hw for view in plan.views if view.kind == "slice"]
    if slices:
        size = " of {1} x {0} px".format(*plan.slice_hw) if len(set(slices)) == 1 else ""
        caption = f"{len(slices)} slice{'s' * (len(slices) != 1)}{size}"
        pictures.append((caption, views_picture(thumb, plan, "slice", SIDE)))
    if any(view.kind == "overview" for view in plan.views):
        caption = ("overview" if slices else "one view") + ", {1} x {0} px".format(*plan.overview_hw)
        pictures.append((caption, views_picture(thumb, plan, "overview", SIDE // 2 if slices else SIDE)))
    return pictures


def jpeg(picture: Image.Image, quality: int = 82) -> str:
    """Return a picture as a data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
