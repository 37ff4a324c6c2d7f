"""What the runs of the learned comparison say, in numbers: intervals, paired differences, what was expected.

No model is run here; :mod:`learned_report` tells what is found in tables and plots.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import learned_plus
import numpy as np
from learned_run import (
    ARMS,
    DIGITS,
    LONG,
    NOT_ASKED,
    QUICK,
    QUICK_ARMS,
    SEEDS,
    TUNING_SEED,
    Settings,
    Task,
    chosen_factor,
    tasks,
)

from uhd import SlicePlan, plan
from uhd.evaluation.scores import quantile
from uhd.nano.build import NanoConfig
from uhd.nano.evaluate import wilson
from uhd.nano.task import BUCKETS, QUESTIONS, scene

BASELINE = "uhd"
UNCUT = "stretch"
"""The arm that tells what moving a text alone costs: it cuts nothing."""

CONTRASTS = (("few-latents", "overview-wide"),)
"""Pairs of other arms, the first minus the second: pixels with few tokens, tokens with few pixels."""


class Planned(NamedTuple):
    """A set of runs, which has a folder of its own: how they are made, which there are, what is held against what."""

    settings: Settings
    arms: tuple[str, ...]
    baseline: str = learned_plus.BASELINE
    contrasts: tuple[tuple[str, str], ...] = learned_plus.CONTRASTS


SETS = {
    "long": Planned(LONG, ARMS, BASELINE, CONTRASTS),
    "quick": Planned(QUICK, QUICK_ARMS, BASELINE, CONTRASTS),
    "plus": Planned(learned_plus.PLUS, learned_plus.ARMS),
    "pages": Planned(learned_plus.PAGES, learned_plus.PAGE_ARMS),
    "after": Planned(learned_plus.AFTER, learned_plus.AFTER_ARMS, contrasts=(("native", "plus"), ("slices", "plus"))),
    "direct": Planned(learned_plus.DIRECT, learned_plus.DIRECT_ARMS, contrasts=learned_plus.DIRECT_CONTRASTS),
}

WHOLE, LONG_FROM = "not cut", 1
"""Images that are not cut are told apart at this border of the aspect buckets."""

FEWEST_SEEDS, FEWEST_IMAGES = 3, 30
"""Below either nothing is judged, whatever the interval."""

CUTS_FILE = "cuts.json"
JUDGED = ("better", "worse", "no difference")
BORDERS = (f"< {BUCKETS[0]}", *(f"{a} to {b}" for a, b in itertools.pairwise(BUCKETS)), f">= {BUCKETS[-1]}")

Runs = Mapping[Task, Mapping[str, Any]]


def decode(row: str) -> np.ndarray:
    """(images,) numbers of a run's base-62 string, ``nan`` where the question was not asked."""
    return np.array([np.nan if mark == NOT_ASKED else DIGITS.index(mark) for mark in row])


def distances(runs: Sequence[Mapping[str, Any]], kind: str) -> np.ndarray:
    """(seeds, images) edit distances."""
    return np.stack([decode(run["test"]["items"][kind]["distance"]) for run in runs])


def share(exact: np.ndarray) -> tuple[float, float, float]:
    """Mean of (seeds, images) zeros and ones, and :func:`interval`; Wilson's for the images where all are equal."""
    mean, low, high = interval(exact, within=(0.0, 1.0))
    if low == high:
        images = int((~np.isnan(exact).any(0)).sum())
        low, high = wilson(round(mean * images), images)
    return mean, low, high


