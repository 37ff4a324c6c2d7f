"""What a plan keeps and what it costs, from its geometry alone: no rule is known here by name.

Notation: the image is w x h px. A *detail view* is a slice, or the overview where the image is not cut. It shows a
rectangle A_v of the image (clipped to it, padding left out) at the scales s_x, s_y: view px per image px. A rule that
resizes more than once may make the image smaller on the way there: m_x, m_y are the least of those scales. T is
``plan.num_tokens``. Metrics of one plan come from :func:`measure`; cliffs, transposition and monotonicity compare
plans of many sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from uhd.slicing.config import positive_int
from uhd.slicing.flops import Flops, LMShape, ResamplerShape, ViTShape, plan_flops
from uhd.slicing.plan import MAX_SIDE, Box, Canvas, SlicePlan, check_size
from uhd.slicing.rules import SlicingLike, plan

_MOST_CELLS = 1 << 24  # rectangles that overlapping views may divide an image into


@dataclass(frozen=True)
class PlanMetrics:
    """The metrics of one plan; shares are in 0..1.

    Attributes:
        distortion: D = max over detail views of max(s_x, s_y) / min(s_x, s_y). 1 keeps the aspect.
        padding: P = 1 - content px / encoder px, over all views, the overview included.
        resolution_kept: R = (1 / wh) * sum over the image of max over detail views there of min(1, m_x) * min(1, m_y):
            the share of image px that survive. A pooling of features is not in it; it is in the tokens.
        tokens, views, patches: T, encoder inputs, and N = sum of N_v ViT patches.
        attention_pairs: sum of N_v^2, what attention inside views is proportional to.
        tokens_per_megapixel: T / (wh / 10^6).
        pixels_per_token_edge: sqrt(w h R / T): side of the square of surviving px that one token describes.
        upsampling: U = mean over detail views, weighted by |A_v|, of max(1, s_x) * max(1, s_y).
        coverage: |union of A_v| / wh; below 1 part of the image is in no detail view.
        duplication: O = sum of |A_v| / wh; above ``coverage`` some px are in several detail views.
        seam: K = length of the lines between detail views that none of them shows both sides of, over sqrt(wh): a cut
            into r x c has ((r - 1) w + (c - 1) h) / sqrt(wh).
        budget_error: B = T / budget; ``None`` without a budget.
        flops: Of the named ViT, compressor and LM, see :func:`uhd.slicing.flops.plan_flops`.
    """

    distortion: float
    padding: float
    resolution_kept: float
    tokens: int
    views: int
    patches: int
    attention_pairs: int
    tokens_per_megapixel: float
    pixels_per_token_edge: float
    upsampling: float
    coverage: float
    duplication: float
    seam: float
    budget_error: float | None
    flops: Flops

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; FLOPs by part and in all."""
        return {**asdict(self), "flops": {**asdict(self.flops), "total": self.flops.total}}


