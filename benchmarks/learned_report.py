"""What the runs of the learned comparison say: tables, paired differences, plots. No model is run here."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import learned_plus
import numpy as np
from learned_run import (
    ARMS,
    DIGITS,
    NOT_ASKED,
    QUICK_ARMS,
    SEEDS,
    TUNING_SEED,
    Task,
    chosen_factor,
    read_runs,
    tasks,
    write_json,
)

from uhd import SlicePlan, charts, plan
from uhd.evaluation.scores import quantile
from uhd.nano.build import NanoConfig
from uhd.nano.evaluate import wilson
from uhd.nano.task import BUCKETS, QUESTIONS, scene

BASELINE = "uhd"
UNCUT = "stretch"
"""The arm that tells what moving a text alone costs: it cuts nothing."""

CONTRASTS = (("few-latents", "overview-wide"),)
"""Pairs of other arms, the first minus the second: pixels with few tokens, tokens with few pixels."""

SETS = {
    "long": (ARMS, BASELINE, CONTRASTS),
    "quick": (ARMS, BASELINE, CONTRASTS),
    **dict.fromkeys(("plus", "pages"), (learned_plus.ARMS, learned_plus.BASELINE, learned_plus.CONTRASTS)),
}
"""Arms, baseline and contrasts of the sets of runs."""

WHOLE, LONG_FROM = "not cut", 1
"""Images that are not cut are told apart at this border of the aspect buckets."""

FEWEST_SEEDS, FEWEST_IMAGES = 3, 30
"""Below either nothing is judged, whatever the interval."""

CUTS_FILE = "cuts.json"
CUTS_TITLE = (
    '"Right of", the same text at two places in the same image: a border through the middle of a glyph, or none:'
)

JUDGED = ("better", "worse", "no difference")
SHARE = (0.0, 1.0)

BORDERS = (
    f"< {BUCKETS[0]}",
    *(f"{a} to {b}" for a, b in itertools.pairwise(BUCKETS)),
    f">= {BUCKETS[-1]}",
)
Runs = Mapping[Task, Mapping[str, Any]]
Table = list[list[str]]


def decode(row: str) -> np.ndarray:
    """(images,) numbers of a run's base-62 string, ``nan`` where the question was not asked."""
    return np.array([np.nan if mark == NOT_ASKED else DIGITS.index(mark) for mark in row])


def distances(runs: Sequence[Mapping[str, Any]], kind: str) -> np.ndarray:
    """(seeds, images) edit distances."""
    return np.stack([decode(run["test"]["items"][kind]["distance"]) for run in runs])


