"""Small charts as SVG text: scatter plots and curves on logarithmic axes. Standard library only, no scripts inside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

INK, FAINT, GRID, ACCENT, OTHER = "#1c2028", "#6e7480", "#e4e6eb", "#d64028", "#9aa3b2"
COLORS = ("#d64028", "#1868c4", "#2c8c4a", "#8a4bb8", "#c98a12", "#14868c", "#b83a78", "#5a6472")
"""Of lines drawn together, which tell apart this many."""


class Point(NamedTuple):
    """A labelled point; ``marked`` ones are coloured, and labelled first."""

    x: float
    y: float
    label: str
    marked: bool = False


class Axis(NamedTuple):
    """Data range, ticks with their text, and whether the scale is logarithmic."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool
    title: str = ""

    def place(self, value: float, length: float) -> float:
        """Return the place of ``value`` along an axis of ``length`` px; values outside the range stick to its ends.

        >>> percent_axis().place(0.53, length=200)
        100.0
        """
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return share * length


def log_axis(values: Sequence[float], title: str = "") -> Axis:
    """Make a logarithmic axis over positive values, with ticks at 1, 2 and 5 times powers of ten, or at its ends.

    >>> [text for _, text in log_axis([64, 4096]).ticks]
    ['100', '200', '500', '1k', '2k']
    """
    low, high = min(values), max(values)
    if low == high:
        low, high = low / 2, high * 2
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside = [step for e in decades for m in (1, 2, 5) if low <= (step := m * 10.0**e) <= high]
    if len(inside) > 7:  # whole decades are enough, then
        inside = [step for step in inside if math.isclose(math.log10(step), round(math.log10(step)))]
    if len(inside) < 2:  # a narrow range: its ends
        inside = [low, high]
    return Axis(low, high, tuple((step, _short(float(f"{step:.3g}"))) for step in inside), True, title)


def percent_axis(title: str = "") -> Axis:
    """Make an axis from 0 to 100 %, for shares in 0..1, with some room above."""
    return Axis(0, 1.06, tuple((tick / 4, f"{25 * tick}%") for tick in range(5)), False, title)


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


class _Frame(NamedTuple):
    """Two axes, and where they lie in a picture, px."""

    x: Axis
    y: Axis
    left: int
    top: int
    width: int
    height: int

    def place(self, x: float, y: float) -> tuple[float, float]:
        return self.left + self.x.place(x, self.width), self.top + self.height - self.y.place(y, self.height)

    def lines(self, points: Sequence[tuple[float, float]], style: str) -> list[str]:
        """Draw a line through points; one whose y is ``nan`` breaks it."""
        paths: list[list[str]] = [[]]
        for x, y in points:
            if math.isnan(y):
                paths.append([])
            else:
                paths[-1].append("{:.1f},{:.1f}".format(*self.place(x, y)))
        return [f'<polyline points="{" ".join(path)}" fill="none" {style}/>' for path in paths if path]

    def drawn(self, *, small: bool = False) -> str:
        """Draw grid lines, tick texts and titles."""
        left, top, size = self.left, self.top, 9 if small else 12
        right, bottom = left + self.width, top + self.height
        parts = []
        for value, text in self.y.ticks:
            at = bottom - self.y.place(value, self.height)
            parts.append(_line((left, at), (right, at), GRID))
            parts.append(_text(left - 5, at + size / 3, text, FAINT, "end", size))
        for value, text in self.x.ticks:
            at = left + self.x.place(value, self.width)
            parts.append(_line((at, top), (at, bottom), GRID))
            parts.append(_text(at, bottom + size + 3, text, FAINT, "middle", size))
        below, color = (bottom + 2 * size + 5, FAINT) if small else (bottom + 40, INK)
        parts.append(_text(left + self.width / 2, below, self.x.title, color, "middle", size))
        if not small:
            title = _text(0, 0, self.y.title, INK, "middle")
            parts.append(f'<g transform="translate(16 {top + self.height / 2:.1f}) rotate(-90)">{title}</g>')
        return "".join(parts)


def scatter(points: Sequence[Point], x: Axis, y: Axis, *, width: int = 760, height: int = 420) -> str:
    """Draw points on two axes, the marked ones joined from left to right. Hovering names a point."""
    frame = _Frame(x, y, 64, 16, width - 88, height - 68)
    parts = [frame.drawn()]
    marked = sorted(p for p in points if p.marked)
    if len(marked) > 1:
        parts += frame.lines([(p.x, p.y) for p in marked], f'stroke="{ACCENT}" stroke-width="1.5" opacity="0.5"')
    for point in sorted(points, key=lambda p: p.marked):
        color, radius = (ACCENT, 5) if point.marked else (OTHER, 4)
        title = f"<title>{escape(point.label)}: {point.x:g}, {point.y:g}</title>"
        parts.append(_dot(frame.place(point.x, point.y), radius, color, 'fill-opacity="0.8"', title))
    labelled = [*marked, *sorted(set(points) - set(marked))] if len(points) <= _ALL_LABELLED else marked
    names = [(p.label, *frame.place(p.x, p.y)) for p in labelled]
    parts += _labels(names, [frame.place(p.x, p.y) for p in points], width)
    return _svg(width, height, f"{y.title} against {x.title}", parts)