def measure(
    plan: SlicePlan,
    *,
    budget: int | None = None,
    vit: ViTShape | str = "clip-l",
    resampler: ResamplerShape | str | None = None,
    lm: LMShape | str = "llama-13b",
) -> PlanMetrics:
    """Every metric of one plan, of any strategy or your own.

    Args:
        plan: The plan.
        budget: Tokens that an image was meant to cost at most, for ``budget_error``.
        vit, resampler, lm: What FLOPs are counted for: names in :mod:`uhd.slicing.flops`, or shapes; by default
            LLaVA-1.5 at 13B for all rules, so that they compare.

    Raises:
        ValueError: Views divide the image into more than 2^24 rectangles; an unknown name; a budget below 1.
        TypeError: ``plan`` is none.

    >>> found = measure(plan((1008, 1344), "llava-1.5"))
    >>> round(found.padding, 3), round(found.resolution_kept, 3), found.tokens
    (0.25, 0.062, 576)
    """
    if not isinstance(plan, SlicePlan):
        raise TypeError(f"a SlicePlan is measured, got {type(plan).__name__}: uhd.plan(image_hw, rule) makes one")
    budget = positive_int("budget", budget)
    area = math.prod(plan.image_hw)
    tilings = [_tiled(canvas) for canvas in plan.canvases]
    seen = _regular(plan, tilings) or _general(plan)
    per_view = [(len(c.tiles), math.prod(side // plan.patch_size for side in c.view_hw)) for c in plan.canvases]
    return PlanMetrics(
        distortion=seen.distortion,
        padding=_padding(plan, tilings),
        resolution_kept=seen.kept / area,
        tokens=plan.num_tokens,
        views=plan.num_views,
        patches=plan.num_patches,
        attention_pairs=sum(count * patches**2 for count, patches in per_view),
        tokens_per_megapixel=plan.num_tokens / (area / 1e6),
        pixels_per_token_edge=math.sqrt(seen.kept / plan.num_tokens) if plan.num_tokens else math.inf,
        upsampling=seen.upsampling,
        coverage=seen.covered / area,
        duplication=seen.shown / area,
        seam=seen.seam / math.sqrt(area),
        budget_error=None if budget is None else plan.num_tokens / budget,
        flops=plan_flops(plan, vit=vit, resampler=resampler, lm=lm),
    )


class _Seen(NamedTuple):
    """What detail views make of an image: px of it that are ``kept``, ``covered`` and ``shown``, and ``seam`` px."""

    distortion: float
    kept: float
    upsampling: float
    covered: float
    shown: float
    seam: float


def _regular(plan: SlicePlan, tilings: Sequence[_Tiling | None]) -> _Seen | None:
    """Of one canvas of equal tiles side by side, in plain numbers, which is many times faster; ``None`` for others."""
    pairs = list(zip(plan.canvases, tilings, strict=True))
    details = [pair for pair in pairs if pair[0].kind == "slice"] or pairs
    canvas, tiled = details[0]
    if len(details) > 1 or tiled is None:
        return None
    source = canvas.source or (0, 0, *plan.image_hw)
    scales, least, lengths, cuts = [], [], [], []
    for axis, (start, tile, low, high) in enumerate(tiled):
        if low >= high:
            return None
        length, resized = source[axis + 2] - source[axis], canvas.content_hw[axis]
        scales.append(resized / length * (canvas.view_hw[axis] / tile))
        least.append(min(scales[axis], (canvas.first_hw or canvas.content_hw)[axis] / length, resized / length, 1))
        lengths.append((high - low) * length / resized)
        cuts.append((high - 1 - start) // tile - (low - start) // tile)
    covered = lengths[0] * lengths[1]
    upsampling = max(scales[0], 1) * max(scales[1], 1)
    seam = cuts[0] * lengths[1] + cuts[1] * lengths[0]
    return _Seen(max(scales) / min(scales), least[0] * least[1] * covered, upsampling, covered, covered, seam)


_Tiling = tuple[tuple[int, int, int, int], tuple[int, int, int, int]]


def _tiled(canvas: Canvas) -> _Tiling | None:
    """For each axis: where equal tiles side by side start, their length, and from where to where they show content."""
    first, last = canvas.tiles[0], canvas.tiles[-1]
    h, w = first.bottom - first.top, first.right - first.left
    if canvas.tiles != _side_by_side(first.top, first.left, h, w, canvas.grid):
        return None
    (top, left), (height, width) = canvas.offset, canvas.content_hw
    return (
        (first.top, h, max(first.top, top), min(last.bottom, top + height)),
        (first.left, w, max(first.left, left), min(last.right, left + width)),
    )


@lru_cache(maxsize=4096)
def _side_by_side(top: int, left: int, h: int, w: int, grid: tuple[int, int]) -> tuple[Box, ...]:
    rows, cols = grid
    return tuple(
        Box(top + r * h, left + c * w, top + (r + 1) * h, left + (c + 1) * w) for r in range(rows) for c in range(cols)
    )


def _general(plan: SlicePlan) -> _Seen:
    """Of any views, which may overlap or leave gaps."""
    shown = _details(plan)
    sizes, cells = shown.sizes, _cells(shown)
    sides = shown.scales.max(axis=1) / shown.scales.min(axis=1)
    enlarged = np.maximum(shown.scales, 1).prod(axis=1)
    return _Seen(
        distortion=float(sides.max(initial=1)),
        kept=float((cells.kept * cells.areas).sum()),
        upsampling=float((enlarged * sizes).sum() / sizes.sum()) if len(sizes) else 1.0,
        covered=float(cells.areas[cells.seen].sum()),
        shown=float(sizes.sum()),
        seam=_seam(cells),
    )


class _Shown(NamedTuple):
    """Views: ``boxes`` (V, 4) of the image, px, their ``scales`` (V, 2), and ``kept`` (V,), the share of px left."""

    boxes: np.ndarray
    scales: np.ndarray
    kept: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        return (self.boxes[:, 2] - self.boxes[:, 0]) * (self.boxes[:, 3] - self.boxes[:, 1])


def _details(plan: SlicePlan) -> _Shown:
    return _views(plan, {"overview" if plan.slice_hw is None else "slice"})


def _views(plan: SlicePlan, kinds: set[str]) -> _Shown:
    rows = [row for canvas in plan.canvases if canvas.kind in kinds for row in _shown(canvas, plan.image_hw)]
    found = np.array(rows, dtype=float).reshape(-1, 7)
    return _Shown(found[:, :4], found[:, 4:6], found[:, 6])


def _content(canvas: Canvas) -> tuple[np.ndarray, np.ndarray]:
    """Tiles (V, 4), and the part of each that content covers (V, 4), both on the canvas, px."""
    tiles = np.array(canvas.tiles, dtype=np.int64).reshape(-1, 4)
    (top, left), (height, width) = canvas.offset, canvas.content_hw
    low = np.maximum(tiles[:, :2], (top, left))
    high = np.minimum(tiles[:, 2:], (top + height, left + width))
    return tiles, np.concatenate([low, np.maximum(high, low)], axis=1)


def _shown(canvas: Canvas, image_hw: tuple[int, int]) -> Iterator[tuple[float, ...]]:
    """Box, scales and ``kept`` of every tile that shows content; in plain numbers, since canvases may be many."""
    source = canvas.source or (0, 0, *image_hw)
    length = (source[2] - source[0], source[3] - source[1])
    resized, offset, view = canvas.content_hw, canvas.offset, canvas.view_hw
    first = canvas.first_hw or resized
    least = [min(first[axis] / length[axis], resized[axis] / length[axis], 1) for axis in (0, 1)]
    for tile in canvas.tiles:
        edges = []
        for side, edge in enumerate(tile):
            axis = side % 2
            inside = min(max(edge, offset[axis]), offset[axis] + resized[axis])
            # one division, so that tiles of several canvases meet at equal numbers; the rest is rounded away
            place = round(source[axis] + (inside - offset[axis]) * length[axis] / resized[axis], 6)
            edges.append(min(max(place, 0), image_hw[axis]))
        if edges[2] > edges[0] and edges[3] > edges[1]:  # a tile may hold nothing but padding
            scales = [resized[axis] / length[axis] * (view[axis] / (tile[axis + 2] - tile[axis])) for axis in (0, 1)]
            yield (*edges, *scales, min(scales[0], least[0]) * min(scales[1], least[1]))


def share_seen(plan: SlicePlan) -> float:
    """Share of the image that lies in any view, slice or overview.

    >>> share_seen(plan((336, 672), "clip"))
    0.5
    """
    cells = _cells(_views(plan, {canvas.kind for canvas in plan.canvases}))
    return float(cells.areas[cells.seen].sum()) / math.prod(plan.image_hw)


def _padding(plan: SlicePlan, tilings: Sequence[_Tiling | None]) -> float:
    content = total = 0.0
    for canvas, tiled in zip(plan.canvases, tilings, strict=True):
        view = math.prod(canvas.view_hw)
        total += len(canvas.tiles) * view
        if tiled is not None:
            (_, h, top, bottom), (_, w, left, right) = tiled
            content += max(bottom - top, 0) / h * (max(right - left, 0) / w) * view
            continue
        tiles, inside = _content(canvas)
        used = (inside[:, 2:] - inside[:, :2]).prod(axis=1) / (tiles[:, 2:] - tiles[:, :2]).prod(axis=1)
        content += float(used.sum()) * view
    return 1 - content / total


class _Cells(NamedTuple):
    """The image cut at every edge of a view: R x C rectangles.

    ``areas`` px, ``kept`` best min(1, m_x) min(1, m_y) there, ``seen`` by any view; ``across_h`` (R + 1, C) and
    ``across_w`` (R, C + 1): a view shows both sides of that edge; ``ys`` (R + 1,) and ``xs`` (C + 1,): edges, px.
    """

    areas: np.ndarray
    kept: np.ndarray
    seen: np.ndarray
    across_h: np.ndarray
    across_w: np.ndarray
    ys: np.ndarray
    xs: np.ndarray


def _cells(shown: _Shown) -> _Cells:
    ys = np.unique(shown.boxes[:, [0, 2]])
    xs = np.unique(shown.boxes[:, [1, 3]])
    rows, cols = max(len(ys) - 1, 0), max(len(xs) - 1, 0)
    if rows * cols > _MOST_CELLS:
        raise ValueError(
            f"{len(shown.boxes)} views cut the image into {rows} x {cols} rectangles, more than {_MOST_CELLS} are not "
            "measured: put the views in a grid, or use fewer"
        )
    kept, seen = np.zeros((rows, cols)), np.zeros((rows, cols), dtype=bool)
    across_h, across_w = np.zeros((rows + 1, cols), dtype=bool), np.zeros((rows, cols + 1), dtype=bool)
    edges = [
        np.searchsorted(lines, side).tolist() for lines, side in zip((ys, xs, ys, xs), shown.boxes.T, strict=True)
    ]
    for top, left, bottom, right, value in zip(*edges, shown.kept.tolist(), strict=True):
        part = kept[top:bottom, left:right]
        np.maximum(part, value, out=part)
        seen[top:bottom, left:right] = True
        across_h[top + 1 : bottom, left:right] = True
        across_w[top:bottom, left + 1 : right] = True
    return _Cells(np.outer(np.diff(ys), np.diff(xs)), kept, seen, across_h, across_w, ys, xs)


def _cut(cells: _Cells) -> tuple[np.ndarray, np.ndarray]:
    """Which inner edges next to a seen cell no view shows both sides of: (R - 1, C) and (R, C - 1).

    The outermost edges are the image's own, or those of a crop: nothing is cut between views there.
    """
    near_h = cells.seen[1:] | cells.seen[:-1]
    near_w = cells.seen[:, 1:] | cells.seen[:, :-1]
    return near_h & ~cells.across_h[1:-1], near_w & ~cells.across_w[:, 1:-1]


def _seam(cells: _Cells) -> float:
    """Length of those edges, px."""
    cut_h, cut_w = _cut(cells)
    return float((cut_h * np.diff(cells.xs)).sum() + (cut_w * np.diff(cells.ys)[:, None]).sum())


def cut_edges(plan: SlicePlan) -> Iterator[tuple[int, int, int, int]]:
    """What ``seam`` is the length of: (axis, place, start, stop) of every piece, to the nearest px of the image.

    Axis 0 is a line at y = place from x = start to stop, axis 1 one at x = place from y = start to stop.
    """
    cells = _cells(_details(plan))
    ys, xs = (np.rint(edges).astype(int).tolist() for edges in (cells.ys, cells.xs))
    cut_h, cut_w = _cut(cells)
    yield from ((0, ys[row + 1], xs[col], xs[col + 1]) for row, col in np.argwhere(cut_h).tolist())
    yield from ((1, xs[col + 1], ys[row], ys[row + 1]) for row, col in np.argwhere(cut_w).tolist())


# --- many sizes


class Cliffs(NamedTuple):
    """How far one px moves the token count: the ratio J >= 1 of :func:`cliffs`, and the share of J >= threshold.

    ``worst_at`` is the (height, width) of the worst one, ``None`` where nothing was compared. ``compared`` and
    ``refused`` count sizes; a size is refused where the rule raises for it or for its neighbour.
    """

    p99: float
    worst: float
    worst_at: tuple[int, int] | None
    share: float
    compared: int
    refused: int


class Violations(NamedTuple):
    """Share of compared sizes that break a law, and the (height, width) of the worst one, ``None`` without one."""

    share: float
    example: tuple[int, int] | None
    compared: int
    refused: int


def cliffs(rule: SlicingLike, sizes_hw: Iterable[Sequence[int]], *, threshold: float = 1.1) -> Cliffs:
    """J = max(T(h, w), T(h, w + 1)) / min(the same), over sizes: what one more column of px costs.
    ``sizes_hw`` are (height, width) pairs, px; from ``threshold`` on J counts as a cliff.

    >>> cliffs("internvl", [(448, 448), (500, 900)]).worst
    1.0
    """
    pairs, refused = _token_pairs(rule, sizes_hw, lambda h, w: (h, w + 1))
    if not pairs:
        return Cliffs(1.0, 1.0, None, 0.0, 0, refused)
    # no tokens at all is as good as one: the ratio stays finite
    jumps = np.array([max(a, b) / max(min(a, b), 1) for _, a, b in pairs])
    worst = int(jumps.argmax())
    p99, share = float(np.quantile(jumps, 0.99)), float((jumps >= threshold).mean())
    return Cliffs(p99, float(jumps[worst]), pairs[worst][0], share, len(pairs), refused)


def transposition_violations(rule: SlicingLike, sizes_hw: Iterable[Sequence[int]]) -> Violations:
    """Share of sizes with T(h, w) != T(w, h): turning the page by 90 degrees changes its price.

    >>> transposition_violations("llava-uhd", [(500, 900), (300, 1200)]).share
    0.0
    """
    pairs, refused = _token_pairs(rule, sizes_hw, lambda h, w: (w, h))
    return _violations([(size, abs(a - b)) for size, a, b in pairs], refused)


def monotonicity_violations(
    rule: SlicingLike, sizes_hw: Iterable[Sequence[int]], *, factor: float = 1.1, tolerance: float = 0.02
) -> Violations:
    """Share of sizes where enlarging both sides by ``factor`` (rounded to px) lowers T by more than ``tolerance``.

    Raises:
        ValueError: ``factor`` is below 1.

    >>> monotonicity_violations("internvl", [(500, 900), (300, 1200)]).share
    0.0
    """
    if not factor >= 1:
        raise ValueError(f"factor enlarges, so it is at least 1, got {factor!r}")

    def enlarged(h: int, w: int) -> tuple[int, int]:
        return min(round(h * factor), MAX_SIDE), min(round(w * factor), MAX_SIDE)

    pairs, refused = _token_pairs(rule, sizes_hw, enlarged)
    return _violations([(size, max((1 - tolerance) * a - b, 0)) for size, a, b in pairs], refused)


def _token_pairs(rule: SlicingLike, sizes_hw: Iterable[Sequence[int]], other: Any) -> tuple[list, int]:
    """((height, width), its T, T of ``other(height, width)``) where the rule plans both; how often it does not."""
    pairs, refused = [], 0
    for size in map(check_size, sizes_hw):
        try:
            pairs.append((size, plan(size, rule).num_tokens, plan(other(*size), rule).num_tokens))
        except ValueError:
            refused += 1
    return pairs, refused


def _violations(by_size: list[tuple[tuple[int, int], float]], refused: int) -> Violations:
    broken = [(how_far, size) for size, how_far in by_size if how_far > 0]
    share = len(broken) / len(by_size) if by_size else 0.0
    return Violations(share, max(broken)[1] if broken else None, len(by_size), refused)


class Summary(NamedTuple):
    """Metrics of a rule over many sizes; see :func:`summarize`. ``refused``: sizes that the rule raised for."""

    distortion_median: float
    distortion_p95: float
    padding_mean: float
    resolution_kept_mean: float
    tokens_median: float
    tokens_mean: float
    tokens_max: int
    tokens_per_megapixel_median: float
    duplication_mean: float
    seam_mean: float
    encoder_flops_mean: float
    lm_flops_mean: float
    compared: int
    refused: int


def summarize(rule: SlicingLike, sizes_hw: Iterable[Sequence[int]], **system: Any) -> Summary:
    """Medians, means and extremes of :func:`measure` over sizes; ``system`` are its ``vit``, ``resampler``, ``lm``.

    Raises:
        ValueError: The rule refuses every size.

    >>> summarize("llava-uhd", [(500, 900), (300, 1200)]).tokens_max
    324
    """
    found, refused = [], 0
    for size in map(check_size, sizes_hw):
        try:
            planned = plan(size, rule)
        except ValueError:
            refused += 1
        else:
            found.append(measure(planned, **system))
    if not found:
        raise ValueError(f"nothing to summarize: the rule refused all of {refused} sizes")

    def column(name: str) -> np.ndarray:
        return np.array([attrgetter(name)(item) for item in found], dtype=float)

    return Summary(
        distortion_median=float(np.median(column("distortion"))),
        distortion_p95=float(np.quantile(column("distortion"), 0.95, method="higher")),
        padding_mean=float(column("padding").mean()),
        resolution_kept_mean=float(column("resolution_kept").mean()),
        tokens_median=float(np.median(column("tokens"))),
        tokens_mean=float(column("tokens").mean()),
        tokens_max=int(column("tokens").max()),
        tokens_per_megapixel_median=float(np.median(column("tokens_per_megapixel"))),
        duplication_mean=float(column("duplication").mean()),
        seam_mean=float(column("seam").mean()),
        encoder_flops_mean=float(column("flops.encoder").mean()),
        lm_flops_mean=float(column("flops.lm").mean()),
        compared=len(found),
        refused=refused,
    )