def share(exact: np.ndarray) -> tuple[float, float, float]:
    """Mean of (seeds, images) zeros and ones, and :func:`interval`; Wilson's for the images where all are equal."""
    mean, low, high = interval(exact, within=SHARE)
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
        self.found = found
        self.factors = tuple(next(iter(found.values()))["settings"]["factors"])
        self.planned, self.baseline, self.contrasts = SETS[name]
        names = [*self.planned, *sorted({task.arm for task in found} - set(self.planned))]
        self.factor = {arm: chosen_factor(arm, found, self.factors) for arm in names}
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

    def missing(self) -> list[str]:
        """Runs of the full plan that are not there."""
        seeds = SEEDS if len(self.factors) > 1 else (TUNING_SEED,)
        arms = self.planned if len(self.factors) > 1 else QUICK_ARMS
        planned, blocked = tasks(self.factors, arms, seeds, self.found)
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
        "cut": {arm: shares for arm in found.runs if (shares := _cut(found, arm))},
        **({"expected": expectations(found)} if found.baseline == learned_plus.BASELINE else {}),
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
            "by_bucket": _by_bucket(found, exact),
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
    """How the baseline reads, and the other arms' differences to it, by how it cuts an image; {} for unknown sizes."""
    settings = next(iter(found.found.values()))["settings"]
    sizes = settings.get("model")
    if sizes is None or settings.get("set") == "pages" or found.baseline not in found.runs:
        return {}
    slicing = NanoConfig(**sizes).slicing
    seed = next(iter(found.runs[found.baseline].values()))["test"]["seed"]
    plans = [plan(scene(seed, number).image_hw, slicing) for number in range(len(found.buckets))]
    names = np.array([_cut_name(one, bucket) for one, bucket in zip(plans, found.buckets, strict=True)])
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

    ``None``: in all, then by aspect bucket.
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
    buckets of all questions in which the arm is judged worse.
    """
    if BASELINE not in found.runs:
        return []
    marks = np.array(list(next(iter(found.runs[BASELINE].values()))["test"]["cut"]))
    long = found.buckets > LONG_FROM
    masks = {
        "in all": np.ones(len(long), bool),
        "below 2.5": ~long,
        "from 2.5 on": long,
        "long and not cut": long & (marks == "u"),
        "a border through a glyph": marks == "1",
    }
    rows = []
    for name, arm, other, kind, where, least in learned_plus.EXPECTED:
        if not (seeds := found.common(arm, other)):
            continue
        difference = (found.exact(arm, kind, seeds) - found.exact(other, kind, seeds))[:, masks[where]]
        mean, low, high = interval(difference)
        judged = verdict(difference, low, high)
        told = _differences(found, arm, other)["questions"]
        worse = sum(part["verdict"] == "worse" for parts in told.values() for part in parts[1:])
        below = any(part["verdict"] == "worse" for part in told[kind][1 : LONG_FROM + 2])
        barred = (name in learned_plus.NOWHERE_WORSE and worse) or (name in learned_plus.NOT_WORSE_BELOW and below)
        if judged in JUDGED:
            judged = "refuted" if high < least or barred else "met" if mean >= least and low > 0 else "open"
        what = {"name": name, "arm": arm, "other": other, "kind": kind, "where": where, "least": least}
        images = int((~np.isnan(difference).any(0)).sum())
        rows.append(
            {**what, "difference": _rounded((mean, low, high)), "images": images, "came": judged, "worse": worse}
        )
    return rows


def _expected_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = [["", "difference", "in", "on", "images", "expected", "found", "which is", "buckets worse"]]
    for row in rows:
        cells = [
            row["name"],
            f"`{row['arm']}` - `{row['other']}`",
            f"`{row['kind']}`",
            row["where"],
            str(row["images"]),
        ]
        ends = [f">= {row['least']:g}", _cell(row["difference"], "+.3f"), row["came"], str(row["worse"])]
        table.append([*cells, *ends])
    return table


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


def _pairs_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = [["arm", "seeds", "pairs", "whole", "cut", "cut minus whole", f"that minus `{UNCUT}`'s"]]
    for row in rows:
        beside = row["to_uncut"]
        extra = f"{_cell(beside['difference'], '+.3f')} {beside['verdict']}" if beside else "-"
        apart = f"{_cell(row['difference'], '+.3f')} {row['verdict']}"
        pairs = f"{row['pairs']} of {row['pairs_of']}"
        table.append([row["arm"], str(row["seeds"]), pairs, _cell(row["whole"]), _cell(row["cut"]), apart, extra])
    return table


def _by_bucket(found: Comparison, exact: np.ndarray) -> list[list[float]]:
    return [_rounded(share(exact[:, found.buckets == n])) for n in range(len(BORDERS))]


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [None if np.isnan(value) else round(value, 4) for value in values]


def trends(long: Mapping[str, Any], quick: Mapping[str, Any]) -> Table:
    """Does the quick run point where the long one does? A row for every difference that the long run has."""
    rows = [["arm", "question", "long", "quick", "agree"]]
    for arm, told in long["differences"].items():
        for kind, parts in told["questions"].items():
            other = quick["differences"].get(arm)
            if other is None or parts[0]["verdict"] not in ("better", "worse"):
                continue
            a, b = parts[0]["difference"][0], other["questions"][kind][0]["difference"][0]
            rows.append([arm, kind, f"{a:+.3f}", f"{b:+.3f}", "yes" if a * b > 0 else "no"])
    return rows


def markdown(told: Mapping[str, Any], name: str) -> str:
    """All tables of one folder's runs."""
    arms, parts = told["arms"], [f"### The {name} run"]
    seeds = sorted({seed for arm in arms.values() for seed in arm["seeds"]})
    parts.append(f"Seeds {', '.join(map(str, seeds))}; exact answers, 95 % intervals in brackets.")
    if any(len(arm["seeds"]) == 1 for arm in arms.values()):
        parts.append("Intervals of an arm with one seed are of the images alone: they say nothing of another seed.")
    if told["missing"]:
        parts.append(f"**Not complete.** Missing: {', '.join(told['missing'])}.")
    parts += [_table(_cost_table(arms)), _table(_overall_table(arms))]
    for kind in _kinds(arms):
        parts += [f"`{kind}` by longer side / shorter side:", _table(_bucket_table(arms, kind, told["borders"]))]
    if told.get("expected"):
        parts += ["What became of the expectations:", _table(_expected_table(told["expected"]))]
    if told["differences"]:
        parts += [
            f"Difference to `{told['baseline']}`, paired by seed and image. {_count(told['differences'])}",
            _table(_difference_table(told["differences"], ["in all", *told["borders"]])),
        ]
    if told["contrasts"]:
        parts += [
            f"Differences between two other arms. {_count(told['contrasts'])}",
            _table(_difference_table(told["contrasts"], ["in all", *told["borders"]])),
        ]
    if told["by_cut"] and name != "quick":
        parts += [
            f"By how `{told['baseline']}` cuts an image (rows x columns, turned ones together), with its visual "
            f"tokens: its own share of exact answers, then differences to it. {_count(told['by_cut']['differences'])}",
            _table(_by_cut_table(told["by_cut"], told["baseline"])),
        ]
    if told["cut"]:
        parts += ['"Right of", by whether a border between slices goes through a glyph:', _table(_cut_table(told))]
    return "\n\n".join(parts)


