"""Plan and measure one image by many rules: plain data, curves over sizes, and a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from uhd.slicing import SlicePlan, Slicing, SlicingLike, find
from uhd.slicing.borders import Gradient, content_cut
from uhd.slicing.flops import LMS, RESAMPLERS, VITS, named
from uhd.slicing.metrics import PlanMetrics, measure
from uhd.slicing.plan import MAX_SIDE, check_size

from .measuring import chosen_rules, front, planned_by

if TYPE_CHECKING:
    from PIL import Image

    from uhd.pixels import PixelSettings

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Entry:
    """One rule on one image: a plan with its metrics, or the error with which the rule refused the size.

    ``content_cut`` is :func:`uhd.slicing.borders.content_cut`, where there is a picture.
    """

    name: str
    rule: Any
    plan: SlicePlan | None
    metrics: PlanMetrics | None
    error: str | None = None
    content_cut: float | None = None


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
        """Return plain JSON types, without the pictures."""
        return {"input": self.name, "image_hw": list(self.image_hw), "strategies": [_record(e) for e in self.entries]}


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
        image: The picture itself, upright: for :func:`html_page`, for what borders cut of it, and to move them by.
        budget: Tokens an image should cost at most; every metric's ``budget_error`` is relative to it.
        system: ``vit``, ``resampler`` and ``lm`` of :func:`uhd.slicing.metrics.measure`.

    Raises:
        ValueError: An unknown name, no rules, or a size that is not two whole numbers of px. A rule that refuses this
            size is an entry with its error, not an exception.
        TypeError: ``rules`` is one name rather than a list.

    >>> compared = compare((672, 1008), ["llava-uhd", "llava-1.5", "siglip"])
    >>> [(entry.name, entry.plan.num_tokens) for entry in compared.entries]
    [('llava-uhd', 454), ('llava-1.5', 576), ('siglip', 729)]
    >>> sorted(pareto(compared.entries))
    ['llava-uhd']
    """
    chosen, image_hw = chosen_rules(rules), check_size(image_hw)
    shown = None if image is None else _Shown.of(image)
    entries = [_entry(image_hw, name, rule, budget, system, shown) for name, rule in chosen]
    if rules is None:
        entries.sort(key=lambda e: (e.plan is None, e.plan.num_tokens if e.plan else 0))
    return Comparison(name or "{1}x{0}".format(*image_hw), image_hw, tuple(entries), image)


@dataclass(frozen=True, eq=False)
class _Shown:
    """A picture for rules that look at it, and its gradient."""

    picture: Image.Image
    gradient: Gradient

    @classmethod
    def of(cls, image: Image.Image) -> _Shown:
        from uhd.pixels import load_image

        picture = load_image(image)
        return cls(picture, Gradient.of(np.asarray(picture)))


def _entry(
    image_hw: tuple[int, int],
    name: str,
    rule: Slicing,
    budget: int | None,
    system: Mapping[str, Any],
    shown: _Shown | None,
) -> Entry:
    try:
        planned = planned_by(rule, image_hw)
    except ValueError as problem:
        return Entry(name, rule, None, None, str(problem))
    cut = None
    if shown is not None:
        from uhd.pixels import move_borders

        planned = move_borders(shown.picture, planned, rule)
        cut = content_cut(planned, shown.gradient)
    return Entry(name, rule, planned, measure(planned, budget=budget, **system), content_cut=cut)


def _record(entry: Entry) -> dict[str, Any]:
    if entry.plan is None:
        return {"strategy": entry.name, "error": entry.error}
    told = {key: getattr(entry.plan, key) for key in ("grid", "slice_hw", "overview_hw", "num_tokens")}
    cut = {} if entry.content_cut is None else {"content_cut": entry.content_cut}
    return {"strategy": entry.name, **told, "metrics": entry.metrics.to_dict(), **cut}


def pareto(entries: Sequence[Entry]) -> set[str]:
    """Name the rules that no other one beats: none keeps more resolution for as few tokens, or as much for fewer.

    >>> pareto(compare((672, 1008), ["llava-uhd", "siglip"]).entries)
    {'llava-uhd'}
    """
    known = [e for e in entries if e.metrics]
    return {known[place].name for place in front([(e.metrics.tokens, e.metrics.resolution_kept) for e in known])}


_COLUMNS = ("strategy", "grid", "views", "tokens", "kept", "stretch", "padding", "seen", "seam", "patches", "TFLOPs")


