"""Every slicing rule over a stated distribution of image sizes: cost, what is kept, stability; JSON, SVG and a table.

    python benchmarks/strategies.py --out benchmarks/results

The distribution is synthetic and seeded, not a dataset: see ``DISTRIBUTION``. Pure planning: no image is opened and no
model is run, so results are the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import uhd
from uhd import charts
from uhd.compare import all_rules, curves_over_aspect, curves_over_size
from uhd.slicing.metrics import (
    Summary,
    cliffs,
    measure,
    monotonicity_violations,
    summarize,
    transposition_violations,
)

Size = tuple[int, int]  # (height, width), px

DISTRIBUTION = {
    "photos": "40%: 4:3 (twice as often), 3:2, 16:9 or 1:1, longer side log-uniform in 640..4032 px, 40% upright",
    "screens": "25%: 7 desktop and (40%) 5 phone or tablet resolutions; 30% are a window, 0.3 to 1 of each side",
    "pages": "20%: A4, letter or a book page at 72 to 300 dpi, 90% upright",
    "strips": "10%: 1:4 to 1:10, shorter side 64 to 400 px: banners, receipts, long screenshots; half upright",
    "small": "5%: icons and thumbnails, both sides log-uniform in 32..320 px",
}
SHARES = {"photos": 0.40, "screens": 0.25, "pages": 0.20, "strips": 0.10, "small": 0.05}
_SCREENS_WH = ((1920, 1080), (1366, 768), (2560, 1440), (1440, 900), (1280, 720), (3840, 2160), (2880, 1800))
_PHONES_WH = ((1170, 2532), (1080, 2400), (1080, 1920), (828, 1792), (1640, 2360))
_PAGES_IN = ((8.27, 11.69), (8.5, 11.0), (6.0, 9.0))

SHOWN = (
    "llava-uhd-safe",
    "minicpm-v",
    "llava-1.5",
    "llava-next",
    "llava-onevision",
    "internvl",
    "qwen2.5-vl",
    "gemma4-280",
)
"""Rules whose curves are drawn."""

CAPS = {  # tokens that the rule's own settings declare, for the budget error B
    "llava-onevision-anyres-max-9": 10 * 729,
    "llava-onevision-anyres-max-4": 5 * 729,
    "llava-onevision-threshold": 7290,
    "kimi-k25": 16384 // 4,
    "qwen2-vl-classdefault": 1280,
    "qwen2-5-vl-ckpt": 16384,
    "qwen3-vl-ckpt": 16384,
    "gemma4-280": 280,
    "gemma4-1120": 1120,
    "siglip2-naflex-256": 256,
    "siglip2-naflex-1024": 1024,
    "nemotron-h-omni": 13312 // 4,
    "muse-glimmer": 4096,
}


def draw_sizes(count: int, seed: int) -> dict[str, list[Size]]:
    """``count`` sizes by kind, in the shares of ``DISTRIBUTION``; equal seeds give equal sizes."""
    makers = {"photos": _photo, "screens": _screen, "pages": _page, "strips": _strip, "small": _small}
    rng = random.Random(seed)
    return {kind: [makers[kind](rng) for _ in range(round(count * share))] for kind, share in SHARES.items()}


def _log_uniform(rng: random.Random, low: float, high: float) -> float:
    return low * (high / low) ** rng.random()


def _photo(rng: random.Random) -> Size:
    longer = round(_log_uniform(rng, 640, 4032))
    shorter = round(longer / rng.choice((4 / 3, 4 / 3, 3 / 2, 16 / 9, 1.0)))
    return (longer, shorter) if rng.random() < 0.4 else (shorter, longer)


def _screen(rng: random.Random) -> Size:
    width, height = rng.choice(_PHONES_WH if rng.random() < 0.4 else _SCREENS_WH)
    if rng.random() < 0.3:
        width, height = round(width * rng.uniform(0.3, 1)), round(height * rng.uniform(0.3, 1))
    return height, width


def _page(rng: random.Random) -> Size:
    dpi = rng.choice((72, 96, 150, 200, 300))
    width, height = (round(side * dpi) for side in rng.choice(_PAGES_IN))
    return (height, width) if rng.random() < 0.9 else (width, height)


def _strip(rng: random.Random) -> Size:
    shorter = round(rng.uniform(64, 400))
    longer = round(shorter * _log_uniform(rng, 4, 10))
    return (longer, shorter) if rng.random() < 0.5 else (shorter, longer)


def _small(rng: random.Random) -> Size:
    return round(_log_uniform(rng, 32, 320)), round(_log_uniform(rng, 32, 320))


def validate() -> None:
    """Known numbers first; nothing is reported where one of them is wrong.

    Raises:
        RuntimeError: A metric is not what it must be; the message says which.
    """
    expected = {  # (height, width), rule -> tokens, stretch, padding, share kept; from the executed reference
        ((1008, 672), "llava-next"): (2160, 1.00, 0.27, 0.44),
        ((1080, 1920), "internvl"): (2304, 1.12, 0.00, 0.77),
        ((1568, 224), "llava-1.5"): (576, 1.00, 0.86, 0.05),
        ((3000, 4000), "llava-onevision"): (7309, 1.00, 0.10, 0.33),
        ((1008, 672), "llava-uhd"): (454, 1.00, 0.00, 1.00),
    }
    for (size, rule), (tokens, *rest) in expected.items():
        found = measure(uhd.plan(size, rule))
        got = (found.tokens, *(round(v, 2) for v in (found.distortion, found.padding, found.resolution_kept)))
        if got != (tokens, *rest):
            raise RuntimeError(f"{rule} at {size} (height, width): expected {(tokens, *rest)}, got {got}")


def run(count: int, seed: int, stability_count: int) -> dict:
    """Everything that is written, as plain JSON types."""
    by_kind = draw_sizes(count, seed)
    sizes = [size for kind in by_kind.values() for size in kind]
    few = random.Random(seed).sample(sizes, min(stability_count, len(sizes)))
    rows = []
    for rule in all_rules():
        found = summarize(rule, sizes)
        kinds = {kind: summarize(rule, some) for kind, some in by_kind.items()}
        jump, turned = cliffs(rule, few), transposition_violations(rule, few)
        lowered = monotonicity_violations(rule, few)
        row = {
            "strategy": rule,
            **_rounded(found),
            "by_kind": {
                kind: {
                    "tokens_mean": round(s.tokens_mean, 1),
                    "resolution_kept_mean": round(s.resolution_kept_mean, 4),
                }
                for kind, s in kinds.items()
            },
            "cliff_p99": round(jump.p99, 3),
            "cliff_worst": round(jump.worst, 3),
            "cliff_worst_at_hw": jump.worst_at,
            "cliff_share": round(jump.share, 4),
            "transposition_share": round(turned.share, 4),
            "monotonicity_share": round(lowered.share, 4),
        }
        if rule in CAPS:
            row["budget_error_max"] = round(found.tokens_max / CAPS[rule], 4)
        rows.append(row)
    front = _front(rows)
    for row in rows:
        row["pareto"] = row["strategy"] in front
    return {
        "about": "means and medians over a synthetic distribution of sizes; shares in 0..1, FLOPs of CLIP-L, an MLP "
        "and a 13B LM; docs/compare.md defines every metric",
        "versions": {"uhd": uhd.__version__, "numpy": np.__version__, "python": platform.python_version()},
        "seed": seed,
        "sizes": {kind: len(some) for kind, some in by_kind.items()},
        "stability_sizes": len(few),
        "distribution": DISTRIBUTION,
        "strategies": rows,
    }


def _rounded(found: Summary) -> dict[str, float | int]:
    return {
        key: value if isinstance(value, int) else (float(f"{value:.4g}") if value >= 1e6 else round(value, 4))
        for key, value in found._asdict().items()
    }


def _front(rows: Sequence[dict]) -> set[str]:
    """Rules with more resolution kept, on average, than every rule of as few tokens on average."""
    best, front = -1.0, set()
    for row in sorted(rows, key=lambda r: (r["tokens_mean"], -r["resolution_kept_mean"])):
        if row["resolution_kept_mean"] > best:
            best = row["resolution_kept_mean"]
            front.add(row["strategy"])
    return front


def plots(result: dict) -> dict[str, str]:
    """SVG texts by file name: the Pareto front, and tokens over size and over aspect for some rules."""
    points = [
        charts.Point(r["tokens_mean"], r["resolution_kept_mean"], r["strategy"], r["pareto"])
        for r in result["strategies"]
    ]
    x = charts.log_axis(
        [min(p.x for p in points) / 1.1, max(p.x for p in points) * 1.1], "mean tokens of an image (log)"
    )
    front = charts.scatter(points, x, charts.percent_axis("mean resolution kept"), width=1100, height=520)
    rules = [(name, name) for name in SHOWN]
    size_lines, aspect_lines = curves_over_size(rules, (3, 4), 121), curves_over_aspect(rules, (1000, 1000), 121)
    counts = [v for lines in (size_lines, aspect_lines) for line in lines.values() for _, v in line]
    y = charts.log_axis(counts, "tokens (log)")
    sides = charts.log_axis([64, 4096], "longer side of a 4:3 image, px (log)")
    ratios = tuple(
        (v, t)
        for v, t in ((1 / 8, "1:8"), (0.25, "1:4"), (0.5, "1:2"), (1, "1:1"), (2, "2:1"), (4, "4:1"), (8, "8:1"))
    )
    aspects = charts.Axis(1 / 8, 8, ratios, True, "width : height of an image of one megapixel (log)")
    return {
        "strategies_pareto.svg": front,
        "strategies_size.svg": charts.curves(size_lines, sides, y, width=1000, height=420),
        "strategies_aspect.svg": charts.curves(aspect_lines, aspects, y, width=1000, height=420),
    }


def table(result: dict) -> str:
    """Lines for a terminal, cheapest first; * is on the Pareto front."""
    lines = [
        f"  {'strategy':40}{'tokens':>8}{'max':>8}{'kept':>6}{'stretch p95':>12}{'padding':>9}{'cliff':>7}"
        f"{'turned':>8}"
    ]
    for r in sorted(result["strategies"], key=lambda r: r["tokens_mean"]):
        lines.append(
            f"{'* ' if r['pareto'] else '  '}{r['strategy']:40}{r['tokens_mean']:8.0f}{r['tokens_max']:8d}"
            f"{100 * r['resolution_kept_mean']:5.0f}%{r['distortion_p95']:12.2f}{100 * r['padding_mean']:8.0f}%"
            f"{r['cliff_worst']:7.1f}{100 * r['transposition_share']:7.0f}%"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Write ``strategies.json`` and three plots, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder for results and plots (default results/ beside this file)",
    )
    parser.add_argument("--count", type=int, default=400, help="sizes (default 400)")
    parser.add_argument(
        "--stability-count", type=int, default=200, help="of them for cliffs and symmetry (default 200)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sizes (default 0)")
    args = parser.parse_args(argv)
    validate()
    result = run(args.count, args.seed, args.stability_count)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "strategies.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, text in plots(result).items():
        (args.out / name).write_text(text, encoding="utf-8")
    print(", ".join(f"{key} {value}" for key, value in result["versions"].items()))
    print(f"{sum(result['sizes'].values())} sizes: {result['sizes']}")
    print(table(result))
    print(f"wrote strategies.json and three plots to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