def interval(values: np.ndarray, *, within: tuple[float, float] = (-1.0, 1.0)) -> tuple[float, float, float]:
    """Mean of (seeds, images) values and its 95 % interval over training seeds and images, both drawn at random.

    Two crossed random effects: the mean squares of seeds, images and the rest give the variance of the mean, and
    Satterthwaite's formula its degrees of freedom, which are near two where three seeds differ more than chance in
    the images explains. (A bootstrap of three seeds is too narrow there: of true zeros it calls 16 % differences.)
    With one seed, the interval is of the images alone. Columns with ``nan`` (questions that were not asked) are left
    out; fewer than two images are all ``nan``. ``within``: what the mean can be, shares from 0 on.
    """
    values = values[:, ~np.isnan(values).any(0)]
    seeds, images = values.shape
    if images < 2:
        return float("nan"), float("nan"), float("nan")
    mean, by_seed, by_image = values.mean(), values.mean(1, keepdims=True), values.mean(0, keepdims=True)
    free = (seeds - 1, images - 1, (seeds - 1) * (images - 1))
    sums = (
        images * ((by_seed - mean) ** 2).sum(),
        seeds * ((by_image - mean) ** 2).sum(),
        ((values - by_seed - by_image + mean) ** 2).sum(),
    )
    of_seeds, of_images, rest = (total / max(count, 1) for total, count in zip(sums, free, strict=True))
    variance = max(of_seeds - rest, 0.0) + max(of_images - rest, 0.0) + rest  # of the mean, times values.size
    noise = sum(part**2 / max(count, 1) for part, count in zip((of_seeds, of_images, rest), free, strict=True))
    freedom = float(np.clip(variance**2 / noise, max(seeds - 1, 1), values.size)) if noise else 1.0
    half = quantile(freedom) * float(np.sqrt(variance / values.size))
    return float(mean), float(max(mean - half, within[0])), float(min(mean + half, within[1]))


def verdict(difference: np.ndarray, low: float, high: float) -> str:
    """What an interval of (seeds, images) arm minus baseline allows to say."""
    seeds, images = len(difference), int((~np.isnan(difference).any(0)).sum())
    if not images:
        return "not asked"
    if seeds < FEWEST_SEEDS:
        return f"{seeds} seed{'s' * (seeds > 1)}: not judged"
    if images < FEWEST_IMAGES:
        return f"{images} images: not judged"
    if low <= 0 <= high:
        return "no difference"
    return "better" if low > 0 else "worse"


class Comparison:
    """The runs of a folder, by arm, at the learning rates that the arms chose.

    Args:
        found: From :func:`learned_run.read_runs`.
        name: Of the set of runs, from :data:`SETS`.

    Raises:
        ValueError: Runs were judged on different scenes.
    """

    def __init__(self, found: Runs, name: str = "long") -> None:
        self.found, self.name = found, name
        self.factors = tuple(next(iter(found.values()))["settings"]["factors"])
        settings, self.planned, self.baseline, self.contrasts = SETS[name]
        names = [*self.planned, *sorted({task.arm for task in found} - set(self.planned))]
        self.takes = settings.takes
        self.factor = {arm: chosen_factor(arm, found, self.factors, self.takes) for arm in names}
        self.runs: dict[str, dict[int, Mapping[str, Any]]] = {}
        for arm in names:
            there = {task.factor for task in found if task.arm == arm}
            first = next((factor for factor in self.factors if factor in there), None)
            factor = first if self.factor[arm] is None else self.factor[arm]
            kept = {task.seed: run for task, run in found.items() if (task.arm, task.factor) == (arm, factor)}
            if kept:
                self.runs[arm] = dict(sorted(kept.items()))
        tests = [run["test"] for some in self.runs.values() for run in some.values()]
        lengths = [{kind: row["length"] for kind, row in test["items"].items()} for test in tests]
        if any(one != lengths[0] for one in lengths) or len({test["seed"] for test in tests}) > 1:
            raise ValueError("runs were judged on different scenes: their differences would not be paired")
        self.buckets = decode(tests[0]["buckets"])
        self.kinds = [kind for kind in QUESTIONS if not np.isnan(decode(lengths[0][kind])).all()]

    def exact(self, arm: str, kind: str, seeds: Sequence[int] | None = None) -> np.ndarray:
        """(seeds, images) 1 exact, 0 not, ``nan`` not asked."""
        found = distances([self.runs[arm][seed] for seed in (self.runs[arm] if seeds is None else seeds)], kind)
        return np.where(np.isnan(found), np.nan, found == 0)

    def characters(self, arm: str, kind: str) -> float:
        """1 - edit distance / length, over all answers."""
        runs = list(self.runs[arm].values())
        length = decode(runs[0]["test"]["items"][kind]["length"])
        return 1 - float(np.nansum(distances(runs, kind)) / (np.nansum(length) * len(runs)))

    def common(self, arm: str, other: str | None = None) -> list[int]:
        """Seeds that two arms both have; ``None``: the second is the baseline."""
        return [seed for seed in self.runs.get(arm, {}) if seed in self.runs.get(other or self.baseline, {})]

    @cached_property
    def plans(self) -> list[SlicePlan]:
        """`uhd`'s of the scenes that judge; none where the runs do not tell its sizes, or judge by other scenes."""
        first = next(iter(self.found.values()))
        settings, seed = first["settings"], first["test"]["seed"]
        if "model" not in settings or settings.get("set") == "pages":
            return []
        slicing = NanoConfig(**settings["model"]).slicing
        return [plan(scene(seed, number).image_hw, slicing) for number in range(len(self.buckets))]

    @cached_property
    def cut_names(self) -> np.ndarray:
        """Of the images: :func:`_cut_name`."""
        return np.array([_cut_name(one, bucket) for one, bucket in zip(self.plans, self.buckets, strict=True)])

    def missing(self) -> list[str]:
        """Runs of the full plan that are not there."""
        seeds = (TUNING_SEED,) if self.name == "quick" else SEEDS
        planned, blocked = tasks(self.factors, self.planned, seeds, self.found, self.takes)
        return [*(task.name for task in planned if task not in self.found), *blocked]