def _count(differences: Mapping[str, Any]) -> str:
    """How many comparisons the table holds, and how many of them chance alone would make differences."""
    verdicts = [
        part["verdict"] for found in differences.values() for parts in found["questions"].values() for part in parts
    ]
    judged = sum(verdict in JUDGED for verdict in verdicts)
    if not judged:
        return f"None of {len(verdicts)} comparisons can be judged yet."
    apart = judged - verdicts.count("no difference")
    return f"{judged} comparisons are judged, {apart} differ; {judged / 20:.0f} would by chance if nothing did."


def _cost_table(arms: Mapping[str, Any]) -> Table:
    head = "arm|seeds|lr factor (validation)|parameters|visual tokens|at most|with separators|views|patches"
    rows = [[*head.split("|"), "encoder MFLOPs", "CPU s a run"]]
    for arm, told in arms.items():
        cost, factor = told["cost"], "open" if told["factor"] is None else f"{told['factor']:g}"
        scores = ", ".join(f"{f}: {score:.3f}" for f, score in told["validation"].items() if score is not None)
        rows.append(
            [
                arm,
                str(len(told["seeds"])),
                f"{factor} ({scores})" if scores else factor,
                f"{told['parameters']:,}",
                f"{cost['visual_tokens']:.1f}",
                str(cost["most_visual_tokens"]),
                f"{cost['tokens']:.1f}",
                f"{cost['views']:.2f}",
                f"{cost['patches']:.1f}",
                f"{cost['encoder_flops'] / 1e6:.1f}",
                f"{told['cpu_seconds']:.0f}",
            ]
        )
    return rows