_ALL_LABELLED = 12  # points; of more, only the marked ones get a label
_SIDES = tuple((dx, dy) for dy in (4, 18, -10, 32, -24, 46, 60) for dx in (9, -9))  # px from a point to its label


def _labels(items: Sequence[tuple[str, float, float]], points: Sequence[tuple[float, float]], width: int) -> list[str]:
    """Write names beside the items, moved where one would cover another or a point, left out where nothing helps."""
    taken: list[tuple[float, float, float]] = []  # (start, end, y)
    parts = []
    for label, cx, cy in items:
        length = 6.8 * len(label)
        for dx, dy in _SIDES:
            start, y = (cx + dx if dx > 0 else cx + dx - length), cy + dy
            clear = all(end < start or start + length < begin or abs(y - at) > 12 for begin, end, at in taken)
            clear &= not any(start - 5 < px < start + length + 5 and abs(py - (y - 4)) < 9 for px, py in points)
            if clear and start > 66 and start + length < width:
                taken.append((start, start + length, y))
                parts.append(_text(cx + dx, y, label, INK, "start" if dx > 0 else "end"))
                break
    return parts


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]], x: Axis, y: Axis, *, width: int = 760, height: int = 340
) -> str:
    """Draw lines with their names at the right; a point whose y is ``nan`` breaks the line."""
    top, right = 16, 220
    frame = _Frame(x, y, 64, top, width - 64 - right, height - 68)
    parts, ends = [frame.drawn()], []
    for number, (name, line) in enumerate(series.items()):
        color = COLORS[number % len(COLORS)]
        parts += frame.lines(line, f'stroke="{color}" stroke-width="2" stroke-linejoin="round"')
        known = [point for point in line if not math.isnan(point[1])]
        if known:
            ends.append((frame.place(*known[-1])[1], name, color))
    last = top - 10.0
    for at, name, color in sorted(ends):
        last = max(at + 4, last + 14)  # names do not cover each other
        parts.append(_text(width - right + 8, last, name, color))
    return _svg(width, height, f"{y.title} over {x.title}", parts)


def bars(groups: Mapping[str, Mapping[str, float]], title: str, *, reference: float | None = None) -> str:
    """Draw horizontal bars from 0 with their values, a group's side by side, and a line at ``reference``."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    colors = {name: COLORS[number % len(COLORS)] for number, name in enumerate(names)}
    width, left, right, top, bar = 760, 230, 60, 30, 14
    scale = (width - left - right) / max(value for group in groups.values() for value in group.values())
    parts, y = [_text(left + 90 * n, 16, name, color) for n, (name, color) in enumerate(colors.items())], top
    for label, group in groups.items():
        parts.append(_text(left - 8, y + len(group) * bar / 2 + 4, label, INK, "end"))
        for name, value in group.items():
            length = scale * value
            parts.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{bar - 2}" fill="{colors[name]}"/>')
            parts.append(_text(left + length + 5, y + bar - 3, f"{value:g}", FAINT))
            y += bar
        y += 10
    if reference is not None:
        x = left + scale * reference
        parts.append(_line((x, top), (x, y), INK, 'stroke-dasharray="3 3"'))
    return _svg(width, y + 28, title, [*parts, _text(left, y + 18, title, INK)])


def _small_frame(x: Axis, y: Axis) -> _Frame:
    return _Frame(x, y, 34, 8, 200, 86)


def backdrop(series: Mapping[str, Sequence[tuple[float, float]]], x: Axis, y: Axis, *, name: str) -> str:
    """Draw axes and all lines in gray, hidden under a ``name``; :func:`small_curve` draws one line over it."""
    frame = _small_frame(x, y)
    parts = [frame.drawn(small=True)]
    for line in series.values():
        parts += frame.lines(line, f'stroke="{OTHER}" stroke-width="0.7" opacity="0.35"')
    drawn = f'<defs><g id="{name}">{"".join(parts)}</g></defs>'
    return f'<svg width="0" height="0" class="defs" aria-hidden="true">{drawn}</svg>'


def small_curve(
    line: Sequence[tuple[float, float]], x: Axis, y: Axis, *, behind: str, here: tuple[float, float]
) -> str:
    """Draw one line in colour over :func:`backdrop`'s gray ones, on the same axes, and a dot at ``here``."""
    frame = _small_frame(x, y)
    parts = [f'<use href="#{behind}"/>', *frame.lines(line, f'stroke="{ACCENT}" stroke-width="2"')]
    return _svg(250, 120, f"{y.title} over {x.title}", [*parts, _dot(frame.place(*here), 3.5, ACCENT)])


def _svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(label)}" font-family="system-ui, sans-serif" font-size="12">'
        f"{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, color: str, anchor: str = "start", size: int = 12) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f'<text {place} fill="{color}">{escape(text)}</text>'


def _line(start: tuple[float, float], end: tuple[float, float], color: str, style: str = "") -> str:
    (x1, y1), (x2, y2) = start, end
    return f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}" stroke="{color}" {style}/>'


def _dot(center: tuple[float, float], radius: float, color: str, style: str = "", inside: str = "") -> str:
    place = 'cx="{:.1f}" cy="{:.1f}"'.format(*center)
    return f'<circle {place} r="{radius}" fill="{color}" {style} stroke="#fff">{inside}</circle>'