def summarize(found: Comparison) -> dict[str, Any]:
    """Everything the tables show, as plain JSON types."""
    return {
        "baseline": found.baseline,
        "missing": found.missing(),
        "borders": list(BORDERS),
        "arms": {arm: _arm(found, arm) for arm in found.runs},
        "differences": {
            arm: _differences(found, arm) for arm in found.runs if arm != found.baseline and found.common(arm)
        },
        "contrasts": {
            f"{arm} - {other}": _differences(found, arm, other)
            for arm, other in found.contrasts
            if found.common(arm, other)
        },
        "by_cut": _by_cut(found),
        # a page's fonts have their own ink, which the marks do not go by
        "cut": {arm: shares for arm in found.runs if found.name != "pages" and (shares := _cut(found, arm))},
        "expected": expectations(found),
    }


def _arm(found: Comparison, arm: str) -> dict[str, Any]:
    runs = found.runs[arm]
    first, questions = next(iter(runs.values())), {}
    for kind in found.kinds:
        exact = found.exact(arm, kind)
        questions[kind] = {
            "exact": _rounded(share(exact)),
            "by_seed": [round(float(np.nanmean(row)), 4) for row in exact],
            "characters": round(found.characters(arm, kind), 4),
            "by_bucket": [_rounded(share(exact[:, found.buckets == number])) for number in range(len(BORDERS))],
        }
    scores = {
        f"{task.factor:g}": run["validation"]
        for task, run in found.found.items()
        if (task.arm, task.seed) == (arm, TUNING_SEED)
    }
    cpu = [sum(part.get("cpu", 0) for part in run["time"].values()) for run in runs.values()]
    return {
        "seeds": list(runs),
        "factor": found.factor[arm],
        "validation": scores,
        "parameters": first["parameters"],
        "cost": first["cost"],
        "cpu_seconds": round(float(np.mean(cpu)), 1),
        "questions": questions,
    }


