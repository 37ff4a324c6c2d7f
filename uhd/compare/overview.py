"""One page over a data set: every rule, the front, shapes and sizes, a sample of pictures, every image on demand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from uhd.pixels import DEFAULT, PixelSettings, load_image, move_borders
from uhd.slicing import Slicing, find

from .inputs import Input, source_of
from .page import jpeg
from .scripted import cut_code, scripted_page
from .summary import AREAS, ASPECTS, Bucket, Summary, to_dict

if TYPE_CHECKING:
    from PIL import Image

MOST_PICTURES = 18
MOST_LISTED = 1000
"""Images that are listed one by one, with every rule's numbers."""

DEFAULT_RULE = find(None)
"""The rule whose cuts are shown first, where it is among those compared."""

_SIDE = 256  # px of a picture's longer side
_HERE = Path(__file__).parent

HEADS = (
    ("name", "rule", "click for the cuts below"),
    ("tokens", "tokens", "positions in the language model, mean"),
    ("kept", "kept", "share of an image's px that survive, mean"),
    ("seam", "seam", "length of cuts through the image, in image sides"),
    ("padding", "padding", "share of encoder px that show nothing"),
    ("tflops", "TFLOPs", "of one reference system, mean"),
    ("p5", "tokens p5", "tokens that 5 of 100 images do not exceed"),
    ("p50", "p50", "tokens that half of the images do not exceed"),
    ("p95", "p95", "tokens that 95 of 100 images do not exceed"),
    ("kept_p5", "kept p5", "kept of the 5 of 100 images that lose most"),
)


def overview_page(summary: Summary, *, settings: PixelSettings = DEFAULT, system: str = "") -> str:
    """Draw one self-contained HTML page over a data set, whatever its size.

    It holds at most 18 pictures, evenly from the widest image to the tallest, and lists at most 1,000 images, those of
    which the rules on the front keep least. It asks nothing of the network: its own policy forbids it. Pictures that
    cannot be decoded are left out.

    Args:
        summary: Of :func:`uhd.compare.summarize`.
        settings: How pictures are read.
        system: What FLOPs are counted for, in words.

    >>> from uhd.compare import summarize
    >>> overview_page(summarize([(672, 1008)], ["llava-uhd", "siglip"])).splitlines()[0]
    '<!doctype html>'
    """
    found = to_dict(summary)
    listed = _listed(summary)
    pictures = _pictures(summary, listed, settings)
    planned = [one for one in found["strategies"] if one["images"]]
    return scripted_page(
        "overview.html",
        (_HERE / "overview.css",),
        (_HERE / "parts.js", _HERE / "overview.js"),
        _data(summary, found, listed, pictures),
        images=found["images"],
        sizes=found["sizes"],
        rules=[{"name": one["strategy"], "front": one["front"], "cells": _cells(one)} for one in found["strategies"]],
        heads=HEADS,
        refused=[(one["strategy"], one["refused"], one["error"]) for one in found["strategies"] if one["refused"]],
        buckets=[
            ("longer side / shorter side", *_buckets(planned, found["by_aspect"], "by_aspect")),
            ("area", *_buckets(planned, found["by_area"], "by_area")),
        ],
        pictures=len(pictures),
        most_pictures=MOST_PICTURES,
        listed=len(listed),
        system=system or "CLIP-L, LLaVA-1.5's projector and a 13B language model unless told otherwise",
    )


def _listed(summary: Summary) -> list[int]:
    """The images that are listed: all, or those of which the front's rules keep least on average, in their order."""
    if len(summary.inputs) <= MOST_LISTED:
        return list(range(len(summary.inputs)))
    rules = sorted(summary.front) or list(range(len(summary.names)))
    kept = np.nan_to_num(summary.measured.values["resolution_kept"][rules]).mean(axis=0)[summary.places]
    return sorted(np.argsort(kept, kind="stable")[:MOST_LISTED].tolist())


def _cells(one: dict[str, Any]) -> list[str]:
    if not one["images"]:
        return ["refused", *[""] * (len(HEADS) - 2)]
    tokens, kept = one["tokens"], one["resolution_kept"]
    return [
        f"{tokens['mean']:.0f}",
        f"{100 * kept['mean']:.1f}%",
        f"{one['seam']:.1f}",
        f"{100 * one['padding']:.0f}%",
        f"{one['tflops']['mean']:.1f}",
        *(f"{tokens[name]:.0f}" for name in ("p5", "p50", "p95")),
        f"{100 * kept['p5']:.1f}%",
    ]


