"""Slicing rules side by side on one's own images: a table, plain data, and one HTML page with nothing outside it."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from uhd import charts
from uhd.pixels import load_image
from uhd.slicing import PRESETS, SlicePlan, SlicingLike, find, plan, view_box
from uhd.slicing.flops import LMS, RESAMPLERS, VITS, named
from uhd.slicing.metrics import PlanMetrics, measure
from uhd.slicing.plan import MAX_SIDE, Canvas, check_size
from uhd.slicing.strategies import STRATEGIES

Curve = list[tuple[float, float]]

_PICTURE = 196  # px of the longer side of a drawn cut; three pictures stand in a row
_THUMB = 640  # px of the longer side of what pictures are made from
_MOST_DRAWN = 400  # views of one plan
_CUT, _TWICE, _UNSEEN = (214, 64, 40), (255, 176, 32, 110), (20, 24, 32, 170)


@dataclass(frozen=True)
class Entry:
    """One rule on one image: a plan with its metrics, or the error with which the rule refused the size."""

    name: str
    rule: Any
    plan: SlicePlan | None
    metrics: PlanMetrics | None
    error: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Every rule on one image. ``name`` is what the user called it; ``image`` the picture, where there is one."""

    name: str
    image_hw: tuple[int, int]
    entries: tuple[Entry, ...]
    image: Image.Image | None = None

    @property
    def planned(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.plan is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without the pictures."""
        return {"input": self.name, "image_hw": list(self.image_hw), "strategies": [_record(e) for e in self.entries]}


def all_rules() -> list[str]:
    """Every rule's full name, aliases left out."""
    return [*PRESETS, *STRATEGIES]


def compare(
    image_hw: tuple[int, int],
    rules: Iterable[SlicingLike] | None = None,
    *,
    name: str | None = None,
    image: Image.Image | None = None,
    budget: int | None = None,
    **system: Any,
) -> Comparison:
    """Plan and measure one image by many rules.

    Args:
        image_hw: (height, width), px.
        rules: Names, configs, or your own functions; ``None`` is every rule, cheapest in tokens first. Of equal names
            the second becomes ``"name (2)"``.
        name: What to call the image.
        image: The picture itself, for :func:`html_page`.
        budget: Tokens an image should cost at most; every metric's ``budget_error`` is relative to it.
        system: ``vit``, ``resampler`` and ``lm`` of :func:`uhd.slicing.metrics.measure`.

    Raises:
        ValueError: An unknown name, no rules, or a size that is not two whole numbers of px. A rule that refuses this
            size is an entry with its error, not an exception.
        TypeError: ``rules`` is one name rather than a list.
    """
    if isinstance(rules, str):
        raise TypeError(f"rules are a list of rules, got the string {rules!r}: write [{rules!r}]")
    chosen = all_rules() if rules is None else list(rules)
    if not chosen:
        raise ValueError("no rules to compare: name at least one, or leave them out for all")
    image_hw = check_size(image_hw)
    found = _distinct(_entry(image_hw, rule, budget, system) for rule in chosen)
    if rules is None:
        found.sort(key=lambda e: (e.plan is None, e.plan.num_tokens if e.plan else 0))
    return Comparison(name or "{1}x{0}".format(*image_hw), image_hw, tuple(found), image)


def _entry(image_hw: tuple[int, int], rule: SlicingLike, budget: int | None, system: Mapping[str, Any]) -> Entry:
    config = find(rule)  # an unknown name is the caller's mistake, and raises
    name = rule if isinstance(rule, str) else config.name
    try:
        planned = plan(image_hw, config)
    except ValueError as problem:
        return Entry(name, config, None, None, str(problem))
    return Entry(name, config, planned, measure(planned, budget=budget, **system))


def _distinct(entries: Iterable[Entry]) -> list[Entry]:
    """The same with a number behind names that come again: curves, anchors and the front go by name."""
    found: dict[str, Entry] = {}
    for entry in entries:
        name = next(
            n for n in (entry.name, *(f"{entry.name} ({i})" for i in range(2, len(found) + 2))) if n not in found
        )
        found[name] = replace(entry, name=name)
    return list(found.values())


def _record(entry: Entry) -> dict[str, Any]:
    if entry.plan is None:
        return {"strategy": entry.name, "error": entry.error}
    found = entry.plan
    return {
        "strategy": entry.name,
        "grid": found.grid,
        "slice_hw": found.slice_hw,
        "overview_hw": found.overview_hw,
        "num_tokens": found.num_tokens,
        "metrics": entry.metrics.to_dict(),
    }


def pareto(entries: Sequence[Entry]) -> set[str]:
    """Names of rules that no other one beats: none keeps more resolution for as few tokens, or as much for fewer."""
    points = [(e.metrics.tokens, e.metrics.resolution_kept, e.name) for e in entries if e.metrics]
    best, front = -1.0, set()
    for _, kept, name in sorted(points, key=lambda point: (point[0], -point[1])):
        if round(kept, 9) > best:
            best = round(kept, 9)
            front.add(name)
    return front


_COLUMNS = ("strategy", "grid", "views", "tokens", "kept", "stretch", "padding", "seen", "seam", "patches", "TFLOPs")


def table(comparison: Comparison) -> str:
    """The comparison as lines of text for a terminal; rules that refused the size come last, with their reason."""
    budget = any(e.metrics.budget_error is not None for e in comparison.planned)
    rows = [(*_COLUMNS, "budget") if budget else _COLUMNS]
    front = pareto(comparison.planned)
    for entry in comparison.planned:
        m, grid = entry.metrics, entry.plan.grid
        row = (
            ("* " if entry.name in front else "  ") + entry.name,
            "{}x{}".format(*grid) if grid else "-",
            str(m.views),
            str(m.tokens),
            f"{100 * m.resolution_kept:.0f}%",
            f"{m.distortion:.2f}",
            f"{100 * m.padding:.0f}%",
            f"{m.duplication:.2f}",
            f"{m.seam:.1f}",
            str(m.patches),
            f"{m.flops.total / 1e12:.1f}",
        )
        rows.append((*row, f"{m.budget_error:.2f}") if budget else row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    height, width = comparison.image_hw
    title = f"{comparison.name}: {width}x{height} px (width x height)"
    notes = [
        "kept: share of the image's px that reach the encoder; stretch: 1 keeps the aspect; seen: how often each px "
        "is in a slice, on average",
        "* no other rule keeps more for as few tokens; TFLOPs: one reference system for all (CLIP-L, MLP, 13B LM) "
        "unless told otherwise",
    ]
    refused = [f"  {e.name}: {e.error}" for e in comparison.entries if e.plan is None]
    return "\n".join([title, *lines, *notes, *(["refused:", *refused] if refused else [])])


# --- curves

_SIDES = charts.Axis(
    64, 4096, ((64, "64"), (256, "256"), (1024, "1024"), (4096, "4096")), True, "tokens over the longer side, px"
)
_RATIOS = ((1 / 8, "1:8"), (1 / 2, "1:2"), (1.0, "1:1"), (2.0, "2:1"), (8.0, "8:1"))
_ASPECTS = charts.Axis(1 / 8, 8, _RATIOS, True, "tokens over width : height, same area")


def curves_over_size(
    rules: Iterable[tuple[str, Any]], image_hw: tuple[int, int], points: int = 25
) -> dict[str, Curve]:
    """Tokens over the longer side, 64 to 4096 px, at the image's aspect; ``nan`` where a rule refuses."""
    longest = max(image_hw)
    sides = [round(64 * 64 ** (i / (points - 1))) for i in range(points)]
    sizes = [tuple(max(round(length * side / longest), 1) for length in image_hw) for side in sides]
    return {name: _tokens(rule, sizes, sides) for name, rule in rules}


def curves_over_aspect(
    rules: Iterable[tuple[str, Any]], image_hw: tuple[int, int], points: int = 25
) -> dict[str, Curve]:
    """Tokens over width / height, 1/8 to 8, at the image's area; ``nan`` where a rule refuses."""
    area = image_hw[0] * image_hw[1]
    aspects = [8 ** (2 * i / (points - 1) - 1) for i in range(points)]
    sizes = [
        tuple(min(max(round(side), 1), MAX_SIDE) for side in (math.sqrt(area / a), math.sqrt(area * a)))
        for a in aspects
    ]
    return {name: _tokens(rule, sizes, aspects) for name, rule in rules}


def _tokens(rule: Any, sizes_hw: Sequence[tuple[int, int]], xs: Sequence[float]) -> Curve:
    line = []
    for size, x in zip(sizes_hw, xs, strict=True):
        try:
            line.append((x, float(max(plan(size, rule).num_tokens, 1))))  # the axis is logarithmic
        except ValueError:
            line.append((x, math.nan))
    return line


# --- the page


def html_page(comparisons: Sequence[Comparison]) -> str:
    """One self-contained HTML page: per image a chart, a table, and a card for every rule with the drawn cut.

    Pictures are data URIs and inline SVG, there is no script, and the page's own policy forbids any request.

    Raises:
        ValueError: Nothing to show.
    """
    if not comparisons:
        raise ValueError("nothing to compare: give at least one image or size")
    body = "".join(_section(comparison, number) for number, comparison in enumerate(comparisons))
    names = ", ".join(escape(c.name) for c in comparisons)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>How slicing rules see {names}</title><style>{_STYLE}</style></head><body>{body}"
        f"<footer>{_GLOSSARY}</footer></body></html>"
    )


def write_page(path: str | Path, comparisons: Sequence[Comparison]) -> None:
    """:func:`html_page` to a file.

    Raises:
        ValueError: Nothing to show.
        OSError: The file cannot be written.
    """
    Path(path).write_text(html_page(comparisons), encoding="utf-8")


def _section(comparison: Comparison, number: int) -> str:
    planned, (height, width) = comparison.planned, comparison.image_hw
    front = pareto(planned)
    thumb = _thumbnail(comparison)
    refused = "".join(
        f"<li><b>{escape(e.name)}</b>: {escape(e.error or '')}</li>" for e in comparison.entries if e.plan is None
    )
    head = (
        f"<h1>How {len(planned)} slicing rule{'s' * (len(planned) != 1)} see{'s' * (len(planned) == 1)} "
        f"{escape(comparison.name)}</h1>"
        f'<p class="lead">{width} x {height} px (width x height). A vision encoder takes small pictures, so a rule '
        "shrinks, stretches, pads or cuts the image first. More <b>tokens</b> cost the language model more; more "
        "<b>resolution kept</b> means that smaller print stays readable.</p>"
    )
    parts = [head]
    if len(planned) > 1:
        parts += [_chart(planned, front), _table(planned, front, number), _big_curves(comparison)]
    if planned:
        parts.append(_cards(comparison, thumb, front, number))
    if refused:
        parts.append(f"<h2>Refused this size</h2><ul>{refused}</ul>")
    return f"<section>{''.join(parts)}</section>"


def _chart(planned: Sequence[Entry], front: set[str]) -> str:
    points = [
        charts.Point(max(e.metrics.tokens, 1), e.metrics.resolution_kept, e.name, e.name in front) for e in planned
    ]
    ends = (min(p.x for p in points) / 1.1, max(p.x for p in points) * 1.1)
    axis = charts.log_axis(ends, "tokens for the language model (log)")
    drawn = charts.scatter(points, axis, charts.percent_axis("resolution kept"), width=1100, height=400)
    return (
        "<h2>Resolution kept against tokens</h2><p>Up and to the left is better. In red: the rules that no other one "
        f"beats on this image. Hover a point for its name.</p>{drawn}"
    )


def _table(planned: Sequence[Entry], front: set[str], number: int) -> str:
    most = max(e.metrics.tokens for e in planned)
    rows = []
    for entry in planned:
        m, grid = entry.metrics, entry.plan.grid
        mark = ' class="front"' if entry.name in front else ""
        rows.append(
            f'<tr{mark}><td><a href="#{_anchor(entry, number)}">{escape(entry.name)}</a></td>'
            f"<td>{'{} x {}'.format(*grid) if grid else '&ndash;'}</td><td>{m.views}</td>"
            f"<td>{_bar(m.tokens / most if most else 0, str(m.tokens))}</td>"
            f"<td>{_bar(m.resolution_kept, f'{100 * m.resolution_kept:.0f}%')}</td>"
            f"<td>{m.distortion:.2f}</td><td>{100 * m.padding:.0f}%</td><td>{m.upsampling:.2f}</td>"
            f"<td>{m.duplication:.2f}</td><td>{m.seam:.1f}</td><td>{m.patches}</td>"
            f"<td>{m.flops.encoder / 1e12:.2f}</td><td>{m.flops.lm / 1e12:.1f}</td></tr>"
        )
    head = "".join(
        f'<th title="{escape(why)}">{name}</th>'
        for name, why in (
            ("rule", "click for the drawing"),
            ("grid", "rows x columns of slices"),
            ("views", "pictures that the encoder sees"),
            ("tokens", "positions in the language model"),
            ("kept", "share of the image's px that survive"),
            ("stretch", "1 keeps the aspect"),
            ("padding", "share of encoder px that show nothing"),
            ("enlarged", "encoder px for each px there was"),
            ("seen", "how often each px is in a slice, on average"),
            ("seam", "length of cuts through the image, in image sides"),
            ("patches", "of the vision transformer"),
            ("ViT", "TFLOPs"),
            ("LM", "TFLOPs"),
        )
    )
    return f'<h2>All numbers</h2><div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _big_curves(comparison: Comparison) -> str:
    """Tokens over size in one chart, where there are few enough lines to tell apart."""
    rules = [(e.name, e.rule) for e in comparison.planned]
    if len(rules) > len(charts.COLORS):
        return ""
    lines = curves_over_size(rules, comparison.image_hw, 61)
    counts = [y for line in lines.values() for _, y in line if not math.isnan(y)]
    drawn = charts.curves(lines, _SIDES, charts.log_axis(counts, "tokens"), width=1100)
    return f"<h2>Tokens over size</h2><p>The same shape at other sizes; both scales are logarithmic.</p>{drawn}"


def _bar(share: float, text: str) -> str:
    return f'<span class="bar"><i style="width:{max(100 * share, 0.5):.1f}%"></i><b>{text}</b></span>'


def _anchor(entry: Entry, number: int) -> str:
    return escape(f"rule-{number}-{entry.name}".replace(" ", "-"), quote=True)


def _cards(comparison: Comparison, thumb: Image.Image, front: set[str], number: int) -> str:
    planned, (height, width) = comparison.planned, comparison.image_hw
    rules = [(e.name, e.rule) for e in planned]
    by_size, by_aspect = curves_over_size(rules, comparison.image_hw), curves_over_aspect(rules, comparison.image_hw)
    counts = [y for lines in (by_size, by_aspect) for line in lines.values() for _, y in line if not math.isnan(y)]
    y = charts.log_axis(counts, "tokens")
    size_name, aspect_name = f"size-{number}", f"aspect-{number}"
    parts = [
        "<h2>What each rule does</h2><p>Left: the image and where it is cut. Right: the views as the encoder gets "
        "them. "
        '<span class="key cut"></span> cut &ensp;<span class="key twice"></span> in several slices '
        '&ensp;<span class="key unseen"></span> in no slice &ensp;<span class="key pad"></span> padding. '
        "Curves: tokens at other sizes and shapes (log), the other rules in gray, a dot for this image.</p>",
        charts.backdrop(by_size, _SIDES, y, name=size_name),
        charts.backdrop(by_aspect, _ASPECTS, y, name=aspect_name),
        '<div class="cards">',
    ]
    for entry in planned:
        tokens = float(max(entry.plan.num_tokens, 1))
        small = charts.small_curve(
            by_size[entry.name], _SIDES, y, behind=size_name, here=(max(height, width), tokens)
        ) + charts.small_curve(by_aspect[entry.name], _ASPECTS, y, behind=aspect_name, here=(width / height, tokens))
        parts.append(_card(entry, thumb, small, entry.name in front, number))
    return "".join((*parts, "</div>"))


def _card(entry: Entry, thumb: Image.Image, small: str, best: bool, number: int) -> str:
    m, found = entry.metrics, entry.plan
    kinds = {canvas.kind for canvas in found.canvases}
    pictures = [_figure(_cut_picture(thumb, found), "the image")]
    if "slice" in kinds:
        size = "{1} x {0}".format(*found.slice_hw)
        count = sum(view.kind == "slice" for view in found.views)
        same = len({v.size_hw for v in found.views if v.kind == "slice"}) == 1
        of = f" of {size} px" if same else ""
        pictures.append(
            _figure(_views_picture(thumb, found, "slice", _PICTURE), f"{count} slice{'s' * (count != 1)}{of}")
        )
    if "overview" in kinds:
        side = _PICTURE // 2 if "slice" in kinds else _PICTURE
        name = "overview" if "slice" in kinds else "one view"
        pictures.append(
            _figure(
                _views_picture(thumb, found, "overview", side), f"{name}, " + "{1} x {0} px".format(*found.overview_hw)
            )
        )
    facts = (
        f"<b>{100 * m.resolution_kept:.0f}%</b> of resolution kept &middot; stretch {m.distortion:.2f} &middot; "
        f"{100 * m.padding:.0f}% padding &middot; {_often(m)}"
        f"{m.patches} patches &middot; {m.flops.total / 1e12:.1f} TFLOPs"
    )
    return (
        f'<article id="{_anchor(entry, number)}"{" class=front" * best}><h3>{escape(entry.name)}'
        f"<span>{m.tokens} tokens</span></h3>"
        f'<div class="pictures">{"".join(pictures)}</div><p>{facts}</p><div class="curves">{small}</div></article>'
    )


def _often(m: PlanMetrics) -> str:
    """Worth a word only where slices overlap or miss something."""
    if abs(m.duplication - 1) < 0.005:
        return ""
    return f"each px seen {m.duplication:.2f} times &middot; "


def _figure(picture: Image.Image, caption: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'<figure><img alt="{escape(caption)}" width="{picture.width}" height="{picture.height}" '
        f'src="data:image/jpeg;base64,{data}"><figcaption>{escape(caption)}</figcaption></figure>'
    )


# --- pictures


def _thumbnail(comparison: Comparison) -> Image.Image:
    """The image made small once, or rings on a shade where only a size is known: a stretch shows as ovals."""
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
    """(width, height) of the largest picture of this shape in a square, no side below 2 px."""
    scale = side / max(size_hw)
    return max(round(size_hw[1] * scale), 2), max(round(size_hw[0] * scale), 2)


def _cut_picture(thumb: Image.Image, found: SlicePlan, side: int = _PICTURE) -> Image.Image:
    """The image with its detail views outlined; what several of them share, and what none of them has, tinted."""
    picture = thumb.resize(_fit(found.image_hw, side), Image.Resampling.BICUBIC)
    kind = "slice" if any(canvas.kind == "slice" for canvas in found.canvases) else "overview"
    scale = (picture.height / found.image_hw[0], picture.width / found.image_hw[1])
    boxes = []
    for view in found.views[:_MOST_DRAWN]:
        if view.kind == kind:
            top, left, bottom, right = (float(e) * scale[i % 2] for i, e in enumerate(view_box(found, view.index)))
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


def _views_picture(thumb: Image.Image, found: SlicePlan, kind: str, side: int) -> Image.Image:
    """The views of one kind in their grid, as the encoder gets them, padding hatched."""
    views = [view for view in found.views if view.kind == kind][:_MOST_DRAWN]
    rows, cols = (max(view.row for view in views) + 1, max(view.col for view in views) + 1)
    tallest, widest = max(v.size_hw[0] for v in views), max(v.size_hw[1] for v in views)
    gap = 3 if max(rows, cols) <= 20 else 1
    room = max(side - gap * (max(rows, cols) - 1), 2 * max(rows, cols))
    scale = room / max(rows * tallest, cols * widest)
    cell = (max(round(widest * scale), 2), max(round(tallest * scale), 2))
    sheet = Image.new("RGB", (cols * (cell[0] + gap) - gap, rows * (cell[1] + gap) - gap), (255, 255, 255))
    for view in views:
        size = (max(round(view.size_hw[1] * scale), 2), max(round(view.size_hw[0] * scale), 2))
        shown = _view_picture(thumb, found, found.canvases[view.canvas], view.box, size)
        sheet.paste(shown, (view.col * (cell[0] + gap), view.row * (cell[1] + gap)))
    return sheet


def _view_picture(
    thumb: Image.Image, found: SlicePlan, canvas: Canvas, box: tuple[int, int, int, int], size: tuple[int, int]
) -> Image.Image:
    picture = _hatched(size)
    (top, left), (rows, cols) = canvas.offset, canvas.content_hw
    inside = (max(box[0], top), max(box[1], left), min(box[2], top + rows), min(box[3], left + cols))
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        return picture
    source = canvas.source or (0, 0, *found.image_hw)
    lengths = (source[2] - source[0], source[3] - source[1])
    shrink = (thumb.height / found.image_hw[0], thumb.width / found.image_hw[1])
    # the part of the thumbnail, and where it goes in the view
    y0, x0, y1, x1 = (
        (source[i % 2] + (edge - canvas.offset[i % 2]) * lengths[i % 2] / canvas.content_hw[i % 2]) * shrink[i % 2]
        for i, edge in enumerate(inside)
    )
    scale = (size[1] / (box[2] - box[0]), size[0] / (box[3] - box[1]))
    to = [round((edge - box[i % 2]) * scale[i % 2]) for i, edge in enumerate(inside)]
    wide, tall = to[3] - to[1], to[2] - to[0]
    if wide > 0 and tall > 0:
        part = (
            min(max(x0, 0), thumb.width),
            min(max(y0, 0), thumb.height),
            min(x1, thumb.width),
            min(y1, thumb.height),
        )
        picture.paste(thumb.resize((wide, tall), Image.Resampling.BILINEAR, box=part), (to[1], to[0]))
    return picture


@lru_cache(maxsize=64)
def _hatching(size: tuple[int, int]) -> Image.Image:
    picture = Image.new("RGB", size, (238, 239, 242))
    pen = ImageDraw.Draw(picture)
    for start in range(-size[1], size[0], 7):
        pen.line((start, size[1], start + size[1], 0), (176, 181, 191), 1)
    return picture


def _hatched(size: tuple[int, int]) -> Image.Image:
    return _hatching(size).copy()


def picture_of(item: Any) -> tuple[Image.Image, tuple[int, int]]:
    """An image file, upright and RGB, and its (height, width)."""
    image = load_image(item)
    return image, (image.height, image.width)


def system_of(vit: str | None, resampler: str | None, lm: str | None) -> dict[str, Any]:
    """Keywords of :func:`uhd.slicing.metrics.measure` for these names; unknown ones raise ``ValueError``."""
    found = {"vit": (vit, VITS), "resampler": (resampler, RESAMPLERS), "lm": (lm, LMS)}
    return {key: named(name, known) for key, (name, known) in found.items() if name is not None}


_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;color:#1c2028;background:#f6f7f9;margin:0 auto;max-width:1180px;padding:24px}
h1{font-size:26px;margin:8px 0;overflow-wrap:anywhere}h2{font-size:19px;margin:30px 0 4px}p{margin:6px 0 12px}
.lead{max-width:62em}svg{max-width:100%;height:auto}section>svg{background:#fff;border-radius:8px}
svg.defs{position:absolute}.scroll{overflow-x:auto}
table{border-collapse:collapse;background:#fff;font-size:13px;width:100%}
th,td{padding:3px 8px;text-align:right;border-bottom:1px solid #eceef2;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{background:#eceef2;position:sticky;top:0}
tr.front td:first-child{box-shadow:inset 3px 0 #d64028}td a{color:inherit;text-decoration-color:#b9bfca}
.bar{position:relative;display:inline-block;width:110px;height:17px;background:#f0f1f4;border-radius:3px}
.bar i{position:absolute;left:0;top:0;bottom:0;background:#bcd3ee;border-radius:3px}
.bar b{position:relative;font-weight:600;padding:0 4px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(540px,1fr));gap:16px}
article{background:#fff;border-radius:8px;padding:12px 16px;border-left:4px solid #d3d7de;min-width:0}
article.front{border-left-color:#d64028}
h3{font-size:16px;margin:0 0 8px;display:flex;justify-content:space-between;gap:12px;overflow-wrap:anywhere}
h3 span{white-space:nowrap}.pictures{display:flex;gap:12px;align-items:flex-start;flex-wrap:wrap;min-height:120px}
figure{margin:0;width:min-content;min-width:96px}figure img{display:block;border:1px solid #e0e3e8}
figcaption{font-size:12px;color:#5c6370;padding-top:3px}
article p{font-size:13px}.curves{display:flex;flex-wrap:wrap}
.key{display:inline-block;width:14px;height:14px;vertical-align:-2px;border-radius:2px}
.cut{border:2px solid #d64028;width:10px;height:10px}.twice{background:#ffb020}.unseen{background:#3a3f49}
.pad{background:repeating-linear-gradient(135deg,#eeeff2 0 4px,#b0b5bf 4px 5px)}
footer{font-size:13px;color:#5c6370;margin-top:32px;max-width:70em}
"""

_GLOSSARY = (
    "<p><b>Resolution kept</b>: share of the image's pixels that survive the resize, 100% where nothing is shrunk. "
    "<b>Stretch</b>: how much more one side is scaled than the other; 1 keeps the aspect. <b>Padding</b>: share of "
    "the encoder's pixels that show nothing. <b>Enlarged</b>: encoder pixels for each pixel there was. <b>Seen</b>: "
    "how often a pixel is in a slice on average; above 1 slices overlap, below 1 part is cropped. <b>Seam</b>: length "
    "of cuts through the image, in square roots of its area. <b>TFLOPs</b>: matrix products of one image's way "
    "through one reference system for all rules (CLIP-L, LLaVA-1.5's projector and a 13B language model unless told "
    "otherwise), not of each model's own. Tokens are image features with learned separators; text around them is not "
    "counted.</p>"
)