def _by_cut(found: Comparison) -> dict[str, Any]:
    """How the baseline reads, and the other arms' differences to it, by how `uhd` cuts an image; {} where unknown."""
    plans = found.plans
    if not plans or found.baseline not in found.runs:
        return {}
    names = found.cut_names
    order = sorted(set(names), key=lambda name: (not name.startswith(WHOLE), name))
    masks = {name: names == name for name in order}
    tokens = np.array([one.num_visual_tokens for one in plans])
    return {
        "cuts": {
            name: {"images": int(mask.sum()), "visual_tokens": round(float(tokens[mask].mean()), 1)}
            for name, mask in masks.items()
        },
        "baseline": {
            kind: [_rounded(share(found.exact(found.baseline, kind)[:, mask])) for mask in masks.values()]
            for kind in found.kinds
        },
        "differences": {
            arm: _differences(found, arm, parts=list(masks.values()))
            for arm in found.runs
            if arm != found.baseline and found.common(arm)
        },
    }


def _cut_name(one: SlicePlan, bucket: float) -> str:
    """Grid, "2 x 1" and "1 x 2" being one; of images that are not cut whether they are long, by aspect bucket."""
    if one.grid:
        return f"{min(one.grid)} x {max(one.grid)}"
    return f"{WHOLE}, {'>=' if bucket > LONG_FROM else '<'} {BUCKETS[LONG_FROM]}"


def _differences(
    found: Comparison, arm: str, other: str | None = None, parts: Sequence[np.ndarray] | None = None
) -> dict[str, Any]:
    """The first minus the second, paired by seed and image, for parts of the images: (images,) bool each.

    ``None``: all images, then by aspect bucket.
    """
    other = other or found.baseline
    seeds, told = found.common(arm, other), {}
    if parts is None:
        parts = [found.buckets >= 0, *(found.buckets == number for number in range(len(BORDERS)))]
    for kind in found.kinds:
        difference = found.exact(arm, kind, seeds) - found.exact(other, kind, seeds)
        cells = [difference[:, part] for part in parts]
        rows = [interval(cell) for cell in cells]
        told[kind] = [
            {"difference": _rounded(row), "verdict": verdict(part, *row[1:])}
            for part, row in zip(cells, rows, strict=True)
        ]
    return {"seeds": seeds, "questions": told}


def expectations(found: Comparison) -> list[dict[str, Any]]:
    """What became of :data:`learned_plus.EXPECTED`, of those whose arms have run; images are told apart as `uhd` cuts.

    An expectation is refuted where the interval's upper end is below it, or the arm is judged worse where it may not
    be; else met where the mean is not below it and the interval is above 0, and open elsewhere. ``worse``: aspect
    buckets of all questions in which the arm is judged worse. Of the pages it is H8 alone, a sign: refuted where the
    mean is below 0, met where it is above and no question is judged worse.
    """
    long, masks = found.buckets > LONG_FROM, {"all images": slice(None)}
    masks |= {"below 2.5": ~long, "from 2.5 on": long}
    if BASELINE in found.runs:
        marks = np.array(list(next(iter(found.runs[BASELINE].values()))["test"]["cut"]))
        masks["a border through a glyph"] = marks == "1"
    if found.plans:
        masks["long and not cut"] = long & np.char.startswith(found.cut_names, WHOLE)
    rows = [row for row in learned_plus.EXPECTED.get(found.name, ()) if found.common(row[1], row[2])]
    return [_expected(found, *row, masks[row[4]]) for row in rows if row[4] in masks]


def _expected(
    found: Comparison, name: str, arm: str, other: str, kind: str, where: str, least: float, images: Any
) -> dict[str, Any]:
    seeds = found.common(arm, other)
    difference = (found.exact(arm, kind, seeds) - found.exact(other, kind, seeds))[:, images]
    mean, low, high = interval(difference)
    came = verdict(difference, low, high)
    told = _differences(found, arm, other)["questions"]
    worse = {each: [part["verdict"] == "worse" for part in parts] for each, parts in told.items()}
    buckets = sum(sum(parts[1:]) for parts in worse.values())
    if came in JUDGED and name == "H8":
        questions = sum(parts[0] for parts in worse.values())
        came = "refuted" if mean < 0 else "met" if mean > 0 and not questions else "open"
    elif came in JUDGED:
        barred = (
            (name in learned_plus.NOWHERE_WORSE and buckets)
            or (name in learned_plus.NOT_WORSE_BELOW and any(worse[kind][1 : LONG_FROM + 2]))
            or (name in learned_plus.NOT_WORSE_IN_ALL and any((*worse[kind], *(row[0] for row in worse.values()))))
        )
        came = "refuted" if high < least or barred else "met" if mean >= least and low > 0 else "open"
    return {
        "name": name,
        "arm": arm,
        "other": other,
        "kind": kind,
        "where": where,
        "least": least,
        "difference": _rounded((mean, low, high)),
        "images": int((~np.isnan(difference).any(0)).sum()),
        "came": came,
        "worse": buckets,
    }