def _buckets(planned: list[dict[str, Any]], numbers: dict[str, int], key: str) -> tuple[list, list]:
    rows = []
    for one in planned:
        if one["front"]:
            pairs = [one[key][name] for name in numbers]
            cells = [(f"{pair['tokens']:.0f}", f"{100 * pair['resolution_kept']:.0f}") for pair in pairs]
            rows.append((one["strategy"], cells))
    return list(numbers.items()), rows


def _data(
    summary: Summary, found: dict[str, Any], listed: list[int], pictures: list[dict[str, Any]]
) -> dict[str, Any]:
    """What the script shows: numbers of every rule, and of every rule on each of the sizes that are listed."""
    measured = summary.measured
    sizes = sorted({int(summary.places[image]) for image in listed})
    number = {size: place for place, size in enumerate(sizes)}
    tokens = np.nan_to_num(measured.values["tokens"][:, sizes], nan=-1).astype(int)
    kept = np.round(1000 * np.nan_to_num(measured.values["resolution_kept"][:, sizes])).astype(int)
    order = list(summary.order)
    front = [place for place, rule in enumerate(order) if rule in summary.front]
    names = [summary.names[rule] for rule in order]
    return {
        "rules": [_rule(one) for one in found["strategies"]],
        "picked": names.index(DEFAULT_RULE.name) if DEFAULT_RULE.name in names else front[0] if front else 0,
        "sizes": [[width, height] for height, width in measured.sizes_hw[sizes].tolist()],
        "images": [[summary.inputs[image].name, number[int(summary.places[image])]] for image in listed],
        "tokens": tokens[order].tolist(),
        "kept": kept[order].tolist(),
        "aspects": _bounds(ASPECTS, found["by_aspect"]),
        "areas": _bounds(AREAS, found["by_area"]),
        "pictures": pictures,
    }


def _rule(one: dict[str, Any]) -> dict[str, Any]:
    names = ("tokens", "p5", "p50", "p95", "kept", "kept_p5", "padding", "seam", "tflops")
    if not one["images"]:
        return {"name": one["strategy"], "front": 0, **dict.fromkeys(names)}
    tokens, kept = one["tokens"], one["resolution_kept"]
    values = (
        *(tokens[n] for n in ("mean", "p5", "p50", "p95")),
        kept["mean"],
        kept["p5"],
        one["padding"],
        one["seam"],
    )
    rounded = (round(value, 4) for value in (*values, one["tflops"]["mean"]))
    return {"name": one["strategy"], "front": int(one["front"]), **dict(zip(names, rounded, strict=True))}


def _bounds(buckets: tuple[Bucket, ...], numbers: dict[str, int]) -> list[dict[str, Any]]:
    return [
        {"name": b.name, "images": numbers[b.name], "bounds": [b.low, None if math.isinf(b.high) else b.high]}
        for b in buckets
        if b.name in numbers
    ]


def _pictures(summary: Summary, listed: list[int], settings: PixelSettings) -> list[dict[str, Any]]:
    """A sample of the listed images, evenly by aspect, each with the cuts of every rule."""
    aspects = summary.measured.sizes_hw[:, 1] / summary.measured.sizes_hw[:, 0]
    ranked = sorted(range(len(listed)), key=lambda place: -aspects[summary.places[listed[place]]])
    if len(ranked) > MOST_PICTURES:
        ends = np.linspace(0, len(ranked) - 1, MOST_PICTURES)
        ranked = [ranked[round(end)] for end in ends.tolist()]
    found = []
    for place in ranked:
        image = summary.inputs[listed[place]]
        height, width = image.image_hw
        scale = min(_SIDE / max(height, width), 1)
        shape = {"i": place, "w": max(round(width * scale), 1), "h": max(round(height * scale), 1)}
        try:
            picture = _loaded(image, settings)
        except (ValueError, OSError):  # its header could be read, its pixels cannot
            continue
        shape["src"] = "" if picture is None else jpeg(picture.resize((shape["w"], shape["h"])), quality=74)
        shape["cuts"] = [_cut(summary.measured.rules[rule][1], image.image_hw, picture) for rule in summary.order]
        found.append(shape)
    return found


def _loaded(image: Input, settings: PixelSettings) -> Image.Image | None:
    if image.picture is None:
        return None
    source = image.picture if hasattr(image.picture, "getexif") else source_of(image.picture, settings)
    return load_image(source, settings=settings)


def _cut(rule: Slicing, image_hw: tuple[int, int], picture: Image.Image | None) -> list[int] | None:
    try:
        planned = rule.plan(image_hw)
        return cut_code(planned if picture is None else move_borders(picture, planned, rule))
    except ValueError:
        return None