def table(images: Comparison | Any, rules: Iterable[SlicingLike] | None = None, **system: Any) -> Any:
    """One image's comparison as text for a terminal, or many images by many rules as records for a data frame.

    Args:
        images: A :class:`Comparison`; or paths (pictures, folders, lists, archives, ``"WIDTHxHEIGHT"``), (height,
            width) pairs and Pillow images, as many as there are.
        rules: As in :func:`compare`; with a comparison it has its own.
        system: ``vit``, ``resampler`` and ``lm`` of :func:`uhd.slicing.metrics.measure`.

    Returns:
        Of a comparison, text: rules that refused the size come last, with their reason. Of images, a list of flat
        dictionaries, one for each image and rule, as ``pandas.DataFrame`` takes them: input, height, width, strategy,
        the names of :data:`uhd.compare.COLUMNS`, and ``error``, why a rule refuses the size, else ``None``.

    Raises:
        ValueError: An image that cannot be read, a size that is none, nothing at all, or an unknown rule.
        TypeError: Something else in ``images``.

    >>> print("\\n".join(table(compare((672, 1008), ["llava-uhd", "siglip"])).splitlines()[:3]))
    1008x672: 1008x672 px (width x height)
    strategy     grid  views  tokens  kept  stretch  padding  seen  seam  patches  TFLOPs
    * llava-uhd   2x3      7     454  100%     1.00       0%  1.00   2.9     4007    14.3
    >>> [(row["height"], row["strategy"], row["tokens"]) for row in table([(672, 1008)], ["llava-uhd", "siglip"])]
    [(672, 'llava-uhd', 454), (672, 'siglip', 729)]
    """
    if isinstance(images, Comparison):
        return _text(images)
    from .summary import records, summarize

    return list(records(summarize(images, rules, **system)))


def _text(comparison: Comparison) -> str:
    from .summary import aligned

    budget = any(e.metrics.budget_error is not None for e in comparison.planned)
    cut = any(e.content_cut is not None for e in comparison.planned)
    rows = [(*_COLUMNS, *["cut"] * cut, *["budget"] * budget)]
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
        row += (f"{100 * entry.content_cut:.2f}%",) if cut else ()
        rows.append((*row, f"{m.budget_error:.2f}") if budget else row)
    height, width = comparison.image_hw
    title = f"{comparison.name}: {width}x{height} px (width x height)"
    notes = [
        "kept: share of the image's px that reach the encoder; stretch: 1 keeps the aspect; seen: how often each px "
        "is in a slice, on average",
        "* no other rule keeps more for as few tokens; TFLOPs: one reference system for all (CLIP-L, MLP, 13B LM) "
        "unless told otherwise",
    ]
    if cut:
        notes.insert(1, "cut: share of the image's gradient that lies on borders between slices")
    refused = [f"  {e.name}: {e.error}" for e in comparison.entries if e.plan is None]
    return "\n".join([title, *aligned(rows), *notes, *(["refused:", *refused] if refused else [])])


def curves_over_size(
    rules: Iterable[tuple[str, Any]], image_hw: tuple[int, int], points: int = 25
) -> dict[str, Curve]:
    """Count tokens over the longer side, 64 to 4096 px, at the image's aspect; ``nan`` where a rule refuses.

    >>> curves_over_size([("one square", "llava-1.5")], (300, 400), points=3)
    {'one square': [(64, 576.0), (512, 576.0), (4096, 576.0)]}
    """
    longest = max(image_hw)
    sides = [round(64 * 64 ** (i / (points - 1))) for i in range(points)]
    sizes = [tuple(max(round(length * side / longest), 1) for length in image_hw) for side in sides]
    return {name: _tokens(rule, sizes, sides) for name, rule in rules}


def curves_over_aspect(
    rules: Iterable[tuple[str, Any]], image_hw: tuple[int, int], points: int = 25
) -> dict[str, Curve]:
    """Count tokens over width / height, 1/8 to 8, at the image's area; ``nan`` where a rule refuses.

    >>> curves_over_aspect([("one square", "llava-1.5")], (300, 400), points=3)
    {'one square': [(0.125, 576.0), (1.0, 576.0), (8.0, 576.0)]}
    """
    area = image_hw[0] * image_hw[1]
    aspects = [8 ** (2 * i / (points - 1) - 1) for i in range(points)]
    sides = [(math.sqrt(area / aspect), math.sqrt(area * aspect)) for aspect in aspects]
    sizes = [tuple(min(max(round(side), 1), MAX_SIDE) for side in pair) for pair in sides]
    return {name: _tokens(rule, sizes, aspects) for name, rule in rules}


def _tokens(rule: Any, sizes_hw: Sequence[tuple[int, int]], xs: Sequence[float]) -> Curve:
    line = []
    for size, x in zip(sizes_hw, xs, strict=True):
        try:
            line.append((x, float(max(planned_by(find(rule), size).num_tokens, 1))))  # the axis is logarithmic
        except ValueError:
            line.append((x, math.nan))
    return line


def picture_of(item: Any, settings: PixelSettings | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """Load an image upright and RGB, with its (height, width); ``settings`` default to :class:`uhd.PixelSettings`'s.

    >>> from PIL import Image
    >>> image, size_hw = picture_of(Image.new("L", (8, 4)))
    >>> image.mode, size_hw
    ('RGB', (4, 8))
    """
    from uhd.pixels import DEFAULT, load_image

    image = load_image(item, settings=settings or DEFAULT)
    return image, (image.height, image.width)


def system_of(vit: str | None, resampler: str | None, lm: str | None) -> dict[str, Any]:
    """Look up keywords of :func:`uhd.slicing.metrics.measure` by name; unknown names raise ``ValueError``.

    >>> system_of("clip-l", None, None)["vit"] is VITS["clip-l"]
    True
    """
    systems = {"vit": (vit, VITS), "resampler": (resampler, RESAMPLERS), "lm": (lm, LMS)}
    return {key: named(name, known) for key, (name, known) in systems.items() if name is not None}