def _overall_table(arms: Mapping[str, Any]) -> Table:
    read = [kind for kind in ("all", "line") if kind in _kinds(arms)]
    rows = [["arm", *_kinds(arms), *(f"characters of {kind}" for kind in read)]]
    for arm, told in arms.items():
        cells = []
        for found in told["questions"].values():
            each = f" ({' '.join(f'{share:.2f}' for share in found['by_seed'])})" if len(told["seeds"]) > 1 else ""
            cells.append(_cell(found["exact"]) + each)
        ends = [f"{told['questions'][kind]['characters']:.3f}" for kind in read]
        rows.append([arm, *cells, *ends])
    return rows


def _kinds(arms: Mapping[str, Any]) -> list[str]:
    return list(next(iter(arms.values()))["questions"])


def _bucket_table(arms: Mapping[str, Any], kind: str, borders: Sequence[str]) -> Table:
    rows = [["arm", *borders]]
    return rows + [[arm, *map(_cell, told["questions"][kind]["by_bucket"])] for arm, told in arms.items()]


def _by_cut_table(told: Mapping[str, Any], baseline: str) -> Table:
    heads = [f"{name} ({one['images']} images, {one['visual_tokens']:g} tokens)" for name, one in told["cuts"].items()]
    head, *rows = _difference_table(told["differences"], heads)
    own = [[baseline, kind, *map(_cell, shares)] for kind, shares in told["baseline"].items()]
    return [head, *own, *rows]


def _difference_table(differences: Mapping[str, Any], parts: Sequence[str]) -> Table:
    rows = [["arm", "question", *parts]]
    for arm, found in differences.items():
        for kind, found_parts in found["questions"].items():
            cells = [f"{_cell(part['difference'], '+.3f')} {part['verdict']}" for part in found_parts]
            rows.append([arm, kind, *cells])
    return rows


def _cut_table(told: Mapping[str, Any]) -> Table:
    names = list(dict.fromkeys(name for found in told["cut"].values() for name in found))
    rows = [["arm", *names]]
    for arm, found in told["cut"].items():
        cells = [f"{_cell(found[n]['exact'])}, n = {found[n]['items']}" if n in found else "-" for n in names]
        rows.append([arm, *cells])
    return rows


def _cell(values: Sequence[float | None], form: str = ".3f") -> str:
    if values[0] is None:
        return "-"
    mean, low, high = (format(value, form) for value in values)
    return f"{mean} [{low}, {high}]"


def _table(rows: Table) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def plots(told: Mapping[str, Any]) -> dict[str, str]:
    """SVG texts by name: accuracy over aspect, accuracy against tokens, differences with their intervals."""
    ticks = tuple((number, border) for number, border in enumerate(told["borders"]))
    aspect = charts.Axis(0, len(ticks) - 1, ticks, False, "longer side / shorter side")
    drawn = {}
    shown = [kind for kind in ("right", "line", "all") if kind in _kinds(told["arms"])]
    for kind in shown:
        lines = {
            arm: [
                (n, float("nan") if row[0] is None else row[0])
                for n, row in enumerate(found["questions"][kind]["by_bucket"])
            ]
            for arm, found in told["arms"].items()
        }
        drawn[f"aspect_{kind}"] = charts.curves(lines, aspect, charts.percent_axis(f"exact, {kind}"))
    points = [
        charts.Point(
            found["cost"]["tokens"],
            float(np.mean([found["questions"][kind]["exact"][0] for kind in shown])),
            arm,
            arm == told["baseline"],
        )
        for arm, found in told["arms"].items()
    ]
    tokens = charts.log_axis([f(p.x for p in points) * m for f, m in ((min, 0.9), (max, 1.1))], "mean tokens (log)")
    drawn["cost"] = charts.scatter(points, tokens, charts.percent_axis(f"exact: mean of {', '.join(shown)}"))
    if told["differences"]:
        drawn["differences"] = forest(told)
    return drawn


