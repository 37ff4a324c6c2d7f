"""What rules make of a data set, in one answer: a table for a terminal, JSON, LaTeX, and records for a data frame."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TextIO

import numpy as np

from uhd.slicing import SlicingLike

from .inputs import Input, given_inputs
from .measuring import COLUMNS, Measured, front, measure_sizes, weighted_quantile

WORST = 3
"""Images that are named for each rule."""


class Bucket(NamedTuple):
    """Images of a kind: at least ``low`` and below ``high``."""

    name: str
    low: float
    high: float


ASPECTS = (
    Bucket("below 1.5", 0, 1.5),
    Bucket("1.5 to 2.5", 1.5, 2.5),
    Bucket("2.5 to 4", 2.5, 4),
    Bucket("4 and above", 4, math.inf),
)
"""Buckets by longer side / shorter side: those of the learned comparison."""

AREAS = (
    Bucket("below 0.25 MP", 0, 0.25),
    Bucket("0.25 to 1 MP", 0.25, 1),
    Bucket("1 to 4 MP", 1, 4),
    Bucket("4 MP and above", 4, math.inf),
)
"""Buckets by area, 10^6 px."""


@dataclass(frozen=True, eq=False)  # arrays have no single answer
class Summary:
    """A data set by every rule.

    Attributes:
        inputs: Every image.
        measured: Every rule on every size of them.
        places: (images,) each image's size, as a place in ``measured.sizes_hw``.
        order: Rules' places, cheapest in tokens first; those that refuse every image last.
        front: Places of the rules on the Pareto front of mean tokens and mean resolution kept. Only rules that plan
            every image are on it, since means over other images do not compare.
    """

    inputs: tuple[Input, ...]
    measured: Measured
    places: np.ndarray
    order: tuple[int, ...]
    front: frozenset[int]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.measured.rules]

    def worst(self, rule: int, most: int = WORST) -> list[int]:
        """Images of which a rule keeps least, of equal ones the costlier first; none where all is kept."""
        kept = self.measured.values["resolution_kept"][rule][self.places]
        tokens = self.measured.values["tokens"][rule][self.places]
        found = np.lexsort((-tokens, np.round(kept, 6)))[:most]
        return [int(image) for image in found if kept[image] < 1 - 1e-6]

    def bucketed(self, buckets: Sequence[Bucket]) -> list[tuple[Bucket, int, np.ndarray, np.ndarray]]:
        """For each bucket that has images: it, their number, and every rule's mean tokens and resolution kept."""
        sizes = self.measured.sizes_hw
        by = sizes.max(axis=1) / sizes.min(axis=1) if buckets is ASPECTS else sizes.prod(axis=1) / 1e6
        found = []
        for bucket in buckets:
            inside = (by >= bucket.low) & (by < bucket.high)
            if inside.any():
                part = _part(self.measured, inside)
                number = int(self.measured.counts[inside].sum())
                found.append((bucket, number, part.mean("tokens"), part.mean("resolution_kept")))
        return found


def _part(measured: Measured, inside: np.ndarray) -> Measured:
    values = {name: rows[:, inside] for name, rows in measured.values.items()}
    return Measured(measured.rules, measured.sizes_hw[inside], measured.counts[inside], values, {})


def summarize(inputs: Any, rules: Iterable[SlicingLike] | None = None, **system: Any) -> Summary:
    """Measure every image by every rule; arguments and errors as of :func:`uhd.compare.table`.

    >>> found = summarize([(1008, 672), (300, 400)], ["llava-1.5", "llava-uhd"])
    >>> [found.names[place] for place in found.order]
    ['llava-uhd', 'llava-1.5']
    """
    images = tuple(given_inputs(inputs))
    measured = measure_sizes([image.image_hw for image in images], rules, **system)
    numbers = {tuple(size): place for place, size in enumerate(measured.sizes_hw.tolist())}
    tokens, kept = measured.mean("tokens"), measured.mean("resolution_kept")
    order = sorted(range(len(tokens)), key=lambda rule: (math.isnan(tokens[rule]), tokens[rule], -kept[rule]))
    whole = measured.complete
    best = front([(tokens[r] if whole[r] else math.nan, kept[r]) for r in range(len(tokens))])
    places = np.array([numbers[tuple(image.image_hw)] for image in images])
    return Summary(images, measured, places, tuple(order), frozenset(best))