def _cut(found: Comparison, arm: str) -> dict[str, Any]:
    """Question "right": where a border between slices goes through a glyph, where none does, and for uncut images."""
    told = {}
    exact = found.exact(arm, "right")
    marks = np.array(list(next(iter(found.runs[arm].values()))["test"]["cut"]))
    for mark, name in (("1", "a border cuts a glyph"), ("0", "no border does"), ("u", "image not cut")):
        part = exact[:, marks == mark]
        if part.size:
            told[name] = {"items": int(part.shape[1]), "exact": _rounded(share(part))}
    return told if len(told) > 1 else {}


def read_cuts(path: Path) -> dict[str, Any]:
    """What :mod:`learned_cuts` wrote.

    Raises:
        ValueError: It is something else.
    """
    try:
        told = json.loads(path.read_text())
        absent = sorted({"seed", "images", "pairs", "runs"} - set(told))
        if absent or not all(isinstance(told[key], dict) for key in ("pairs", "runs")):
            raise ValueError(f"it has no {', '.join(absent)}" if absent else "pairs and runs are not by name")
    except (ValueError, TypeError) as problem:
        raise ValueError(f"{path} is not what `learned.py cuts` writes: {problem}") from None
    return told


def cut_pairs(told: Mapping[str, Any], found: Comparison) -> list[dict[str, Any]]:
    """What :mod:`learned_cuts` measured, arm by arm: exact where glyphs are whole, where cut, and the difference.

    ``to_uncut`` is that difference minus that of the arm :data:`UNCUT`, paired by seed and image, where both were
    judged on the same pairs.
    """
    arms: dict[str, list[str]] = {}
    for arm, runs in found.runs.items():
        names = [Task(arm, seed, run["factor"]).name for seed, run in runs.items()]
        arms[arm] = [name for name in names if name in told["runs"]]
    arms |= {name: [name] for name in told["runs"] if not any(task.name == name for task in found.found)}
    seeds = {task.name: task.seed for task in found.found}

    def outcomes(names: Sequence[str], key: str) -> np.ndarray:
        return np.array([list(map(float, told["runs"][name][key])) for name in names])

    def pairs_of(name: str) -> Any:
        return told["pairs"][told["runs"][name]["by"]]

    rows = []
    for arm, names in arms.items():
        if not names:
            continue
        whole, cut = (outcomes(names, key) for key in ("whole", "cut"))
        difference, to_uncut = interval(cut - whole), None
        uncut = {seeds[name]: name for name in arms.get(UNCUT, ())}
        same = [(name, uncut[seeds[name]]) for name in names if seeds.get(name) in uncut]
        if arm != UNCUT and same and pairs_of(same[0][0]) == pairs_of(same[0][1]):
            one, other = (outcomes(some, "cut") - outcomes(some, "whole") for some in zip(*same, strict=True))
            ends = interval(one - other, within=(-2.0, 2.0))
            to_uncut = {"difference": _rounded(ends), "verdict": verdict(one - other, *ends[1:])}
        rows.append(
            {
                "arm": arm,
                "seeds": len(names),
                "pairs_of": told["runs"][names[0]]["by"],
                "pairs": whole.shape[1],
                "whole": _rounded(share(whole)),
                "cut": _rounded(share(cut)),
                "difference": _rounded(difference),
                "verdict": verdict(cut - whole, *difference[1:]),
                "to_uncut": to_uncut,
            }
        )
    return rows


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [None if np.isnan(value) else round(value, 4) for value in values]
