"""What the runs of the learned comparison say: tables and plots of :mod:`learned_results`. No model is run here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from learned_results import BASELINE, CUTS_FILE, JUDGED, SETS, UNCUT, Comparison, cut_pairs, read_cuts, summarize
from learned_run import COSTED, read_runs, write_json

from uhd import charts

CUTS_TITLE = (
    '"Right of", the same text at two places in the same image: a border through the middle of a glyph, or none:'
)

Table = list[list[str]]


def _expected_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = [["", "difference", "in", "on", "images", "expected", "found", "which is", "buckets worse"]]
    for row in rows:
        asked = [row["name"], f"`{row['arm']}` - `{row['other']}`", f"`{row['kind']}`", row["where"]]
        found = [_cell(row["difference"], "+.3f"), row["came"], str(row["worse"])]
        table.append([*asked, str(row["images"]), f">= {row['least']:g}", *found])
    return table


def _pairs_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = [["arm", "seeds", "pairs", "whole", "cut", "cut minus whole", f"that minus `{UNCUT}`'s"]]
    for row in rows:
        beside = row["to_uncut"]
        extra = f"{_cell(beside['difference'], '+.3f')} {beside['verdict']}" if beside else "-"
        apart = f"{_cell(row['difference'], '+.3f')} {row['verdict']}"
        pairs = f"{row['pairs']} of {row['pairs_of']}"
        table.append([row["arm"], str(row["seeds"]), pairs, _cell(row["whole"]), _cell(row["cut"]), apart, extra])
    return table


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
    parts.append(f"Tokens, views, patches and FLOPs are means over the first {COSTED} images.")
    parts += [_table(_cost_table(arms)), _table(_overall_table(arms))]
    for kind in _kinds(arms):
        parts += [f"`{kind}` by longer side / shorter side:", _table(_bucket_table(arms, kind, told["borders"]))]
    if told.get("expected"):
        parts += ["What became of the expectations:", _table(_expected_table(told["expected"]))]
    if told["differences"]:
        parts += [
            f"Difference to `{told['baseline']}`, paired by seed and image. {_count(told['differences'])}",
            _table(_difference_table(told["differences"], ["all images", *told["borders"]])),
        ]
    if told["contrasts"]:
        parts += [
            f"Differences between two other arms. {_count(told['contrasts'])}",
            _table(_difference_table(told["contrasts"], ["all images", *told["borders"]])),
        ]
    if told["by_cut"] and name != "quick":
        parts += [
            f"By how `{BASELINE}` cuts an image (rows x columns, turned ones together), with its visual tokens: what "
            f"`{told['baseline']}` answers exactly, then differences to it. {_count(told['by_cut']['differences'])}",
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
        raise ValueError(f"no runs in {out}, in {', '.join(SETS)}: do some with `learned.py run`")
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