def records(summary: Summary) -> Iterator[dict[str, Any]]:
    """One flat dictionary for each image and rule, as ``pandas.DataFrame`` takes them; ``None``: refused.

    >>> [row["tokens"] for row in records(summarize([(1008, 672), (300, 400)], ["llava-uhd"]))]
    [454, 194]
    """
    rows = [
        [_numbers(summary.measured, rule, size) for size in range(len(summary.measured.sizes_hw))]
        for rule in summary.order
    ]
    for image, place in zip(summary.inputs, summary.places.tolist(), strict=True):
        height, width = image.image_hw
        for row, rule in zip(rows, summary.order, strict=True):
            head = {"input": image.name, "height": height, "width": width, "strategy": summary.names[rule]}
            yield {**head, **row[place]}


_WHOLE = ("tokens", "views", "patches", "rows", "columns")


def _numbers(measured: Measured, rule: int, size: int) -> dict[str, Any]:
    refusal = measured.refusals.get((rule, size))
    if refusal is not None:
        return {**dict.fromkeys(COLUMNS), "error": refusal}
    values = ((name, float(measured.values[name][rule, size])) for name in COLUMNS)
    return {**{name: int(value) if name in _WHOLE else value for name, value in values}, "error": None}


def write_csv(file: TextIO, summary: Summary) -> None:
    """Every record, a line each, under a line of names; an empty field is ``None``."""
    writer = None
    for record in records(summary):
        if writer is None:
            writer = csv.DictWriter(file, list(record))
            writer.writeheader()
        writer.writerow(record)


def to_dict(summary: Summary) -> dict[str, Any]:
    """The whole answer as plain JSON types; images one by one are in :func:`records`."""
    aspects, areas = summary.bucketed(ASPECTS), summary.bucketed(AREAS)
    return {
        "images": len(summary.inputs),
        "sizes": len(summary.measured.sizes_hw),
        "by_aspect": {bucket.name: number for bucket, number, *_ in aspects},
        "by_area": {bucket.name: number for bucket, number, *_ in areas},
        "strategies": [_of_rule(summary, rule, aspects, areas) for rule in summary.order],
    }