def forest(told: Mapping[str, Any], *, width: int = 760, row: int = 18) -> str:
    """A dot and its interval for every arm and question; hollow where it is no difference, or not judged."""
    lines = [
        (f"{arm}: {kind}", parts[0])
        for arm, found in told["differences"].items()
        for kind, parts in found["questions"].items()
        if parts[0]["difference"][0] is not None
    ]
    left, right, top, baseline = 190, 24, 34, told["baseline"]
    far = max(0.05, *(abs(value) for _, part in lines for value in part["difference"]))
    height = top + row * len(lines) + 12

    def place(value: float) -> float:
        return left + (value + far) / (2 * far) * (width - left - right)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="differences to {baseline}" font-family="system-ui, sans-serif" font-size="12">',
        f'<text x="{left}" y="16" fill="{charts.INK}">exact answers, arm minus {baseline}, 95 % intervals</text>',
    ]
    for value in (-far, 0.0, far):
        at, color = place(value), charts.FAINT if value == 0 else charts.GRID
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top - 4}" y2="{height - 6}" stroke="{color}"/>')
        parts.append(
            f'<text x="{at:.1f}" y="{top - 6}" text-anchor="middle" font-size="10" fill="{charts.FAINT}">'
            f"{value:+.2f}</text>"
        )
    for number, (name, part) in enumerate(lines):
        y = top + row * number + row / 2
        middle, low, high = map(place, part["difference"])
        sure = part["verdict"] in ("better", "worse")
        color = charts.ACCENT if sure else charts.OTHER
        parts.append(f'<text x="{left - 10}" y="{y + 4:.1f}" text-anchor="end" fill="{charts.INK}">{name}</text>')
        parts.append(f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{color}"/>')
        parts.append(
            f'<circle cx="{middle:.1f}" cy="{y:.1f}" r="4" fill="{color if sure else "#fff"}" stroke="{color}">'
            f"<title>{name}: {part['verdict']}</title></circle>"
        )
    return "".join((*parts, "</svg>"))


MARKS = ("<!-- results of the learned comparison -->", "<!-- end of results -->")


def report(out: Path, *, page: Path | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Tables of whatever runs are in ``out/long`` and the other :data:`SETS`, ``report.json`` and plots beside them.

    Args:
        out: Folder of the results.
        page: A Markdown file whose text between :data:`MARKS` becomes the tables and links to the plots.

    Raises:
        ValueError: There are no runs; they do not belong together; the page has no marks.
    """
    told, parts, drawn = {}, [], []
    for name in SETS:
        if found := read_runs(out / name):
            compared = Comparison(found, name)
            told[name] = summarize(compared)
            parts.append(markdown(told[name], name))
            if name == "long" and (path := out / CUTS_FILE).exists():
                told["cut_pairs"] = cut_pairs(read_cuts(path), compared)
                parts += [CUTS_TITLE, _table(_pairs_table(told["cut_pairs"]))]
            for plot, text in plots(told[name]).items():
                drawn.append(out / f"{name}_{plot}.svg")
                drawn[-1].write_text(text, encoding="utf-8")
    if not told:
        raise ValueError(f"no runs in {out / 'long'} or {out / 'quick'}: do some with `learned.py run`")
    if "long" in told and "quick" in told:
        rows = trends(told["long"], told["quick"])
        parts.append("### Does the quick run point where the long one does?")
        parts.append(_table(rows) if len(rows) > 1 else "The long run has no difference yet to compare with.")
        told["trends"] = rows[1:]
    write_json(out / "report.json", told)
    text = "\n\n".join(parts)
    say(text)
    if page is not None:
        links = [f"![{path.stem.replace('_', ' ')}]({os.path.relpath(path, page.parent)})" for path in drawn]
        _put(page, "\n\n".join([text, *links]))
    return told


def _put(page: Path, text: str) -> None:
    written = page.read_text(encoding="utf-8")
    if any(written.count(mark) != 1 for mark in MARKS):
        raise ValueError(f"{page} needs the lines {MARKS[0]} and {MARKS[1]}, once each, where the tables go")
    before, rest = written.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    page.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")