def _of_rule(summary: Summary, rule: int, aspects: list, areas: list) -> dict[str, Any]:
    measured = summary.measured
    refused = np.isnan(measured.values["tokens"][rule])
    found: dict[str, Any] = {
        "strategy": summary.names[rule],
        "front": rule in summary.front,
        "images": int(measured.counts[~refused].sum()),
        "refused": int(measured.counts[refused].sum()),
    }
    if refused.any():
        found["error"] = next(why for (place, _), why in measured.refusals.items() if place == rule)
    if refused.all():
        return found
    for name in ("tokens", "tflops", "resolution_kept"):
        found[name] = spread(measured.values[name][rule], measured.counts)
    for name in ("padding", "seam", "distortion"):
        found[name] = spread(measured.values[name][rule], measured.counts)["mean"]
    found["worst"] = [_worst(summary, rule, image) for image in summary.worst(rule)]
    for name, buckets in (("by_aspect", aspects), ("by_area", areas)):
        found[name] = {
            bucket.name: {"tokens": _known(tokens[rule]), "resolution_kept": _known(kept[rule])}
            for bucket, _, tokens, kept in buckets
        }
    return found


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def spread(values: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Mean, least, 5th, 50th and 95th percentile and most over images; ``nan`` ones are left out.

    >>> spread(np.array([1.0, 3.0]), np.array([1, 3]))
    {'mean': 2.5, 'min': 1.0, 'p5': 1.0, 'p50': 3.0, 'p95': 3.0, 'max': 3.0}
    """
    known = ~np.isnan(values)
    mean = float((values[known] * counts[known]).sum() / counts[known].sum())
    shares = {"min": 0.0, "p5": 0.05, "p50": 0.5, "p95": 0.95, "max": 1.0}
    return {"mean": mean, **{name: weighted_quantile(values, counts, share) for name, share in shares.items()}}


def _worst(summary: Summary, rule: int, image: int) -> dict[str, Any]:
    shown, place, values = summary.inputs[image], summary.places[image], summary.measured.values
    return {
        "input": shown.name,
        "image_hw": list(shown.image_hw),
        "resolution_kept": float(values["resolution_kept"][rule, place]),
        "tokens": int(values["tokens"][rule, place]),
    }


_HEAD = ("strategy", "tokens", "p5", "p50", "p95", "kept", "p5", "padding", "seam", "TFLOPs")


def _row(summary: Summary, rule: int, found: dict[str, Any]) -> tuple[str, ...]:
    tokens, kept = found["tokens"], found["resolution_kept"]
    return (
        summary.names[rule],
        *(f"{tokens[name]:.0f}" for name in ("mean", "p5", "p50", "p95")),
        *(f"{100 * kept[name]:.1f}%" for name in ("mean", "p5")),
        f"{100 * found['padding']:.0f}%",
        f"{found['seam']:.1f}",
        f"{found['tflops']['mean']:.1f}",
    )


def text(summary: Summary) -> str:
    """Lay the summary out for a terminal: every rule in one line, then what those on the front are worst at.

    >>> print(text(summarize([(1008, 672), (300, 400)], ["llava-1.5", "llava-uhd"])).splitlines()[2])
    * llava-uhd     324  194  194  454  100.0%  100.0%       0%   1.9    10.1
    """
    found = to_dict(summary)
    by_rule = dict(zip(summary.order, found["strategies"], strict=True))
    planned = [rule for rule in summary.order if by_rule[rule]["images"]]
    rows = [_row(summary, rule, by_rule[rule]) for rule in planned]
    marks = ["* " if rule in summary.front else "  " for rule in planned]
    lines = aligned(
        [("  " + _HEAD[0], *_HEAD[1:]), *((m + row[0], *row[1:]) for m, row in zip(marks, rows, strict=True))]
    )
    said = [
        f"{counted(found['images'], 'image')} of {counted(found['sizes'], 'size')}, {len(by_rule)} rules",
        *lines,
        "* on the front: no other rule keeps more for as few tokens, on average over these images",
        "kept: share of an image's px that reach the encoder; p5, p50, p95: so many in a hundred images lie below; "
        "TFLOPs: one reference system for all (CLIP-L, MLP, 13B LM) unless told otherwise",
    ]
    shown = [rule for rule in planned if rule in summary.front]
    for title, buckets in (("longer side / shorter side", ASPECTS), ("area", AREAS)):
        said += ["", f"By {title}: tokens and share kept, mean", *_bucket_lines(summary, shown, buckets)]
    said += ["", "Of which image each keeps least:", *aligned([_worst_row(summary, rule) for rule in shown])]
    refusing = [rule for rule in summary.order if by_rule[rule]["refused"]]
    if refusing:
        said += ["", "Refused, and left out of that rule's numbers:"]
        said += [
            f"  {by_rule[r]['strategy']}: {by_rule[r]['refused']:,} images: {by_rule[r]['error']}" for r in refusing
        ]
    return "\n".join(said)


def _bucket_lines(summary: Summary, rules: Sequence[int], buckets: Sequence[Bucket]) -> list[str]:
    found = summary.bucketed(buckets)
    head = ("  strategy", *(f"{bucket.name} ({number:,})" for bucket, number, *_ in found))
    return aligned(
        [
            head,
            *(
                ("* " + summary.names[r], *(f"{tokens[r]:.0f}, {100 * kept[r]:.1f}%" for _, _, tokens, kept in found))
                for r in rules
            ),
        ]
    )


def _worst_row(summary: Summary, rule: int) -> tuple[str, ...]:
    name = "* " + summary.names[rule]
    worst = summary.worst(rule, 1)
    if not worst:
        return name, "100%", "of every image"
    found = _worst(summary, rule, worst[0])
    size = "{1}x{0} px".format(*found["image_hw"])
    return name, f"{100 * found['resolution_kept']:.1f}%", f"{size}, {found['tokens']} tokens, {found['input']}"


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side: the first to the left, the others to the right, words at the end as they are."""
    if not rows:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    worded = any(" px, " in row[-1] or row[-1] == "of every image" for row in rows)
    lines = []
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        if worded:
            cells[-1] = row[-1]
        lines.append("  ".join(cells))
    return lines


def latex(summary: Summary) -> str:
    r"""The table as LaTeX (booktabs), rules on the front in bold.

    >>> print(latex(summarize([(1008, 672)], ["llava-uhd"])).splitlines()[4])
    \textbf{llava-uhd} & 454 & 454 & 454 & 454 & 100.0\% & 100.0\% & 0\% & 2.9 & 14.3 \\
    """
    found = to_dict(summary)["strategies"]
    lines = [
        r"\begin{tabular}{l" + "r" * (len(_HEAD) - 1) + "}",
        r"\toprule",
        " & ".join(_HEAD) + r" \\",
        r"\midrule",
    ]
    for rule, one in zip(summary.order, found, strict=True):
        if one["images"]:
            name, *cells = (cell.replace("%", r"\%").replace("_", r"\_") for cell in _row(summary, rule, one))
            lines.append(" & ".join([rf"\textbf{{{name}}}" if one["front"] else name, *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])
